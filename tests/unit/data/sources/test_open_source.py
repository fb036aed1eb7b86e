"""Sources of pictures: layouts of folders and zips, digits, native sizes, and ambiguous layouts."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from selftrans.data.prepare import prepare
from selftrans.data.sources import table
from selftrans.data.sources.decode import Reading
from selftrans.data.sources.open_source import iter_images, open_source
from selftrans.data.sources.source import Source
from tests.support.pictures import ORDER, TREE, encoded, noise, write, zipped


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_class_folders_in_code_point_order(tmp_path: Path, kind: str) -> None:
    source = open_source(write(tmp_path / "x", TREE) if kind == "folder" else zipped(tmp_path / "x.zip", TREE))
    assert source.classes == ("Zebra finch", "cat", "dog")
    assert [source.name(i) for i in range(len(source))] == ORDER
    assert source.labels.tolist() == [0, 1, 2, 2]
    assert (source.resolution, source.channels) == (8, 3)
    assert np.array_equal(source.read(3), noise(seed=1)) and source.read(3).dtype == np.uint8
    assert np.array_equal(source.read(0), noise(seed=4))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_pictures_without_folders_are_unconditional(tmp_path: Path, kind: str) -> None:
    files = {"b.png": encoded(noise()), "a.png": encoded(noise())}
    source = open_source(write(tmp_path / "x", files) if kind == "folder" else zipped(tmp_path / "x.zip", files))
    assert source.classes == () and source.labels.tolist() == [0, 0] and source.name(0) == "a.png"


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_single_class_folder(tmp_path: Path, kind: str) -> None:
    files = {"only/b.png": encoded(noise()), "only/a.png": encoded(noise())}
    source = open_source(write(tmp_path / "x", files) if kind == "folder" else zipped(tmp_path / "x.zip", files))
    assert source.classes == ("only",) and source.labels.tolist() == [0, 0]


def test_files_that_are_not_pictures_are_counted(tmp_path: Path) -> None:
    junk = {
        "dog/.hidden.png": b"",
        "__MACOSX/dog/a.png": b"",
        "dog/Thumbs.db": b"",
        "dog/notes.txt": b"",
        ".git/x": b"",
    }
    for source in (
        open_source(write(tmp_path / "x", TREE | junk)),
        open_source(zipped(tmp_path / "x.zip", TREE | junk)),
    ):
        assert len(source) == 4 and source.classes == ("Zebra finch", "cat", "dog")
        assert source.ignored == {"hidden files": 1, "__MACOSX": 1, "Thumbs.db": 1, "*.txt": 1, ".git": 1}


def test_digits_equal_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    source, data = open_source("digits"), load_digits()
    assert (len(source), source.channels, source.resolution, len(source.classes)) == (1797, 1, 8, 10)
    assert source.labels.tolist() == data.target.tolist()
    # every possible value, 0 .. 16, by exact fractions
    table = np.array([round(v * 255 / 16) for v in range(17)])
    for i in (0, 5, 1796):
        assert np.array_equal(source.read(i)[..., 0], table[data.images[i].astype(int)])


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_source_without_pictures_is_refused(tmp_path: Path, kind: str) -> None:
    files = {"readme.txt": b"x"}
    empty = write(tmp_path / "x", files) if kind == "folder" else zipped(tmp_path / "x.zip", files)
    with pytest.raises(ValueError, match=r"no pictures in .*1 file is not read: 1 .txt"):
        open_source(empty)


def test_unknown_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no source"):
        open_source(tmp_path / "absent")
    with pytest.raises(ValueError, match="neither an existing path nor a data set"):
        open_source("nobody/nothing")
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(
        ValueError, match=r"is not a readable zip \(File is not a zip file\); .*: download or make it again"
    ):
        open_source(tmp_path / "x.zip")
    for name, why in (("a.tar", "is not a complete tar file"), ("a.tar.gz", "is a compressed tar; decompress it")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=why):
            open_source(tmp_path / name)
    with pytest.raises(ValueError, match="resolution 0"):
        open_source("digits", resolution=0)


def test_ambiguous_layouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"class folders and 1 picture outside them, such as loose.png"):
        open_source(write(tmp_path / "x", TREE | {"loose.png": encoded(noise())}))
    write(tmp_path / "y", TREE)
    (tmp_path / "y" / "aardvark").mkdir()
    with pytest.raises(ValueError, match=r"class folder 'aardvark' .* holds no picture; fill it"):
        open_source(tmp_path / "y")
    write(tmp_path / "y" / "aardvark", {"a.heic": b"", "b.txt": b""})
    with pytest.raises(
        ValueError, match=r"holds no picture \(2 files are not read: 1 .heic, 1 .txt\); .* --allow-empty"
    ):
        open_source(tmp_path / "y")


@pytest.mark.parametrize("kind", ["folder", "zip", "zip of one folder"])
def test_empty_class_folders_are_classes_on_request(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        write(where := tmp_path / "x", TREE)
        (where / "aardvark").mkdir()
    else:
        top = "" if kind == "zip" else "pictures/"
        where = zipped(tmp_path / "x.zip", {top + name: data for name, data in TREE.items()} | {f"{top}aardvark/": b""})
        ignored = open_source(where)
        assert ignored.classes == ("Zebra finch", "cat", "dog")
        assert ignored.ignored == {"class folders without pictures": 1}
    source = open_source(where, reading=Reading(allow_empty=True))
    assert source.classes == ("Zebra finch", "aardvark", "cat", "dog") and source.labels.tolist() == [0, 2, 3, 3]


def test_native_resolution_needs_one_size(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a.png": encoded(noise(8)), "b.png": encoded(noise(9))})
    with pytest.raises(ValueError, match=r"b.png .* is 9x9, others 8x8; give --resolution to crop and resize them$"):
        open_source(tmp_path / "x")
    write(tmp_path / "z", {"a.png": encoded(noise(8)), "b.png": encoded(noise(8)[:5])})
    with pytest.raises(ValueError, match=r"5x8, others 8x8; give --resolution .*, with --buckets to keep about their"):
        open_source(tmp_path / "z")
    with pytest.raises(
        ValueError, match=r"9x9, others 8x8; they are read without resizing: crop all to one size$"
    ):  # as `evaluate` reads, without --resolution
        next(iter_images(tmp_path / "x"))
    write(tmp_path / "y", {"a.png": encoded(noise(8)[:5]), "b.png": encoded(noise(8)[2:7])})
    assert open_source(tmp_path / "y").resolution == (5, 8), "height and width of pictures that are not square"
    np.testing.assert_array_equal(next(iter_images(tmp_path / "y"))[1], noise(8)[2:7])


def test_native_resolution_ignores_unreadable_pictures(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a.png": b"", "b.png": encoded(noise(8))})
    assert open_source(tmp_path / "x").resolution == 8
    write(tmp_path / "y", {"a.png": b"", "b.png": b"no"})
    with pytest.raises(ValueError, match=r"none of the 2 pictures .* the first: a.png"):
        open_source(tmp_path / "y")
    with pytest.raises(ValueError, match=r"the only picture of .*z is not readable: a.png"):
        open_source(write(tmp_path / "z", {"a.png": b"no"}))


def test_iter_images_is_grey_only_if_all_pictures_are(tmp_path: Path) -> None:
    grey = {f"{i}.png": encoded(noise(8, i, channels=1)) for i in range(3)}
    assert [b.shape for b in iter_images(write(tmp_path / "x", grey), 2)] == [(2, 8, 8, 1), (1, 8, 8, 1)]
    write(tmp_path / "x", {"3.png": encoded(noise(8))})
    images = np.concatenate(list(iter_images(tmp_path / "x")))
    assert images.shape == (4, 8, 8, 3)
    assert np.array_equal(images[1, ..., 2], noise(8, 1, channels=1)) and np.array_equal(images[3], noise(8))


def test_a_name_that_is_looked_for_on_the_hub_although_its_folder_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write(tmp_path, {"pictures/cat/a.png": encoded(noise(8))}))
    said = "pictures/cats is not on this machine, so it is looked for on the hub; the folder pictures holds cat"
    asked: list[str] = []
    nothing = Source([], lambda i: None, labels=np.zeros(0, dtype=np.int64))  # type: ignore[arg-type,return-value]
    monkeypatch.setattr(table, "hub", lambda name, *_, **__: asked.append(name) or nothing)
    with pytest.warns(UserWarning, match=said), pytest.raises(ValueError, match="no pictures in pictures/cats"):
        open_source("pictures/cats")
    assert asked == ["pictures/cats"]


def test_folder_that_cannot_be_listed_is_not_mentioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path, {"pictures/cat/a.png": encoded(noise(8))}))
    nothing = Source([], lambda i: None, labels=np.zeros(0, dtype=np.int64))  # type: ignore[arg-type,return-value]
    monkeypatch.setattr(table, "hub", lambda *_, **__: nothing)

    def refused(path: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("error")
        patched.setattr(os, "scandir", refused)
        with pytest.raises(ValueError, match="no pictures in pictures/cats"):
            open_source("pictures/cats")


def test_empty_name_of_a_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^the source is an empty name; give a folder, a zip, .* or `digits`$"):
        prepare("", tmp_path / "out", progress=False)
