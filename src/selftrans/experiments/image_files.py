"""Files ⇒ batches of images: pictures as they are stored, arrays of an npz, or prepared data as its autoencoder decodes it.

Shape legend: pictures uint8 (n, H, W, C); arrays that are no pictures float32 (n, C, *S).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from numpy.lib import format as npy

from selftrans.data.dataset import Shards
from selftrans.data.decoded import decoded_images
from selftrans.data.sources.open_source import iter_images
from selftrans.storage import first_line

MAX_ARRAY_BYTES = 1 << 26  #: of one array of an npz


def open_images(path: Path) -> Iterator[np.ndarray]:
    """Images of a folder, zip or npz, or of prepared data, in batches. Raises ValueError for anything else."""
    if (path / "manifest.json").exists():
        return decoded_images(Shards.open(path))
    if path.suffix.lower() == ".npz" and (shape := _array_shape(path)):
        return _arrays(path, shape)
    return iter_images(path)


def _array_shape(path: Path) -> tuple[int, ...] | None:
    """Shape (n, C, *S) of a float32 `arr_0` of an npz; None where it is something else, which `iter_images` explains."""
    try:
        with ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            size = archive.getinfo("arr_0.npy").file_size
            npy.read_magic(file)
            shape, fortran, dtype = npy.read_array_header_1_0(file)
            fits = file.tell() + math.prod(shape) * 4 == size and 4 * math.prod(shape[1:]) <= MAX_ARRAY_BYTES
    except Exception:  # a damaged zip or header raises almost anything
        return None
    return (
        shape if dtype == np.dtype("<f4") and not fortran and 3 <= len(shape) <= 5 and min(shape) > 0 and fits else None
    )


def _arrays(path: Path, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Stream `arr_0`, one batch in memory at a time. Raises ValueError where it is damaged, or not finite."""
    rows, row_bytes = max(1, min(256, MAX_ARRAY_BYTES // (4 * math.prod(shape[1:])))), 4 * math.prod(shape[1:])
    with ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        npy.read_magic(file)
        npy.read_array_header_1_0(file)
        for start in range(0, shape[0], rows):
            count = min(rows, shape[0] - start)
            try:
                batch = np.frombuffer(file.read(count * row_bytes), dtype="<f4").reshape(count, *shape[1:])
            except Exception as error:  # as many kinds as there are kinds of damage
                raise ValueError(f"{path} is damaged at image {start} ({first_line(error)}); make it again") from error
            if not np.isfinite(batch).all():
                raise ValueError(f"{path} holds numbers that are not finite in images {start} to {start + count - 1}")
            yield batch.astype(np.float32)
