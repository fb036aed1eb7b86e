"""A file or folder that is no source is refused with what to do about its kind."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from selftrans.cli.main import main
from selftrans.data.sources import table
from selftrans.data.sources.not_read import check_file, remedy_for
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.source import Source
from tests.support.pictures import encoded, noise, write, zipped


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
        ("a.zip", b"PK\3\4 half of it", "is not a readable zip .*: incomplete, damaged"),
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
        check_file(write(tmp_path, {name: data}) / name)


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
        ValueError, match=r"no pictures in .*; passed over 1 file: 1 \.\w+\)" + (f"; {remedy}" if remedy else "$")
    ):
        open_source(write(tmp_path / "x", {name: b"x"}))
    assert remedy_for({"hidden files": 3, "*.zip": 1}) and remedy_for({"zip": 1}) == ""


def test_a_name_that_is_looked_for_on_the_hub_although_its_folder_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write(tmp_path, {"pictures/cat/a.png": encoded(noise(8))}))
    said = "pictures/cats is not on this machine, so it is looked for on the hub; the folder pictures holds cat"
    asked: list[str] = []
    nothing = Source([], np.zeros(0, dtype=np.int64), (), lambda i: None)  # type: ignore[arg-type,return-value]
    monkeypatch.setattr(table, "hub", lambda name, *_, **__: asked.append(name) or nothing)
    with pytest.warns(UserWarning, match=said), pytest.raises(ValueError, match="no pictures in pictures/cats"):
        open_source("pictures/cats")
    assert asked == ["pictures/cats"]


def test_folder_that_cannot_be_listed_is_not_mentioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path, {"pictures/cat/a.png": encoded(noise(8))}))
    nothing = Source([], np.zeros(0, dtype=np.int64), (), lambda i: None)  # type: ignore[arg-type,return-value]
    monkeypatch.setattr(table, "hub", lambda *_, **__: nothing)

    def refused(path: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("error")
        patched.setattr(os, "scandir", refused)
        with pytest.raises(ValueError, match="no pictures in pictures/cats"):
            open_source("pictures/cats")


def test_empty_name_of_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (
        "selftrans: the source is an empty name; give a folder, a zip, a tar, a parquet file, a hub id, or `digits`\n"
    )
