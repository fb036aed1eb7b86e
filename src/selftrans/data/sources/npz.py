"""Arrays in npz files: images or samples (`arr_0`) with labels (`arr_1`), and values that are not pictures (`data`).

Read without pickle, one batch at a time; array headers are checked against the size of the array data.
Shape legend: (n, H, W, C) images, N samples of shape (C, *S), one to three spatial dimensions S.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO
from zipfile import ZipFile

import numpy as np

from selftrans.data.sources.decode import BadSample, fault_of
from selftrans.data.sources.source import MAX_CLASSES, MAX_PICTURE_BYTES, NOT_FINITE, InOrder, Samples
from selftrans.data.sources.zip_archive import open_zip
from selftrans.messages import first_line

MAX_BYTES = 1 << 30  #: of labels or class names, and of one sample
ONE_CHANNEL = "without channels"  #: an array (H, W)
MAX_HEADER = 10_000  #: bytes of the header of an array, as numpy's limit
EXPANSION = 1100  #: an entry holds at most this many bytes per byte of its zip (deflate reaches 1032)
CHUNK = 1 << 24  #: bytes skipped at a time


def npz_samples(path: Path, batch_size: int) -> Iterator[np.ndarray]:
    """Stream `arr_0` of an npz, one batch in memory at a time: images uint8 (n, H, W, C), or other samples float32 (n, C, *S).

    Raises ValueError for an npz without such an array, a damaged one, and samples that are not finite.
    """
    with open_zip(path) as archive:
        try:
            info = archive.getinfo("arr_0.npy")
            file = archive.open(info)
            shape, dtype = _samples_header(file, info.file_size)
        except Exception as error:  # any fault of an untrusted header has the same remedy
            raise ValueError(
                f"{path} holds no uint8 array arr_0 of images (N, H, W, C), and no float32 one of samples (N, C, ...): "
                f"{error!s:.200}"
            ) from error
        size = math.prod(shape[1:]) * dtype.itemsize
        rows = min(batch_size, MAX_PICTURE_BYTES // size)
        with file:
            for start in range(0, shape[0], rows):
                count = min(rows, shape[0] - start)
                data = _read_exactly(file, count * size, path, f"sample {start}")
                values = np.frombuffer(data, dtype).reshape(count, *shape[1:])
                if dtype.kind == "f" and not np.isfinite(values).all():
                    raise ValueError(
                        f"{path} holds numbers that are not finite in samples {start} to {start + count - 1}"
                    )
                yield values.copy()


def npz_labels(path: Path) -> np.ndarray | None:
    """Labels (n,) int64 of the images of an npz: its `arr_1`, as ADM names it, if that is a 1-D array of integers.

    None without it, and when all labels are 0, as for data without classes. ValueError unless there is one per image.
    """
    with open_zip(path) as archive:
        if not {"arr_0.npy", "arr_1.npy"} <= set(archive.namelist()):
            return None
        try:
            info = archive.getinfo("arr_0.npy")
            with archive.open(info) as images:
                (count, *_), dtype = _samples_header(images, info.file_size)
            if dtype != np.uint8:
                return None
        except Exception:
            return None  # `npz_samples` reports the fault
        labels = _small_array(archive, path, "arr_1")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        return None
    if len(labels) != count:
        said = f"holds labels arr_1 that do not fit its images: {len(labels)} labels of {count} images"
        raise ValueError(f"{path} {said}")
    return labels.astype(np.int64) if labels.any() else None


@dataclass(frozen=True, eq=False)
class NpzValues(Samples):
    """Float values `data` (N, C, *S) of an npz, with `labels` and `classes` if it has them; see `npz_values`.

    Samples are read from a stream: ascending order is fast, going back restarts the stream.
    """

    path: Path
    shape: tuple[int, ...]  #: (C, *S) of a sample
    dtype: np.dtype
    crc: int  #: checksum of the array, from the zip's directory

    def name(self, i: int) -> str:
        return f"sample {i} of {self.path.name}"

    def read(self, i: int) -> np.ndarray:
        """Sample i: (C, *S) float32. Raises BadSample for values that are not finite, ValueError for a damaged file."""
        data = self._stream(i)
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is refused below
            values = np.frombuffer(data, self.dtype).reshape(self.shape).astype(np.float32)
        if not np.isfinite(values).all():
            raise BadSample(self.name(i), NOT_FINITE)
        return values

    @cached_property
    def fingerprint(self) -> str:
        """Hash of shape, dtype, checksum, labels and classes."""
        about = f"{len(self)} {self.shape} {self.dtype.str} {self.crc}\0" + "\0".join(self.classes)
        digest = hashlib.sha256(about.encode(errors="surrogatepass"))
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    @cached_property
    def _stream(self) -> InOrder:
        return InOrder(self._samples, far=math.inf)

    def _samples(self, start: int) -> Iterator[bytes]:
        """The bytes of each sample, from number `start` on."""
        size = math.prod(self.shape) * self.dtype.itemsize
        with open_zip(self.path) as archive, archive.open("data.npy") as file:
            array_header(file)
            left = start * size
            while left:
                left -= len(_read_exactly(file, min(left, CHUNK), self.path, f"a sample before {start}"))
            for i in range(start, len(self)):
                yield _read_exactly(file, size, self.path, f"sample {i}")


def npz_values(path: Path) -> NpzValues:
    """Open an npz of values: `data` (N, C, *S) float16, 32 or 64, or integers of 16 bits; optionally `labels` (N,),
    integers from 0, and `classes`, the names of the labels (default: "0", "1", ... up to the highest label).

    Raises ValueError, with the remedy, for any other array, also a pickled one, and for labels that do not match.
    """
    if not path.is_file():
        raise ValueError(
            f"no file {path}: autoencoder values reads an npz with an array `data`, or a folder of npy files"
        )
    if path.suffix.lower() == ".npy":
        raise ValueError(
            f"{path} is a single file; save its samples as one npz with numpy.savez(file, data=..., labels=...), or give the "
            "folder of files with one sample each"
        )
    with open_zip(path) as archive:
        names = set(archive.namelist())
        if "data.npy" not in names:
            raise ValueError(f"{path} holds no array `data`; save it with numpy.savez(file, data=..., labels=...)")
        info = archive.getinfo("data.npy")
        with _member(archive, path, "data") as file:
            shape, dtype = _values_header(file, path, info.file_size)
        if "labels.npy" not in names:
            if "classes.npy" in names:
                raise ValueError(f"{path} holds `classes` without `labels`; add labels, or leave the classes out")
            labels, classes = np.zeros(shape[0], np.int64), tuple[str, ...]()
        else:
            labels, classes = _labels(archive, path, shape[0], "classes.npy" in names)
    if found := without_channels_first(shape[1:]):
        remedy = "data[:, None]" if found == ONE_CHANNEL else "data.transpose(0, 3, 1, 2)"
        warnings.warn(
            f"{path}: data {shape} look like pictures {found}, and are read as {shape[1]} channels; if so, store {remedy}",
            stacklevel=3,
        )
    return NpzValues(path, shape[1:], dtype, info.CRC, labels=labels, classes=classes, in_order=True)


def without_channels_first(shape: tuple[int, ...]) -> str:
    """How a sample of this shape looks like a picture that is not (C, H, W): a square one (H, W, C), or one (H, W) of an
    ordinary aspect ratio; empty where it does not."""
    if len(shape) == 3 and shape[2] in (1, 3, 4) and shape[0] == shape[1] > 4:
        return "with channels last"
    return ONE_CHANNEL if len(shape) == 2 and min(shape) > 4 and max(shape) <= 2 * min(shape) else ""


def _values_header(file: IO[bytes], path: Path, size: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape (N, C, *S) and dtype of `data`, a member of `size` bytes."""
    shape, fortran, dtype = array_header(file)
    if shape and shape[0] == 0:
        raise ValueError(f"{path}: data of shape {shape} hold no samples; give at least one")
    described = f"{path}: data is {dtype} {shape}{' in Fortran order' if fortran else ''}"
    check_numbers(described, shape, dtype, fortran=fortran, samples=True)
    if file.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{described}, which does not match its {size} bytes; save it again")
    if math.prod(shape[1:]) * dtype.itemsize > MAX_BYTES:
        raise ValueError(f"{described}; samples of more than {MAX_BYTES} bytes are refused")
    return shape, dtype


