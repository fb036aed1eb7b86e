"""Folders of splits are not taken for classes without a word, and one is read on request."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from selftrans.data.sources.captions import CaptionSource
from selftrans.data.sources.clips import MediaOptions, open_clips
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.splits import is_split, split_files
from tests.support.clips import save_sound, sine
from tests.support.pictures import encoded, noise, write, zipped
from tests.unit.data.sources.test_tar_archive import tarred

PNG = encoded(noise(8))
SPLITS = {f"{s}/{c}/{k}.png": PNG for s, n in (("train", 3), ("val", 1)) for c in ("cat", "dog") for k in range(n)}


def made(tmp_path: Path, kind: str, files: dict[str, bytes]) -> Path:
    if kind == "folder":
        return write(tmp_path / "x", files)
    files = {("pics/" if "one folder" in kind else "") + name: data for name, data in files.items()}
    return zipped(tmp_path / "x.zip", files) if kind.startswith("zip") else tarred(tmp_path / "x.tar", files)


@pytest.mark.parametrize("kind", ["folder", "zip", "zip of one folder", "tar", "tar of one folder"])
def test_splits_are_read_on_request(tmp_path: Path, kind: str) -> None:
    where = made(tmp_path, kind, SPLITS)
    said = r"the classes of .* are train, val, which look like splits \(train has the folders cat, dog\); give --split train"
    with pytest.warns(UserWarning, match=said):
        assert open_source(where).classes == ("train", "val")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for split, count in (("train", 6), ("val", 2)):
            source = open_source(where, split=split)
            assert source.classes == ("cat", "dog") and len(source) == count
            assert source.read(count - 1).shape == (8, 8, 3)
    with pytest.raises(ValueError, match=r"has no split 'test'; it has train, val"):
        open_source(where, split="test")


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_only_split_with_only_one_class_has_that_class(tmp_path: Path, kind: str) -> None:
    source = open_source(made(tmp_path, kind, {"train/cat/a.png": PNG}), split="train")
    assert source.classes == ("cat",) and source.labels.tolist() == [0]


@pytest.mark.parametrize("kind", ["folder", "zip", "zip of one folder"])
@pytest.mark.parametrize("inside", [True, False])
def test_labels_in_dataset_json_hold_for_a_split(tmp_path: Path, kind: str, inside: bool) -> None:
    folder, prefix = ("train/", "") if inside else ("", "train/")
    labels = json.dumps({"labels": [[f"{prefix}a/1.png", 2], [f"{prefix}b/2.png", 0]]}).encode()
    files = {"train/a/1.png": PNG, "train/b/2.png": PNG, "val/a/1.png": PNG, f"{folder}dataset.json": labels}
    source = open_source(made(tmp_path, kind, files), split="train")
    assert source.labels.tolist() == [2, 0] and source.classes == ("0", "1", "2")


def test_split_of_captions_in_a_tar(tmp_path: Path) -> None:
    files = {"train/a.png": PNG, "train/a.txt": b"a cat", "val/b.png": PNG, "val/b.txt": b"a dog"}
    source = open_source(tarred(tmp_path / "x.tar", files), captions=CaptionSource(), split="val")
    assert source.captions == [("a dog",)]


def test_split_of_pictures_without_classes(tmp_path: Path) -> None:
    where = write(tmp_path / "x", {"train/a.png": PNG, "train/b.png": PNG, "test/a.png": PNG})
    with pytest.warns(UserWarning, match=r"are test, train, which look like splits; give --split test"):
        open_source(where)
    source = open_source(where, split="train")
    assert source.classes == () and len(source) == 2


def test_classes_with_a_name_like_a_split_are_classes(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = open_source(write(tmp_path / "x", {f"{name}/a.png": PNG for name in ("bus", "car", "train")}))
    assert source.classes == ("bus", "car", "train")


def test_split_that_does_not_apply_is_said(tmp_path: Path) -> None:
    where = write(tmp_path / "x", {"cat/a.png": PNG, "dog/a.png": PNG})
    with pytest.warns(UserWarning, match="split 'val' is ignored: .* has no folders or files of splits"):
        assert open_source(where, split="val").classes == ("cat", "dog")
    for escape in ("..", "a/b", ""):
        with pytest.raises(ValueError, match="is not the name of a folder"):
            open_source(where, split=escape)
    (where / "link").symlink_to(tmp_path)
    with (
        pytest.warns(UserWarning, match="split 'link' is ignored"),
        pytest.raises(ValueError, match="symbolic link out"),
    ):
        open_source(where, split="link")


def test_splits_of_files_of_a_table_or_webdataset(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("train-00000-of-00002.tar", "train-00001-of-00002.tar", "val.tar", "x.tar")]
    with pytest.warns(UserWarning, match="holds files of the splits train, val, and all are read; give --split train"):
        assert split_files(files, None, "x") == files
    assert split_files(files, "train", "x") == files[:2] and split_files(files, "val", "x") == files[2:3]
    with pytest.raises(ValueError, match="x has no split 'test'; it has train, val"):
        split_files(files, "test", "x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert split_files(files[:2], None, "x") == files[:2]


def test_split_folders_of_tables(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for split, count in (("train", 3), ("test", 1)):
        (tmp_path / "x" / split).mkdir(parents=True)
        parquet.write_table(arrow.table({"image": [PNG] * count}), tmp_path / "x" / split / "0.parquet")
    assert len(open_source(tmp_path / "x", split="train")) == 3
    with pytest.raises(ValueError, match=r"no pictures in .*2 files are not read: 2 .parquet"):
        open_source(tmp_path / "x")
    for one in ("digits", tmp_path / "x" / "test" / "0.parquet"):
        with pytest.warns(UserWarning, match="split 'train' is ignored: .* is one table"):
            open_source(one, split="train")


def test_splits_of_captions_and_sounds(tmp_path: Path) -> None:
    pair = {"train/a.png": PNG, "train/a.txt": b"a cat", "val/b.png": PNG, "val/b.txt": b"a dog"}
    where = write(tmp_path / "x", pair)
    with pytest.warns(UserWarning, match="holds train, val, all read, which look like splits"):
        assert len(open_source(where, captions=CaptionSource())) == 2
    assert open_source(where, captions=CaptionSource(), split="val").captions == [("a dog",)]
    for name in ("train/owl", "train/wren", "test/owl"):
        save_sound(tmp_path / "s" / name / "a.wav", sine(440, 0.05))
    with pytest.warns(UserWarning, match="are test, train, which look like splits"):
        open_clips(tmp_path / "s", MediaOptions())
    clips = open_clips(tmp_path / "s", MediaOptions(), split="train")
    assert clips is not None and clips.classes == ("owl", "wren") and clips.read(0).shape == (1, 400)


@pytest.mark.parametrize("name", ["train", "Val", "validation", "test2017", "train2014", "dev", "test_set", "training"])
def test_names_of_splits(name: str) -> None:
    assert is_split(name) and not is_split(f"{name}er") and not is_split(f"a{name}")
