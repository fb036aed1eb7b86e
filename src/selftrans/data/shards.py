"""Shards on disk ⇒ moments and labels: memory-mapped, gathered by index.

Shape legend: N batch, M moments channels, (C, H, W) latent.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selftrans.data.manifest import Manifest, Shard

__all__ = ["Manifest", "Shard", "Shards"]

#: dtype in memory, of its bits, and the bits of infinity: NaN is above, finite numbers below (IEEE 754)
NUMBERS = {
    "float16": (torch.float16, "<f2", "<u2", 0x7C00),
    "float32": (torch.float32, "<f4", "<u4", 0x7F800000),
}
REMEDY = "repeat the `selftrans prepare` that made the folder to restore it"


class Shards:
    """Prepared moments, read by position 0 .. len - 1; opened by `Shards.open`. Reading is safe from any thread."""

    def __init__(self, path: Path, manifest: Manifest, moments: list[np.ndarray], labels: np.ndarray) -> None:
        self.path, self.manifest, self.labels = path, manifest, labels  #: labels (len,) int64
        self._moments = moments  # of each shard (count, copies, M, H, W)
        self._starts = np.cumsum([0] + [shard.count for shard in manifest.shards])[:-1]

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Shards:
        """Open a folder of shards; `verify` reads every byte and compares it with its sha256.

        Raises ValueError, with the remedy, when the manifest is missing or wrong, a shard is missing, of another size
        or (`verify`) of another content, or a label is out of range.
        """
        path = Path(path)
        manifest = Manifest.load(path)
        labels, moments = [np.zeros(0, dtype=np.int64)], []
        for shard in manifest.shards:
            check_size(path / shard.file, shard.count * manifest.row_bytes)
            check_size(path / shard.labels_file, shard.count * 8)
            moments.append(_map(path / shard.file, NUMBERS[manifest.dtype][1], (shard.count, *manifest.moments_shape)))
            labels.append(_read_labels(path / shard.labels_file, max(manifest.num_classes, 1)))
        shards = cls(path, manifest, moments, np.concatenate(labels))
        if verify:
            shards.verify()
        return shards

    def __len__(self) -> int:
        return self.manifest.count

    def __reduce__(self) -> tuple[Any, ...]:
        # a worker process opens the files itself; the mapped numbers must not travel
        return Shards.open, (self.path,)

    def read(self, indices: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Moments (N, copies, M, H, W) in the stored dtype and labels (N,) int64 of `indices` (N,), in their order.

        Raises ValueError for an index out of range, and for moments that are not finite (naming shard and index).
        """
        if isinstance(indices, Tensor):
            indices = indices.cpu().numpy()
        rows = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise ValueError(f"indices {rows.min()} .. {rows.max()} leave the {len(self)} pictures of {self.path}")
        which = np.searchsorted(self._starts, rows, side="right") - 1
        out = torch.empty((len(rows), *self.manifest.moments_shape), dtype=NUMBERS[self.manifest.dtype][0])
        view = out.numpy()  # numpy gathers on this thread alone: cores are left to the step that runs meanwhile
        for k in np.unique(which):
            at = np.flatnonzero(which == k)
            view[at] = self._moments[k][rows[at] - self._starts[k]]
        self._check_finite(view, rows)
        return out, torch.from_numpy(self.labels[rows])

    def verify(self) -> None:
        """Compare the sha256 of every file with the manifest. Raises ValueError naming the first that differs."""
        for shard in self.manifest.shards:
            for name, expected in ((shard.file, shard.sha256), (shard.labels_file, shard.labels_sha256)):
                if _sha256(self.path / name) != expected:
                    raise ValueError(f"shard {self.path / name} fails its sha256; delete the file and {REMEDY}")

    def _check_finite(self, moments: np.ndarray, rows: np.ndarray) -> None:
        _, _, bits, infinity = NUMBERS[self.manifest.dtype]
        sign = np.array(1 << (8 * moments.itemsize - 1), dtype=bits)
        # magnitudes compared as integers: exact, and many times faster than isfinite on half precision
        magnitude = moments.view(bits) & ~sign
        if magnitude.max(initial=0) < infinity:
            return
        index = int(rows[np.argmax(magnitude.reshape(len(rows), -1).max(axis=1) >= infinity)])
        k = int(np.searchsorted(self._starts, index, side="right")) - 1
        raise ValueError(
            f"shard {self.path / self.manifest.shards[k].file} holds NaN or infinite moments for picture {index} "
            f"(row {index - self._starts[k]} of the shard); delete the file and {REMEDY}"
        )


def check_size(path: Path, size: int) -> None:
    """Raise ValueError unless `path` is a file of `size` bytes."""
    try:
        found = path.stat().st_size if path.is_file() else None
    except OSError as error:
        raise ValueError(f"shard {path} cannot be read ({error.strerror}); {REMEDY}") from error
    if found is None:
        raise ValueError(f"shard {path} is missing; {REMEDY}")
    if found != size:
        raise ValueError(f"shard {path} has {found} bytes where its manifest says {size}; {REMEDY}")


def _map(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """A read-only view of a file that has been checked to have this size."""
    if not shape[0]:
        return np.empty(shape, dtype=dtype)  # an empty file cannot be mapped
    try:
        return np.memmap(path, dtype=dtype, mode="r", shape=shape)
    except (OSError, ValueError) as error:
        raise ValueError(f"shard {path} cannot be mapped into memory ({error})") from error


def _read_labels(path: Path, classes: int) -> np.ndarray:
    """(count,) int64. Raises ValueError for a label outside 0 .. classes - 1."""
    labels = np.fromfile(path, dtype="<i8").astype(np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise ValueError(
            f"shard {path} has label {labels[wrong[0]]} at row {wrong[0]}, outside 0 .. {classes - 1}; "
            f"delete the file and {REMEDY}"
        )
    return labels


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
