"""Files that are not read are named by their extension, caches and system files by their name; what is no source is refused."""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from selftrans.cli.main import main
from selftrans.data.sources.captions import CaptionSource
from selftrans.data.sources.file_kinds import (
    ArchiveJunk,
    check_source_file,
    describe_ignored,
    describe_unread,
    file_kind,
    junk_name,
    remedy_for_ignored,
)
from selftrans.data.sources.open_source import open_source
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
    said = "10 files are not read: 3 .heic, 2 .jxl, 2 .…, 1 without extension, 1 .gz2, 1 .txt"
    assert describe_ignored(source.ignored) == said
    assert describe_unread(source.ignored) == "3 .heic, 2 .jxl"


def test_words_for_what_is_ignored() -> None:
    assert describe_ignored({}) == "" and describe_ignored({"*.txt": 1}) == "1 file is not read: 1 .txt"
    assert (
        describe_ignored({"*": 1200, "@eaDir": 2})
        == "1,200 files are not read: 1,200 without extension; ignored: @eaDir (2)"
    )
    assert describe_ignored({"hidden files": 1, "Thumbs.db": 1200}) == "ignored: hidden files (1), Thumbs.db (1,200)"
    many = {f"*.e{k:02d}": 2 for k in range(10)}
    assert describe_ignored(many).endswith("2 .e07, 4 of 2 other kinds")
    assert file_kind("a\x1b.p\x1bng") == "*.…" and junk_name("cat") is None and junk_name("THUMBS.DB") == "THUMBS.DB"


def test_a_folder_in_an_archive_is_counted_once() -> None:
    counts: Counter[str] = Counter()
    archived = ArchiveJunk(counts)
    for name in ("a/__pycache__/x", "a/__pycache__/y", "b/__pycache__/x", "a/b"):
        assert archived.ignores(name.split("/")) == ("__pycache__" in name)
    assert counts == {"__pycache__": 2}


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.PNG", encoded(noise(8)), "is a single file; give the folder that holds it"),
        ("a.mp3", b"ID3", "is a single file"),
        ("a.csv", b"path,label", "by --labels or --captions"),
        ("a.npy", b"\x93NUMPY", "is a file of arrays; .* --autoencoder values"),
        ("a.npz", b"PK\5\6" + bytes(18), "is a file of arrays"),
        ("a.7z", b"7z\xbc\xaf", r"of a kind that is not read \(.7z\); unpack it"),
        ("a.png.gz", b"\x1f\x8b", "unpack it"),
        ("a.h5", b"\x89HDF", "is a file of another kind; store the pictures as files in a folder, a zip"),
        ("a", b"", "is empty; download or make it again"),
        ("a.zip", b"", "; download or make it again"),
        ("a.zip", b"PK\3\4 half of it", "is not a readable zip .*; it is incomplete, damaged"),
    ],
)
def test_files_that_are_no_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes, said: str
) -> None:
    path = write(tmp_path, {name: data}) / name
    with pytest.raises(ValueError, match=f"^{path} .*{said}"):
        open_source(path)
    assert main(["prepare", str(path), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_what_may_be_a_zip_passes(tmp_path: Path) -> None:
    for name, data in (("a.zip", b"no"), ("pictures.cbz", b"PK\3\4")):
        check_source_file(write(tmp_path, {name: data}) / name)


def test_zip_that_extracts_itself_is_read(tmp_path: Path) -> None:
    zipped(tmp_path / "a.zip", {"cat/a.png": encoded(noise(8)), "dog/b.png": encoded(noise(8, 1))})
    path = tmp_path / "photos.exe"
    path.write_bytes(b"MZ a program" + (tmp_path / "a.zip").read_bytes())
    source = open_source(path)
    assert source.classes == ("cat", "dog") and np.array_equal(source.read(1), noise(8, 1))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("all.zip", "unpack the archives, or give one zip as the source"),
        ("a.tar.gz", "unpack the archives, or give one zip as the source"),
        ("data/0.parquet", "give the folder that the parquet files are in"),
        ("a.mp3", "convert the sounds to wav or flac"),
        ("a.heic", "convert the pictures, for example to png"),
        ("a.npy", "pictures are read from their files"),
        ("a.txt", None),
    ],
)
def test_folders_that_are_no_source(tmp_path: Path, name: str, remedy: str | None) -> None:
    with pytest.raises(
        ValueError, match=r"no pictures in .*; 1 file is not read: 1 \.\w+\)" + (f"; {remedy}" if remedy else "$")
    ):
        open_source(write(tmp_path / "x", {name: b"x"}))
    assert remedy_for_ignored({"hidden files": 3, "*.zip": 1}) and remedy_for_ignored({"zip": 1}) == ""
