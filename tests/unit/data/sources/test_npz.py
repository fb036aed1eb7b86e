"""Arrays in npz files: images, values, labels; wrong headers, pickles, and damage."""

from __future__ import annotations

import io
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from selftrans.data.sources.decode import BadSample
from selftrans.data.sources.npz import npz_values
from selftrans.data.sources.open_source import iter_images
from tests.support.pictures import zipped


def test_npz_is_streamed(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", images)
        batches = list(iter_images(tmp_path / "x.npz", 3))
        assert [len(batch) for batch in batches] == [3, 3, 1]
        assert np.array_equal(np.concatenate(batches), images)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 8, 8, 3), np.float64),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)),
        np.zeros((0, 8, 8, 3), np.uint8),
        np.array([{"pickled": 1}], dtype=object),
    ],
    ids=["float", "channels first", "one image", "fortran", "none", "pickled"],
)
def test_npz_without_uint8_images_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.savez(tmp_path / "x.npz", array)
    with pytest.raises(ValueError, match="holds no uint8 array arr_0"):
        next(iter_images(tmp_path / "x.npz"))


def test_npz_with_wrong_header_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 8, 8, 3)})
    zipped(tmp_path / "x.npz", {"arr_0.npy": buffer.getvalue() + bytes(500)})
    with pytest.raises(ValueError, match="does not match its"):
        next(iter_images(tmp_path / "x.npz"))
    np.savez(tmp_path / "y.npz", other=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="arr_0"):
        next(iter_images(tmp_path / "y.npz"))


# ---- values of data that are not pictures


