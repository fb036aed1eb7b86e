"""Values that are not pictures, one npy file a sample, in a folder, a zip or tars; the first folder of a name is its class.

Read without pickle. Shape legend: (C, *S) values of a sample, one to three spatial dimensions S.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np

from selftrans.data.sources.clips import open_files
from selftrans.data.sources.decode import BadSample, Reading, none_readable, unreadable
from selftrans.data.sources.npz import MAX_BYTES, ONE_CHANNEL, array_header, check_numbers, without_channels_first
from selftrans.data.sources.source import Samples, Source
from selftrans.messages import page, printable

SUFFIXES = frozenset((".npy",))


@dataclass(frozen=True, eq=False)
class NpyFiles(Samples):
    """Arrays of one shape; made by `npy_values`."""

    source: Source = field(repr=False)  #: the files
    shape: tuple[int, ...]  #: (C, *S) of a sample

    def name(self, i: int) -> str:
        return self.source.name(i)

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def read(self, i: int) -> np.ndarray:
        """Sample i: (C, *S) float32. Raises BadSample for a file of another shape, and for values that are not finite."""
        name = self.name(i)
        if i in self.faults:
            raise BadSample(name, self.faults[i])
        try:
            with self.source.open(i) as file:
                shape, dtype = _header(file)
                if shape != self.shape:
                    raise ValueError(f"its shape is {shape}, that of the first file {self.shape}")
                data = file.read(size := math.prod(shape) * dtype.itemsize)
            if len(data) != size:
                raise ValueError(f"truncated: {len(data)} of {size} bytes of its array")
            with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is refused below
                values = np.frombuffer(data, dtype).reshape(shape).astype(np.float32)
            if not np.isfinite(values).all():
                raise ValueError("NaN, infinite, or beyond float32")
        except Exception as error:  # the type depends on the damage
            raise unreadable(name, error, "sample") from error
        return values


def npy_values(path: Path, split: str | None, reading: Reading) -> NpyFiles:
    """Open a folder, zip, tar or folder of tars of npy files (C, *S); all must have the shape of the first readable one.

    `split` and `reading` as in `open_source`. Raises ValueError for a source without such files.
    """
    files = open_files(path, "arrays", None, split, reading, SUFFIXES)
    if not len(files):
        raise ValueError(
            f"no npy files in {path}: --autoencoder values reads arrays, from npy files or one npz ({page('data.md')})"
        )
    of_files = {each.name: getattr(files, each.name) for each in fields(Samples)}
    first: Exception | None = None
    for i in range(len(files)):
        try:
            with files.open(i) as file:
                shape, _ = _header(file)
        except Exception as error:  # reported when the file is read
            first = first or unreadable(files.name(i), error, "sample")
            continue
        if found := without_channels_first(shape):
            remedy = "data[None]" if found == ONE_CHANNEL else "data.transpose(2, 0, 1)"
            warnings.warn(
                f"{printable(files.name(i))} {shape} looks like a picture {found}, and is read as {shape[0]} channels; if so, "
                f"store {remedy}",
                stacklevel=3,
            )
        return NpyFiles(files, shape, **of_files)
    raise ValueError(none_readable(len(files), "sample", path, first))


def _header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape (C, *S) and dtype of a file, which is left at the data. Raises ValueError for another array."""
    shape, fortran, dtype = array_header(file)
    check_numbers(f"it is {dtype} {shape}", shape, dtype, fortran=fortran, samples=False)
    if math.prod(shape) * dtype.itemsize > MAX_BYTES:
        raise ValueError(f"it is {dtype} {shape}; samples of more than {MAX_BYTES} bytes are refused")
    return shape, dtype
