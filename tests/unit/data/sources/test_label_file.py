"""`dataset.json` of StyleGAN's and EDM's tools: labels in place of folders, which only number the pictures there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from selftrans.data.sources.open_source import open_source
from tests.support.pictures import encoded, noise, write, zipped

FILES = {f"0000{k // 3}/img{k:08d}.png": encoded(noise(8, k)) for k in range(5)}
LABELS = [[name, label] for name, label in zip(FILES, (1, 9, 5, 1, 9), strict=True)]


def made(tmp_path: Path, kind: str, content: object, files: dict[str, bytes] | None = None) -> Path:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    every = (FILES if files is None else files) | {"dataset.json": data}
    if kind == "folder":
        return write(tmp_path / "x", every)
    top = "" if kind == "zip" else "pictures/"
    tmp_path.mkdir(exist_ok=True)
    return zipped(tmp_path / "x.zip", {top + name: data for name, data in every.items()})


@pytest.mark.parametrize("kind", ["folder", "zip", "zip of one folder"])
def test_labels_are_those_of_the_file(tmp_path: Path, kind: str) -> None:
    source = open_source(made(tmp_path, kind, {"labels": LABELS[::-1]}))
    assert source.labels.tolist() == [1, 9, 5, 1, 9] and source.classes == tuple(map(str, range(10)))
    assert source.ignored == {} and np.array_equal(source.read(3), noise(8, 3))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_file_without_labels(tmp_path: Path, kind: str) -> None:
    assert open_source(made(tmp_path / "a", kind, {"labels": None})).classes == ()
    other = open_source(made(tmp_path / "b", kind, {"images": []}))  # of another tool
    assert other.classes == ("00000", "00001") and other.ignored == {"*.json": 1}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_pictures_at_the_top_may_have_labels(tmp_path: Path, kind: str) -> None:
    files = {"a.png": encoded(noise(8)), "deep/b.png": encoded(noise(8))}
    source = open_source(made(tmp_path, kind, {"labels": [["deep\\b.png", 1], ["a.png", 0]]}, files))
    assert source.labels.tolist() == [0, 1] and source.classes == ("0", "1")


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": LABELS[1:]}, "has no label for 1 pictures, such as 00000/img00000000.png"),
        ({"labels": [["a", 1.5]]}, r"a name and an integer from 0 to 999999 each, not \['a', 1.5\]"),
        ({"labels": [["a", -1]]}, r"not \['a', -1\]"),
        ({"labels": [["a", True]]}, r"not \['a', True\]"),
        ({"labels": [["a", [0, 1]]]}, "a name and an integer"),
        ({"labels": {"a": 1}}, "a name and an integer"),
        (b"{", "is not valid json"),
        (b"[" * 100_000, "is not valid json"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, kind: str, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"dataset.json.*{message}") as error:
        open_source(made(tmp_path, kind, content))
    assert "\n" not in str(error.value)


def test_damaged_entry_of_labels_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path, "zip", {"labels": LABELS})
    path.write_bytes(path.read_bytes().replace(b'"labels"', b'"lebels"'))  # its checksum is wrong
    with pytest.raises(ValueError, match=r"dataset.json in .*x.zip cannot be read \(.*; make the zip again$"):
        open_source(path)