def npy(array: np.ndarray, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("shape", [(2, 50), (1, 6, 7), (3, 2, 4, 5)])
def test_values_are_read_in_any_order(tmp_path: Path, save, dtype: str, shape: tuple[int, ...]) -> None:
    data = np.random.default_rng(0).standard_normal((9, *shape)).astype(dtype)
    save(tmp_path / "x.npz", data=data, labels=np.arange(9) % 3, classes=np.array(["a", "b", "ü"]))
    source = npz_values(tmp_path / "x.npz")
    assert (len(source), source.shape, source.classes) == (9, shape, ("a", "b", "ü"))
    assert source.labels.tolist() == [0, 1, 2] * 3 and source.labels.dtype == np.int64
    for i in (0, 1, 2, 7, 8, 8, 3, 0):
        assert np.array_equal(source.read(i), data[i].astype(np.float32)) and source.read(i).dtype == np.float32


def test_values_without_labels_or_class_names(tmp_path: Path) -> None:
    data = np.zeros((4, 1, 8), np.float32)
    np.savez(tmp_path / "x.npz", data=data)
    source = npz_values(tmp_path / "x.npz")
    assert source.classes == () and source.labels.tolist() == [0] * 4
    np.savez(tmp_path / "x.npz", data=data, labels=np.array([0, 2, 0, 2], np.uint8))
    assert npz_values(tmp_path / "x.npz").classes == ("0", "1", "2")


def test_fingerprint_depends_on_content_not_path(tmp_path: Path) -> None:
    data, labels = np.zeros((4, 1, 8), np.float32), np.arange(4)
    prints = []
    for k, (values, marks) in enumerate([(data, labels), (data, labels), (data + 1, labels), (data, labels[::-1])]):
        np.savez(tmp_path / f"{k}.npz", data=values, labels=marks)
        prints.append(npz_values(tmp_path / f"{k}.npz").fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 3


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    data = np.zeros((4, 1, 8))
    data[2, 0, 5] = value
    np.savez(tmp_path / "x.npz", data=data)
    source = npz_values(tmp_path / "x.npz")
    source.read(1)
    with pytest.raises(BadSample, match=r"^sample 2 of x.npz: cannot be used \(NaN, infinite, or beyond float32\)$"):
        source.read(2)
    assert not source.read(3).any()


@pytest.mark.parametrize("dtype", ["int16", "uint16", ">u2"])
def test_integers_of_16_bits_are_read_exactly(tmp_path: Path, dtype: str) -> None:
    info = np.iinfo(dtype)
    data = np.array([[[info.min, info.max, 1234]], [[0, 1, 10000]]], dtype)
    np.savez(tmp_path / "x.npz", data=data)
    source = npz_values(tmp_path / "x.npz")
    read = np.stack([source.read(i) for i in range(2)])
    assert read.dtype == np.float32 and np.array_equal(read, data.astype(np.float64))


FLOATS = np.zeros((4, 2, 8), np.float32)
OTHERS = {
    "uint8": (
        {"data": FLOATS.astype(np.uint8)},
        "data is uint8 .*expected float16, float32 or float64, or integers of 16",
    ),
    "int32": ({"data": FLOATS.astype(np.int32)}, r"ascontiguousarray\(data, dtype='float32'\)"),
    "complex": ({"data": FLOATS.astype(np.complex64)}, r"numpy.concatenate\(\[data.real, data.imag\], axis=1\)"),
    "long double": ({"data": FLOATS.astype(np.longdouble)}, "expected float16, float32 or float64"),
    "fortran": ({"data": np.asfortranarray(np.zeros((4, 2, 8)))}, "in Fortran order; .*ascontiguousarray"),
    "no channels": ({"data": FLOATS[:, 0]}, r"\(4, 8\); give its one channel a dimension: data\[:, None\]"),
    "four spatial dimensions": ({"data": FLOATS[..., None, None, None]}, "1 to 3 spatial dimensions"),
    "none": ({"data": FLOATS[:0]}, r"data of shape \(0, 2, 8\) hold no samples; give at least one"),
    "pickled": ({"data": np.array([{"a": 1}], object)}, "`data` that cannot be read .*pickled"),
    "pickled labels": (
        {"data": FLOATS, "labels": np.array([None] * 4, object)},
        "`labels` that cannot be read .*pickled",
    ),
    "pickled classes": (
        {"data": FLOATS, "labels": np.zeros(4, int), "classes": np.array(["a", None], object)},
        "`classes` that cannot be read .*pickled",
    ),
    "no data": ({"arr_0": FLOATS}, r"holds no array `data`; save it with numpy.savez"),
    "classes alone": ({"data": FLOATS, "classes": np.array(["a"])}, "`classes` without `labels`"),
    "labels too few": ({"data": FLOATS, "labels": np.zeros(3, int)}, r"labels are int64 \(3,\); expected \(4,\)"),
    "labels float": ({"data": FLOATS, "labels": np.zeros(4)}, r"labels are float64 .*: labels.astype\('int64'\)"),
    "labels words": (
        {"data": FLOATS, "labels": np.array(list("abca"))},
        r": classes, labels = numpy.unique\(labels, return",
    ),
    "labels one-hot": (
        {"data": FLOATS, "labels": np.eye(4, 3, dtype=int)},
        r"labels.argmax\(axis=1\), if each row marks one",
    ),
    "labels in a column": ({"data": FLOATS, "labels": np.zeros((4, 1), int)}, r": labels.ravel\(\)"),
    "label negative": (
        {"data": FLOATS, "labels": np.array([0, 1, -1, 0])},
        "label -1 of sample 2 is outside 0 .. 999999",
    ),
    "label huge": ({"data": FLOATS, "labels": np.array([0, 1 << 63, 0, 0], np.uint64)}, "of sample 1 is outside"),
    "label beyond": (
        {"data": FLOATS, "labels": np.array([0, 1, 0, 2]), "classes": np.array(["a", "b"])},
        "label 2 of sample 3 is outside 0 .. 1",
    ),
    "classes doubled": (
        {"data": FLOATS, "labels": np.zeros(4, int), "classes": np.array(["a", "a"])},
        "names a class twice",
    ),
    "classes numbers": ({"data": FLOATS, "labels": np.zeros(4, int), "classes": np.arange(3)}, "classes are int64"),
    "classes bytes": (
        {"data": FLOATS, "labels": np.zeros(4, int), "classes": np.array([b"a"])},
        r"numpy.array\(names, str\)",
    ),
    "class empty": ({"data": FLOATS, "labels": np.zeros(4, int), "classes": np.array(["a", ""])}, "none of them empty"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_arrays_are_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    arrays, message = OTHERS[kind]
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message) as caught:
        npz_values(tmp_path / "x.npz")
    assert str(caught.value).isprintable()


def test_wrong_headers_of_values_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    shape = (10**6, 8, 8)
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    zipped(tmp_path / "x.npz", {"data.npy": buffer.getvalue() + bytes(500)})
    with pytest.raises(ValueError, match="does not match its"):
        npz_values(tmp_path / "x.npz")
    zipped(tmp_path / "x.npz", {"data.npy": b"no array"})
    with pytest.raises(ValueError, match="`data` that cannot be read"):
        npz_values(tmp_path / "x.npz")


def test_class_names_with_invalid_code_points_are_refused(tmp_path: Path) -> None:
    names = np.array([0x41, 0x7FFFFFFF], np.uint32).view("<U1")
    zipped(
        tmp_path / "x.npz", {"data.npy": npy(FLOATS), "labels.npy": npy(np.zeros(4, int)), "classes.npy": npy(names)}
    )
    with pytest.raises(ValueError, match="classes are not valid text"):
        npz_values(tmp_path / "x.npz")


def test_entry_with_huge_claimed_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, data=FLOATS)
    data = bytearray(path.read_bytes())
    directory = data.rindex(b"PK\x01\x02")
    data[directory + 24 : directory + 28] = (1 << 31).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"it claims to expand to 2147483648 bytes"):
        npz_values(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_values_are_detected(tmp_path: Path, save) -> None:
    """By the checksum of the zip, at the latest when the last sample is read."""
    path = tmp_path / "x.npz"
    save(path, data=np.random.default_rng(0).standard_normal((50, 1, 100)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    source = npz_values(path)
    for _ in range(2):  # a damaged stream is not continued
        with pytest.raises(ValueError, match=r"x.npz is damaged at sample \d+"):
            list(map(source.read, range(50)))


def test_missing_file_and_non_zip_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file .*absent.npz"):
        npz_values(tmp_path / "absent.npz")
    (tmp_path / "x.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match="readable zip"):
        npz_values(tmp_path / "x.npz")


def test_truth_values_are_the_labels_0_and_1(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", data=FLOATS, labels=np.array([True, False, True, True]))
    source = npz_values(tmp_path / "x.npz")
    assert source.labels.tolist() == [1, 0, 1, 1] and source.classes == ("0", "1")


LAST = r"look like pictures with channels last, .* as 8 channels; if so, store data.transpose\(0, 3, 1, 2\)"
NONE = r"look like pictures without channels, and are read as 64 channels; if so, store data\[:, None\]"


@pytest.mark.parametrize(
    ("shape", "said"),
    [((2, 8, 8, 3), LAST), ((2, 3, 8, 8), ""), ((2, 3, 8, 3), ""), ((2, 64, 64), NONE), ((2, 12, 1000), "")],
)
def test_arrays_that_look_like_pictures_without_channels_first_are_said(
    tmp_path: Path, shape: tuple[int, ...], said: str
) -> None:
    np.savez(tmp_path / "x.npz", data=np.zeros(shape, np.float32))
    with pytest.warns(UserWarning, match=said) if said else nullcontext():
        assert npz_values(tmp_path / "x.npz").shape == shape[1:]


def test_single_array_is_refused_with_the_remedy(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", FLOATS)
    with pytest.raises(
        ValueError,
        match=r"x.npy is a single file; save its samples as one npz with numpy.savez\(file, data=..., labels",
    ):
        npz_values(tmp_path / "x.npy")
