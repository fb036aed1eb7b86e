"""One sample as a file: what is written is read back, and damaged or hostile files are refused."""

import io

import numpy as np
import pytest
from numpy.lib import format as npy

from selftrans.sampling.sample_file import NPY, PNG


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        (PNG, np.arange(24, dtype=np.uint8).reshape(2, 4, 3)),
        (PNG, np.arange(8, dtype=np.uint8).reshape(2, 4, 1)),
        (NPY, np.linspace(-3, 3, 10, dtype=np.float32).reshape(2, 5)),
        (NPY, np.zeros((1, 2, 3, 4), np.float32)),
    ],
)
def test_sample_and_label_are_read_back(tmp_path, kind, image):
    path = tmp_path / f"sample{kind.suffix}"
    kind.check(image[None])
    with path.open("wb") as file:
        kind.write(file, image, 7)
    assert kind.is_complete(path)
    found, label = kind.read(path)
    assert label == 7 and found.dtype == image.dtype and np.array_equal(found, image)
    for length in (0, 3, len(path.read_bytes()) // 2, -1):
        (tmp_path / "truncated").write_bytes(path.read_bytes()[:length])
        assert not kind.is_complete(tmp_path / "truncated")
        if kind is PNG and length == -1:
            continue  # Pillow reads a PNG without its last byte
        with pytest.raises(
            ValueError, match=r"truncated is not a valid sample \(.+\); delete it and repeat the command$"
        ):
            kind.read(tmp_path / "truncated")
    assert not kind.is_complete(tmp_path / "absent")


def written(*arrays):
    buffer = io.BytesIO()
    for array in arrays:
        npy.write_array(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def claimed(shape):
    buffer = io.BytesIO()
    npy.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


GOOD, LABEL = np.zeros((2, 3), np.float32), np.asarray(1, np.int64)


@pytest.mark.parametrize(
    "content",
    [
        written(GOOD),
        written(GOOD.astype(float), LABEL),
        written(GOOD, np.asarray(-1)),
        written(GOOD, np.asarray(1.0)),
        written(GOOD * np.nan, LABEL),
        written(np.array([{}, {}]), LABEL),
        claimed((1 << 40, 1 << 40)),
        claimed((2, -3)) + bytes(24),
        b"\x93NUMPY\x01\x00\x10\x00{'descr': ((((((",
    ],
    ids=["no label", "float64", "negative", "label", "nan", "objects", "huge", "negative shape", "header"],
)
def test_other_npy_files_are_refused(tmp_path, content):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.npy is not a valid sample"):
        NPY.read(tmp_path / "x.npy")