def check_numbers(described: str, shape: tuple[int, ...], dtype: np.dtype, *, fortran: bool, samples: bool) -> None:
    """Raise ValueError, with the remedy, unless an array has numbers that float32 holds, of one to three spatial dimensions.

    described: the array, in the message. samples: it holds several, (N, C, *S), else one, (C, *S).
    """
    floats = dtype.kind == "f" and dtype.itemsize <= 8
    words = dtype.kind in "iu" and dtype.itemsize == 2  # as satellites and scanners count; float32 holds them exactly
    dims = len(shape) - samples
    if (floats or words) and 2 <= dims <= 4 and min(shape) >= 1 and not fortran:
        return
    remedy = "convert it with numpy.ascontiguousarray(data, dtype='float32')"
    if dtype.kind == "c":
        remedy = (
            f"store real and imaginary part as channels: numpy.concatenate([data.real, data.imag], axis={int(samples)})"
        )
    elif dims == 1 and min(shape) >= 1:
        remedy = f"give its one channel a dimension: {'data[:, None]' if samples else 'data[None]'}"
    elif dims > 4:
        remedy = "join dimensions with numpy.reshape, for example as channels"
    n = "N, " if samples else ""
    raise ValueError(
        f"{described}; {remedy} (expected float16, float32 or float64, or integers of 16 bits, of shape ({n}channels, 1 to 3 "
        "spatial dimensions), in C order)"
    )


