"""Prepared data on disk => named tensors, memory-mapped and gathered by row.

Shape legend: N batch, M moments channels, (C, *S) latent, T tokens and D width of the features.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selftrans.data.manifest import Features, Manifest, Shard
from selftrans.data.shard_file import REMEDY, open_tensors
from selftrans.storage import sha256_file
from selftrans.types import Cond

__all__ = ["Dataset", "Manifest", "Shard"]

#: torch dtype, integer type of the same size, and bit pattern of infinity: NaN is above it, finite numbers below (IEEE 754)
NUMBERS = {
    "float16": (torch.float16, "<u2", 0x7C00),
    "float32": (torch.float32, "<u4", 0x7F800000),
}


class Dataset:
    """Prepared data, read by position 0 .. len - 1; opened by `Dataset.open`. Reading is safe from any thread."""

    def __init__(
        self, path: Path, manifest: Manifest, tensors: dict[str, list[np.ndarray]], labels: np.ndarray
    ) -> None:
        self.path, self.manifest, self.labels = path, manifest, labels  #: labels (len,) int64
        self._tensors = tensors  # name -> one array (count, *row shape) per shard
        self._starts = np.cumsum([0] + [shard.count for shard in manifest.shards])[:-1]

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Dataset:
        """Open a folder made by `prepare`. `verify` reads every file and compares its sha256 with the manifest.

        Raises ValueError, with the remedy, when the manifest is missing or invalid, when a shard is missing or has unexpected
        tensors, when its sha256 differs (`verify`), or when a label is out of range.
        """
        path = Path(path)
        manifest = Manifest.load(path)
        moments, labels = [], [np.zeros(0, dtype=np.int64)]
        for shard in manifest.shards:
            tensors = open_tensors(path / shard.file, manifest.layout, shard.count)
            moments.append(tensors["moments"])
            labels.append(tensors["labels"].copy())
            _check_labels(path / shard.file, labels[-1], max(manifest.num_classes, 1))
        dataset = cls(path, manifest, {"moments": moments}, np.concatenate(labels))
        if verify:
            dataset.verify()
        return dataset

    def __len__(self) -> int:
        return self.manifest.count

    def __reduce__(self) -> tuple[Any, ...]:
        # a worker process opens the files itself: the mapped arrays must not be pickled
        return Dataset.open, (self.path,)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that `read` returns: moments, labels, and features once they are opened."""
        return *self._tensors, "labels"

    def read(self, rows: np.ndarray | Tensor, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Rows (N,) of the tensors `names` (None: all), in the order of `rows` and in the stored dtype.

        Shapes: moments (N, copies, M, *S), labels (N,) int64, features (N, copies, T, D) float16. The tensors are copies.
        Raises ValueError for a row out of range, and for values that are not finite (naming shard and row).
        """
        if isinstance(rows, Tensor):
            rows = rows.cpu().numpy()
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        self._check_range(rows)
        wanted = self.names if names is None else names
        return {
            name: torch.from_numpy(self.labels[rows]) if name == "labels" else self._gather(name, rows)
            for name in wanted
        }

    def condition(self, tensors: Mapping[str, Tensor]) -> Cond:
        """The condition of rows that `read` returned: their labels, all 0 when the data have no conditions."""
        return tensors["labels"]

    def open_features(self) -> Features:
        """Open the stored features, which `read` returns from now on, and return their description.

        Raises ValueError when there are none (`prepare --features` makes them), or a file is missing or damaged.
        """
        manifest = self.manifest
        if manifest.features is None:
            raise ValueError(f"{self.path} holds no features; repeat its `selftrans prepare`, with --features MODEL")
        layout, counts = manifest.features.layout(manifest), [shard.count for shard in manifest.shards]
        self._tensors["features"] = [
            open_tensors(self.path / file.name, layout, count)["features"]
            for file, count in zip(manifest.features.files, counts, strict=True)
        ]
        return manifest.features

    def verify(self) -> None:
        """Compare the sha256 of every file with the manifest. Raises ValueError naming the first that differs."""
        for name in self.damaged():
            raise ValueError(f"shard {self.path / name} fails its sha256; delete the file and {REMEDY}")

    def damaged(self, *, features: bool = True) -> Iterator[str]:
        """Names of the files whose sha256 differs from the manifest; reads every byte."""
        expected = {shard.file: shard.sha256 for shard in self.manifest.shards}
        if features and self.manifest.features:
            expected |= {file.name: file.sha256 for file in self.open_features().files}
        for name, sha256 in expected.items():
            if sha256_file(self.path / name) != sha256:
                yield name

    def _check_range(self, rows: np.ndarray | Tensor) -> None:
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise ValueError(
                f"indices {rows.min()} .. {rows.max()} are outside the {len(self)} {self.manifest.unit} of {self.path}"
            )

    def _gather(self, name: str, rows: np.ndarray) -> Tensor:
        """Rows (N,) of one tensor. Raises ValueError for values that are not finite."""
        shards = self._tensors[name]
        which = np.searchsorted(self._starts, rows, side="right") - 1
        dtype, bits, infinity = NUMBERS[shards[0].dtype.name]
        out = torch.empty((len(rows), *shards[0].shape[1:]), dtype=dtype)
        view = out.numpy()  # numpy gathers in this thread only, which leaves the other cores to the training step
        for k in np.unique(which):
            at = np.flatnonzero(which == k)
            view[at] = shards[k][rows[at] - self._starts[k]]
        sign = np.array(1 << (8 * view.itemsize - 1), dtype=bits)
        # comparing the bits as integers is exact, and many times faster than isfinite in half precision
        magnitude = view.view(bits) & ~sign
        if magnitude.max(initial=0) >= infinity:
            index = int(np.argmax(magnitude.reshape(len(rows), -1).max(axis=1) >= infinity))
            self._refuse(name, int(rows[index]), int(which[index]))
        return out

    def _refuse(self, name: str, row: int, k: int) -> None:
        """Raise ValueError for values that are not finite at `row`, which is in shard k."""
        shard, manifest = self.manifest.shards[k], self.manifest
        file = manifest.features.files[k].name if manifest.features and name == "features" else shard.file
        raise ValueError(
            f"shard {self.path / file} holds NaN or infinite {name} for {manifest.unit.removesuffix('s')} {row} "
            f"(row {row - self._starts[k]} of the shard); delete the file and {REMEDY}"
        )


def _check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    """Raise ValueError for a label outside 0 .. classes - 1."""
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise ValueError(
            f"shard {path} has label {labels[wrong[0]]} at row {wrong[0]}, outside 0 .. {classes - 1}; "
            f"delete the file and {REMEDY}"
        )
