"""Files that are not read are named by their extension, caches and system files by their name."""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path

import pytest

from selftrans.data.sources.captions import CaptionSource
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.passed_over import Archived, in_words, junk_name, kind_of_file, unread
from tests.support.pictures import encoded, noise, write, zipped

PNG = encoded(noise(8))
JUNK = {
    "cat/Thumbs.db": b"",
    "cat/.DS_Store": b"",
    "__pycache__/a.pyc": b"",
    "__pycache__/b.png": PNG,
    "@eaDir/cat/1.png": PNG,
    "__MACOSX/cat/._1.png": PNG,
    "$RECYCLE.BIN/x.png": PNG,
    "lost+found/x.png": PNG,
    ".ipynb_checkpoints/x.png": PNG,
    "cat/.hidden.png": PNG,
    "cat/desktop.ini": b"",
}
COUNTED = {
    "Thumbs.db": 1, ".DS_Store": 1, "__pycache__": 1, "@eaDir": 1, "__MACOSX": 1, "$RECYCLE.BIN": 1, "lost+found": 1,
    ".ipynb_checkpoints": 1, "hidden files": 1, "desktop.ini": 1,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "zip", "zip of one folder"])
def test_junk_is_no_class_and_is_counted_by_name(tmp_path: Path, kind: str) -> None:
    files = {"cat/1.png": PNG, "dog/1.png": PNG} | JUNK
    if kind == "folder":
        source = open_source(write(tmp_path / "x", files))
    else:
        top = "" if kind == "zip" else "pictures/"
        source = open_source(zipped(tmp_path / "x.zip", {top + name: data for name, data in files.items()}))
    assert source.classes == ("cat", "dog") and len(source) == 2
    assert source.ignored == COUNTED


def test_junk_in_a_tar_is_counted_by_name(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a.png": PNG, "a.txt": b"a cat"} | JUNK)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "x", ".")
    source = open_source(tmp_path / "x.tar", captions=CaptionSource())
    assert len(source) == 1 and source.ignored == COUNTED


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_other_files_are_named_by_extension(tmp_path: Path, kind: str) -> None:
    others = [
        "a.heic",
        "b.HEIC",
        "c.heic",
        "d.jxl",
        "e.jxl",
        "n.txt",
        "README",
        "x.tar.gz2",
        "odd.a-b",
        "v.averylongextension",
    ]
    files = {"1.png": PNG} | dict.fromkeys(others, b"")
    source = open_source(write(tmp_path / "x", files) if kind == "folder" else zipped(tmp_path / "x.zip", files))
    said = "passed over 10 files: 3 .heic, 2 .jxl, 2 .…, 1 without extension, 1 .gz2, 1 .txt"
    assert in_words(source.ignored) == said
    assert unread(source.ignored) == "3 .heic, 2 .jxl"


def test_words_for_what_is_ignored() -> None:
    assert in_words({}) == "" and in_words({"*.txt": 1}) == "passed over 1 file: 1 .txt"
    assert in_words({"*": 1200, "@eaDir": 2}) == "passed over 1,200 files: 1,200 without extension; ignored: 2 @eaDir"
    one = {"hidden files": 1, "broken links, pipes and devices": 1, "class folders without sounds": 1, "Thumbs.db": 1}
    said = "ignored: 1 hidden file, 1 broken link, pipe or device, 1 class folder without sounds, 1 Thumbs.db"
    assert in_words(one) == said and in_words({"empty captions, left out": 1}) == "ignored: 1 empty caption, left out"
    many = {f"*.e{k:02d}": 2 for k in range(10)}
    assert in_words(many).endswith("2 .e07, 4 of 2 other kinds")
    assert kind_of_file("a\x1b.p\x1bng") == "*.…" and junk_name("cat") is None and junk_name("THUMBS.DB") == "THUMBS.DB"


def test_a_folder_in_an_archive_is_counted_once() -> None:
    counts: Counter[str] = Counter()
    archived = Archived(counts)
    for name in ("a/__pycache__/x", "a/__pycache__/y", "b/__pycache__/x", "a/b"):
        assert archived.ignores(name.split("/")) == ("__pycache__" in name)
    assert counts == {"__pycache__": 2}
