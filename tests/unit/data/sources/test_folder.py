"""Folders: symbolic links and special files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from selftrans.data.sources.open_source import open_source
from tests.support.pictures import encoded, noise, write

TREE = {
    "dog/b.png": encoded(noise(seed=1)),
    "dog/a.PNG": encoded(noise(seed=2)),
    "cat/deep/er/c.png": encoded(noise(seed=3)),
    "Zebra finch/ü ñ 猫.png": encoded(noise(seed=4)),
}


def test_symbolic_links(tmp_path: Path) -> None:
    write(tmp_path / "outside", {"secret.png": encoded(noise())})
    root = write(tmp_path / "x", TREE)
    (root / "dog" / "inside.png").symlink_to(root / "dog" / "b.png")
    (root / "dog" / "loop").symlink_to(root / "dog")
    source = open_source(root)
    assert "dog/inside.png" in source.names and len(source) == 5
    assert source.ignored == {"symbolic links to folders": 1}
    for target in ("outside", "outside/secret.png"):
        leak = root / "dog" / "leak.png"
        leak.symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=r"dog/leak.png .* symbolic link out of the folder"):
            open_source(root)
        leak.unlink()
    for name, target in {
        "self.png": "self.png",
        "one.png": "two.png",
        "two.png": "one.png",
        "gone.png": "nowhere",
    }.items():
        (root / "dog" / name).symlink_to(target)
    (root / "circle").symlink_to("circle")  # at the place of a class folder
    assert open_source(root).ignored["broken links, pipes and devices"] == 5 and len(open_source(root)) == 5
    for name in ("dog/self.png", "dog/one.png", "dog/two.png", "dog/gone.png", "circle"):
        (root / name).unlink()
    (root / "elk").symlink_to("dog")
    with pytest.raises(ValueError, match=r"'elk' of .* no picture \(it is a symbolic link to a folder, which"):
        open_source(root)
    (root / "elk").unlink()
    os.mkfifo(root / "dog" / "pipe.png")  # opening it would block forever
    assert open_source(root).ignored["broken links, pipes and devices"] == 1
