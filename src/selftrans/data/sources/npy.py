"""Values that are not pictures, one npy file a sample, in a folder, a zip or tars; the first folder of a name is its class.

Read without pickle. Shape legend: (C, *S) values of a sample, one to three spatial dimensions S.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np

from selftrans.data.sources.clips import open_files
from selftrans.data.sources.decode import Reading
from selftrans.data.sources.npz import MAX_BYTES, ONE_CHANNEL, array_header, check_numbers, without_channels_first
from selftrans.data.sources.source import FileSamples, readable
from selftrans.messages import page, printable

SUFFIXES = frozenset((".npy",))


def npy_values(path: Path, split: str | None, reading: Reading) -> FileSamples:
    """Open a folder, zip, tar or folder of tars of npy files (C, *S); all must have the shape of the first readable one.

    `split` and `reading` as in `open_source`. Raises ValueError for a source without such files.
    """
    files = open_files(path, "arrays", None, split, reading, SUFFIXES)
    if not len(files):
        raise ValueError(
            f"no npy files in {path}: --autoencoder values reads arrays, from npy files or one npz ({page('data.md')})"
        )

    def shape_of(i: int) -> tuple[int, ...]:
        with files.open(i) as file:
            return _header(file)[0]

    first, expected = next(readable(files, shape_of, "sample", path))
    if found := without_channels_first(expected):
        remedy = "data[None]" if found == ONE_CHANNEL else "data.transpose(2, 0, 1)"
        warnings.warn(
            f"{printable(files.name(first))} {expected} looks like a picture {found}, and is read as {expected[0]} channels; "
            f"if so, store {remedy}",
            stacklevel=3,
        )

    def load(_: str, file: BinaryIO) -> np.ndarray:
        shape, dtype = _header(file)
        if shape != expected:
            raise ValueError(f"its shape is {shape}, that of the first file {expected}")
        data = file.read(size := math.prod(shape) * dtype.itemsize)
        if len(data) != size:
            raise ValueError(f"truncated: {len(data)} of {size} bytes of its array")
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which is refused
            return np.frombuffer(data, dtype).reshape(shape).astype(np.float32)

    return FileSamples.of(files, expected, load, "sample")


def _header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape (C, *S) and dtype of a file, which is left at the data. Raises ValueError for another array."""
    shape, fortran, dtype = array_header(file)
    check_numbers(f"it is {dtype} {shape}", shape, dtype, fortran=fortran, samples=False)
    if math.prod(shape) * dtype.itemsize > MAX_BYTES:
        raise ValueError(f"it is {dtype} {shape}; samples of more than {MAX_BYTES} bytes are refused")
    return shape, dtype
