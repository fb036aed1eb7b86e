"""Shards on disk ⇒ moments, labels and, where they are stored, features: memory-mapped, gathered by index.

Shape legend: N batch, M moments channels, (C, H, W) latent, T tokens and D width of the features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selftrans.data import feature_files as features
from selftrans.data.feature_files import Features
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

    def __init__(self, path: Path, manifest: Manifest, moments: dict[str, np.ndarray], labels: np.ndarray) -> None:
        self.path, self.manifest, self.labels = path, manifest, labels  #: labels (len,) int64
        self._moments = moments  # file -> (count, copies, M, H, W)
        self._features: dict[str, np.ndarray] = {}  # file -> (count, copies, T, D), once they are opened
        self._starts = np.cumsum([0] + [shard.count for shard in manifest.shards])[:-1]

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Shards:
        """Open a folder of shards; `verify` reads every byte and compares it with its sha256.

        Raises ValueError, with the remedy, when the manifest is missing or wrong, a shard is missing, of another size
        or (`verify`) of another content, or a label is out of range.
        """
        path = Path(path)
        manifest = Manifest.load(path)
        labels, moments = [np.zeros(0, dtype=np.int64)], {}
        for shard in manifest.shards:
            check_size(path / shard.file, shard.count * manifest.row_bytes)
            check_size(path / shard.labels_file, shard.count * 8)
            shape = (shard.count, *manifest.moments_shape)
            moments[shard.file] = _map(path / shard.file, NUMBERS[manifest.dtype][1], shape)
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
        return self._gather(self._moments, rows, "moments"), torch.from_numpy(self.labels[rows])

    def open_features(self) -> Features:
        """What the stored features are of; from now on `read_features` gives them.

        Raises ValueError when there are none (`prepare --features` makes them), or they do not belong to these shards.
        """
        manifest, path = self.manifest, self.path / features.FILE
        if not path.exists():
            raise ValueError(f"{self.path} holds no features; repeat its `selftrans prepare`, with --features MODEL")
        try:
            found = Features.load(path)
            found.check(manifest)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}; delete the file and {REMEDY}, with --features") from error
        for file in found.files:
            check_size(self.path / file.name, file.count * found.row_bytes(manifest))
        shape = (manifest.copies, found.grid**2, found.width)
        self._features = {file.name: _map(self.path / file.name, "<f2", (file.count, *shape)) for file in found.files}
        return found

    def read_features(self, indices: np.ndarray) -> Tensor:
        """Features (N, copies, T, D) float16 of `indices` (N,), in their order. Raises ValueError as `read` does."""
        assert self._features, "open_features comes first"
        return self._gather(self._features, np.asarray(indices, dtype=np.int64).reshape(-1), "features")

    def verify(self) -> None:
        """Compare the sha256 of every file with the manifest. Raises ValueError naming the first that differs."""
        for name in self.damaged():
            raise ValueError(f"shard {self.path / name} fails its sha256; delete the file and {REMEDY}")

    def damaged(self, *, stored_features: bool = True) -> Iterator[str]:
        """Names of the files whose content is not that of the manifest; reads every byte."""
        expected: dict[str, str] = {}
        for shard in self.manifest.shards:
            expected |= {shard.file: shard.sha256, shard.labels_file: shard.labels_sha256}
        if stored_features and (self.path / features.FILE).exists():
            expected |= {file.name: file.sha256 for file in self.open_features().files}
        for name, sha256 in expected.items():
            if _sha256(self.path / name) != sha256:
                yield name

    def _gather(self, held: dict[str, np.ndarray], rows: np.ndarray, what: str) -> Tensor:
        """Rows (N,) of what the shards hold. Raises ValueError for an index out of range, and for NaN."""
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise ValueError(f"indices {rows.min()} .. {rows.max()} leave the {len(self)} pictures of {self.path}")
        which = np.searchsorted(self._starts, rows, side="right") - 1
        files = list(held.values())
        dtype, _, bits, infinity = NUMBERS[files[0].dtype.name]
        out = torch.empty((len(rows), *files[0].shape[1:]), dtype=dtype)
        view = out.numpy()  # numpy gathers on this thread alone: cores are left to the step that runs meanwhile
        for k in np.unique(which):
            at = np.flatnonzero(which == k)
            view[at] = files[k][rows[at] - self._starts[k]]
        sign = np.array(1 << (8 * view.itemsize - 1), dtype=bits)
        # magnitudes compared as integers: exact, and many times faster than isfinite on half precision
        magnitude = view.view(bits) & ~sign
        if magnitude.max(initial=0) >= infinity:
            index = int(np.argmax(magnitude.reshape(len(rows), -1).max(axis=1) >= infinity))
            k = which[index]
            raise ValueError(
                f"shard {self.path / list(held)[k]} holds NaN or infinite {what} for picture {rows[index]} "
                f"(row {rows[index] - self._starts[k]} of the shard); delete the file and {REMEDY}"
            )
        return out


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
