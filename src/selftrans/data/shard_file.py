"""A shard is a safetensors file of named tensors, rows first; it is written row by row and read memory-mapped.

    shard-00000.safetensors      moments (count, copies, M, *S) float16 or float32;  labels (count,) int64
    features-00000.safetensors   features (count, copies, T, D) float16
Data with captions have more tensors in a shard (see `manifest_text`), and their empty caption in null.safetensors.
A `Layout` lists the tensors of a file, with the dtype and shape of one row of each. The header is padded with spaces, as
the format allows, so that the data start at a page boundary. Shape legend: M moments channels, S spatial dimensions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from selftrans.messages import first_line
from selftrans.storage import atomic_write

#: name of a tensor -> dtype (a key of DTYPES) and shape of one row
Layout: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]

#: name -> safetensors name
DTYPES = {"float16": "F16", "float32": "F32", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "uint8": "U8"}
VIEWS = {"bfloat16": "int16"}  #: dtype that numpy lacks -> the dtype of arrays that hold its bits
#: torch dtype, integer type of the same size, and bit pattern of infinity: NaN is above it, finite numbers below (IEEE 754)
NUMBERS = {
    "float16": (torch.float16, "<u2", 0x7C00),
    "bfloat16": (torch.bfloat16, "<u2", 0x7F80),
    "float32": (torch.float32, "<u4", 0x7F800000),
}
PAGE = 4096  #: bytes
CHUNK = 1 << 24  #: bytes copied at a time
REMEDY = "repeat the `selftrans prepare` that made the folder to restore it"
WRITE_REMEDY = "free disk space or choose another --out, then repeat: finished shards are kept"


def numpy_dtype(name: str) -> np.dtype:
    """The dtype of arrays that hold a tensor of this dtype of DTYPES."""
    return np.dtype(VIEWS.get(name, name))


def row_bytes(layout: Layout) -> int:
    """Bytes of one row of all tensors."""
    return sum(_bytes(*row) for row in layout.values())


def stored(values: Tensor, dtype: str, too_large: Callable[[int], str]) -> np.ndarray:
    """Values (N, ...) in a dtype of NUMBERS, bfloat16 as the int16 of the same bits.

    Raises ValueError when some are beyond its range, with what `too_large` says of the first such row.
    """
    numbers = values.to(NUMBERS[dtype][0])
    finite = torch.isfinite(numbers).flatten(start_dim=1).all(dim=1)
    if not finite.all():
        raise ValueError(too_large(int((~finite).nonzero()[0])))
    return (numbers.view(getattr(torch, VIEWS[dtype])) if dtype in VIEWS else numbers).cpu().numpy()


def open_tensors(path: Path, layout: Layout, count: int) -> dict[str, np.ndarray]:
    """The tensors of a shard, each (count, *row shape), as read-only views of the mapped file; no data are read yet.

    Raises ValueError, with the remedy, when the file is missing or is not a safetensors file of exactly these tensors.
    """
    if not path.is_file():
        raise ValueError(f"shard {path} is missing; {REMEDY}")
    tensors: dict[str, np.ndarray] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name, (dtype, shape) in layout.items():
                stored = file.get_slice(name)
                if (stored.get_dtype(), stored.get_shape()) != (DTYPES[dtype], [count, *shape]):
                    actual = f"{stored.get_dtype()} {tuple(stored.get_shape())}"
                    expected = f"{DTYPES[dtype]} {(count, *shape)}"
                    raise ValueError(f"its {name} are {actual}, the manifest expects {expected}")
                tensor = file.get_tensor(name)
                tensors[name] = (tensor.view(getattr(torch, VIEWS[dtype])) if dtype in VIEWS else tensor).numpy()
                tensors[name].flags.writeable = False
            if extra := sorted(set(file.keys()) - set(layout)):
                raise ValueError(f"it also holds {extra[0]!r:.60}")
    except Exception as error:  # from safetensors, torch or the system: the file does not match the manifest
        raise ValueError(f"shard {path} cannot be used ({first_line(error, 300)}); {REMEDY}") from error
    return tensors


def is_valid(path: Path, layout: Layout, count: int) -> bool:
    """Whether `open_tensors` succeeds; the data are not read."""
    try:
        open_tensors(path, layout, count)
    except ValueError:
        return False
    return True


class ShardWriter:
    """Appends rows to a shard, which is finished when `write_shard` ends."""

    def __init__(self, file: BinaryIO, layout: Layout, most: int) -> None:
        # tensors with wide dtypes first, so that every value is aligned to its size
        order = sorted(layout, key=lambda name: (-numpy_dtype(layout[name][0]).itemsize, name))
        self.count = 0  #: rows written
        self._file, self._most = file, most
        self._layout = {name: layout[name] for name in order}
        unpadded = 8 + len(json.dumps(self._header(most)))
        self._start = -(-unpadded // PAGE) * PAGE  # offset of the data

    def write(self, rows: Mapping[str, np.ndarray]) -> None:
        """Append rows: for each tensor of the layout an array (n, *row shape) in its dtype."""
        n = len(next(iter(rows.values())))
        assert rows.keys() == self._layout.keys() and self.count + n <= self._most
        for name, (begin, _) in self._spans(self._most).items():
            dtype, shape = self._layout[name]
            values = np.ascontiguousarray(rows[name], dtype=numpy_dtype(dtype).newbyteorder("<"))
            assert rows[name].dtype == numpy_dtype(dtype) and values.shape == (n, *shape), (
                f"{name} of another dtype or shape"
            )
            self._file.seek(self._start + begin + self.count * _bytes(dtype, shape))
            self._file.write(values.data)
        self.count += n

    def finish(self) -> None:
        """Close the gaps that skipped rows left, and write the header."""
        self._file.flush()
        spans, final = self._spans(self._most), self._spans(self.count)
        if self.count < self._most:
            with open(self._file.name, "rb") as written:
                for name, (begin, end) in final.items():
                    self._move(written, spans[name][0], begin, end - begin)
        self._file.truncate(self._start + max((end for _, end in final.values()), default=0))
        header = json.dumps(self._header(self.count)).encode().ljust(self._start - 8)
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)

    def _move(self, written: BinaryIO, source: int, target: int, size: int) -> None:
        """Move bytes towards the start of the file."""
        for done in range(0, size if source != target else 0, CHUNK):
            written.seek(self._start + source + done)
            self._file.seek(self._start + target + done)
            self._file.write(written.read(min(CHUNK, size - done)))

    def _spans(self, count: int) -> dict[str, tuple[int, int]]:
        """Begin and end of each tensor, in bytes after the header, with `count` rows."""
        spans, at = {}, 0
        for name, row in self._layout.items():
            spans[name] = (at, at + count * _bytes(*row))
            at = spans[name][1]
        return spans

    def _header(self, count: int) -> dict[str, object]:
        return {
            name: {"dtype": DTYPES[dtype], "shape": [count, *shape], "data_offsets": list(self._spans(count)[name])}
            for name, (dtype, shape) in self._layout.items()
        }


@contextmanager
def write_shard(path: Path, layout: Layout, most: int) -> Iterator[ShardWriter]:
    """Write a shard of at most `most` rows; after an error, an existing file at `path` is unchanged.

    Raises ValueError when it cannot be written.
    """
    with atomic_write(path, remedy=WRITE_REMEDY) as file:
        writer = ShardWriter(file, layout, most)
        yield writer
        writer.finish()


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * numpy_dtype(dtype).itemsize