def _labels(archive: ZipFile, path: Path, count: int, named: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels (N,) int64 and the names of the classes."""
    stored = _small_array(archive, path, "labels")
    if stored.dtype.kind not in "biu" or stored.shape != (count,):
        raise ValueError(
            f"{path}: labels are {stored.dtype} {stored.shape}; expected ({count},) integers, one per sample"
            f"{_remedy(stored, count)}"
        )
    if int(stored.min()) < 0 or int(stored.max()) >= MAX_CLASSES:
        wrong = int(np.argmax((stored < 0) | (stored >= MAX_CLASSES)))
        raise ValueError(
            f"{path}: label {stored[wrong]} of sample {wrong} is outside 0 .. {MAX_CLASSES - 1}; give each sample a class, or "
            "leave it out"
        )
    labels = stored.astype(np.int64)
    if not named:
        return labels, tuple(str(k) for k in range(int(labels.max()) + 1))
    classes = _class_names(_small_array(archive, path, "classes"), path)
    if len(set(classes)) != len(classes):
        raise ValueError(f"{path}: classes names a class twice; give each its own name")
    if labels.max() >= len(classes):
        wrong = int(np.argmax(labels >= len(classes)))
        raise ValueError(f"{path}: label {labels[wrong]} of sample {wrong} is outside 0 .. {len(classes) - 1}")
    return labels, classes


def _remedy(labels: np.ndarray, count: int) -> str:
    """How labels of another kind become integers; empty where that is unclear."""
    if labels.shape == (count,) and labels.dtype.kind in "SU":
        return ": classes, labels = numpy.unique(labels, return_inverse=True)"
    if labels.shape == (count,) and labels.dtype.kind == "f":
        return ": labels.astype('int64')"
    if labels.ndim == 2 and len(labels) == count:
        return ": labels.ravel()" if labels.shape[1] == 1 else ": labels.argmax(axis=1), if each row marks one class"
    return ""


def _class_names(names: np.ndarray, path: Path) -> tuple[str, ...]:
    try:
        classes = tuple(names.tolist())
    except Exception as error:  # numpy raises SystemError for invalid code points
        raise ValueError(f"{path}: classes are not valid text ({first_line(error)})") from error
    if names.dtype.kind != "U" or names.ndim != 1 or not all(classes):
        raise ValueError(
            f"{path}: classes are {names.dtype} {names.shape}; expected a list of names, none of them empty: "
            "numpy.array(names, str)"
        )
    return classes


def _small_array(archive: ZipFile, path: Path, name: str) -> np.ndarray:
    """Read a complete array. Raises ValueError when it is pickled, too large or damaged."""
    with _member(archive, path, name) as file:
        shape, fortran, dtype = array_header(file)
        size = math.prod(shape) * dtype.itemsize
        if size > MAX_BYTES or fortran:
            raise ValueError(f"{path}: {name} of {dtype} {shape} is too large, or in Fortran order; save it again")
        return np.frombuffer(_read_exactly(file, size, path, name), dtype).reshape(shape)


@contextmanager
def _member(archive: ZipFile, path: Path, name: str) -> Iterator[IO[bytes]]:
    """An open array of an npz. Every exception of its header and of the zip becomes a ValueError of one line."""
    with fault_of(path, f"holds an array `{name}` that cannot be read", "save it again"):
        size, most = archive.getinfo(f"{name}.npy").file_size, EXPANSION * path.stat().st_size
        if size > most:
            raise ValueError(f"it claims to expand to {size} bytes, more than a zip of this size can hold")
        with archive.open(f"{name}.npy") as file:
            yield file


def _read_exactly(file: IO[bytes], size: int, path: Path, where: str) -> bytes:
    """The next `size` bytes of a member. Raises ValueError when it is damaged or truncated."""
    with fault_of(path, f"is damaged at {where}", "make it again"):
        data = file.read(size)
    if len(data) != size:
        raise ValueError(f"{path} is truncated at {where}; make it again")
    return data


def array_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an array; leaves `file` at the data. Raises ValueError for pickled objects."""
    version = np.lib.format.read_magic(file)
    size = file.read(2 if version == (1, 0) else 4)
    if (length := int.from_bytes(size, "little")) > MAX_HEADER:  # numpy would read it as a whole, before it refuses it
        raise ValueError(f"its header claims {length} bytes")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(io.BytesIO(size + file.read(length)))
    if dtype.hasobject:
        raise ValueError("it is pickled, and pickles are never read: give it a dtype, as numpy.array(x, dtype=str)")
    return shape, fortran, dtype


def _samples_header(file: IO[bytes], size: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of images or other samples, in the header of a member of `size` bytes; leaves `file` at the first one."""
    shape, fortran, dtype = array_header(file)
    images = dtype == np.uint8 and len(shape) == 4 and shape[3] in (1, 3)
    if fortran or not (images or (dtype == np.dtype("<f4") and 3 <= len(shape) <= 5)):
        raise ValueError(f"it is {dtype} {shape}{' in Fortran order' if fortran else ''}")
    if min(shape) < 1 or file.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"shape {shape} does not match its {size} bytes")
    if math.prod(shape[1:]) * dtype.itemsize > MAX_PICTURE_BYTES:
        raise ValueError(f"samples of {shape[1:]} are larger than {MAX_PICTURE_BYTES} bytes")
    return shape, dtype
