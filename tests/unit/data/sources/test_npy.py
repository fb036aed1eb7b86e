"""Folders, zips and tars of npy files as values: classes, labels and shapes as written, damaged files named or left out."""

from __future__ import annotations

import io
import tarfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from selftrans.data.dataset import Dataset
from selftrans.data.prepare import prepare
from selftrans.data.sources.decode import Reading
from selftrans.data.sources.npy import npy_values
from tests.support.pictures import write, zipped


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


ARRAYS = {f"{'ab'[i % 2]}/{i}.npy": np.full((2, 3, 5), 100 + i, ["<u2", "<f4", "<f8", ">f4"][i % 4]) for i in range(6)}
FILES = {name: saved(array) for name, array in ARRAYS.items()}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_arrays_have_the_classes_of_their_folders(tmp_path: Path, kind: str) -> None:
    where = tmp_path / f"x.{kind}"
    if kind == "folder":
        write(where, FILES | {"a/notes.txt": b"x"})
    elif kind == "zip":
        zipped(where, FILES)
    else:
        with tarfile.open(where, "w") as tar:
            for name, data in FILES.items():
                (info := tarfile.TarInfo(name)).size = len(data)
                tar.addfile(info, io.BytesIO(data))
    manifest = prepare(where, tmp_path / "data", autoencoder="values", progress=False)
    assert (manifest.shape, manifest.classes, manifest.dtype) == ((2, 3, 5), ("a", "b"), "float32")
    dataset = Dataset.open(tmp_path / "data", verify=True)
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    stored = dataset.read(np.arange(6))["moments"][:, 0].numpy()
    assert np.array_equal(stored, np.stack([ARRAYS[name].astype(np.float32) for name in sorted(ARRAYS)]))


def test_labels_may_be_in_a_file_and_parts_chosen(tmp_path: Path) -> None:
    write(tmp_path / "x", {f"{part}/{name}": data for part in ("train", "test") for name, data in FILES.items()})
    (tmp_path / "l.csv").write_text(
        "tile,site,land cover\n" + "".join(f"{k}.npy,s{k},{'wf'[k < 2]}\n" for k in range(6))
    )
    reading = Reading(labels=tmp_path / "l.csv", label_column="Land cover")
    options = {"split": "train", "label_column": "Land cover", "reading": reading}
    manifest = prepare(tmp_path / "x", tmp_path / "data", autoencoder="values", progress=False, **options)
    assert manifest.classes == ("f", "w") and Dataset.open(tmp_path / "data").labels.tolist() == [0, 1, 1, 0, 1, 1]


BAD = {
    "another shape": (
        saved(np.zeros((2, 3, 4), np.float32)),
        r"its shape is \(2, 3, 4\), that of the first file \(2, 3, 5\)",
    ),
    "not finite": (saved(np.full((2, 3, 5), np.nan)), "NaN, infinite, or beyond float32"),
    "truncated": (FILES["b/1.npy"][:-7], "truncated: 113 of 120 bytes of its array"),
    "of integers": (
        saved(np.zeros((2, 3, 5), np.int64)),
        r"int64 \(2, 3, 5\); convert it with numpy.ascontiguousarray",
    ),
    "pickled": (saved(np.array([{}], object)), "pickled"),
    "no array": (b"x", "magic string"),
    "a huge header": (b"\x93NUMPY\x02\x00" + b"\xff" * 4 + b" " * 64, "its header claims 4294967295 bytes"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_files_stop_or_are_left_out_by_name(tmp_path: Path, bad: str) -> None:
    data, message = BAD[bad]
    write(tmp_path / "x", FILES | {"b/9.npy": data})
    options = {"autoencoder": "values", "progress": False}
    with pytest.raises(ValueError, match=rf"^b/9.npy: cannot be read as a sample \(.*{message}.*--skip-bad$") as error:
        prepare(tmp_path / "x", tmp_path / "data", **options)
    assert "\n" not in str(error.value)
    manifest = prepare(tmp_path / "x", tmp_path / "data", skip_bad=True, **options)
    assert manifest.count == 6 and [name for name, _ in manifest.skipped] == ["b/9.npy"]


def test_one_dimension_alone_has_no_channels(tmp_path: Path) -> None:
    write(tmp_path / "x", {"0.npy": saved(np.zeros(5, np.float32))})
    with pytest.raises(
        ValueError, match=r"the only sample of .* is not readable: .*give its one channel a dimension: data\[None\]"
    ):
        prepare(tmp_path / "x", tmp_path / "data", autoencoder="values", progress=False)


LAST = r"1.npy \(8, 8, 3\) looks like a picture with channels last, .* as 8 channels; if so, store data.transpose\(2, 0, 1\)"
NONE = r"1.npy \(64, 96\) looks like a picture without channels, and is read as 64 channels; if so, store data\[None\]"


@pytest.mark.parametrize(
    ("shape", "said"),
    [((8, 8, 3), LAST), ((3, 8, 8), ""), ((8, 9, 3), ""), ((64, 96), NONE), ((64, 1000), ""), ((4, 4), "")],
)
def test_arrays_that_look_like_pictures_without_channels_first_are_said(
    tmp_path: Path, shape: tuple[int, ...], said: str
) -> None:
    write(tmp_path / "x", {"0.npy": b"damaged", "1.npy": saved(np.zeros(shape, np.float32))})
    with pytest.warns(UserWarning, match=said) if said else nullcontext():
        assert npy_values(tmp_path / "x", None, Reading()).shape == shape
