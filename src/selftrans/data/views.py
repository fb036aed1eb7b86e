"""Prepared data read in another way: some rows as a data set of their own (a held-out part, and the rest); one shard for all.

Shape legend: N batch, M moments channels, (C, *S) latent.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selftrans.data.dataset import Dataset
from selftrans.data.manifest import Features
from selftrans.encoders.text import TextEncoder


class View(Dataset):
    """Another way to read `dataset`: its folder, tensors, features and text encoder, with labels and counts as given."""

    def __init__(self, dataset: Dataset, labels: np.ndarray, counts: np.ndarray | None) -> None:
        super().__init__(dataset.path, dataset.manifest, dataset._tensors, labels, counts)
        self.origin, self._dataset = dataset.origin, dataset

    def open_features(self) -> Features:
        """As `Dataset.open_features`, by the wrapped data, whose files may be at a URL."""
        return self._dataset.open_features()  # its dict of tensors is that of the view, except in `RandomAccess`

    def _text_encoder(self, device: torch.device | str) -> TextEncoder:
        return self._dataset._text_encoder(device)


class SelectedRows(View):
    """The rows `selected[k]` of part k of `dataset`, numbered from 0, of the tensors `names` (None: all)."""

    def __init__(self, dataset: Dataset, selected: Sequence[np.ndarray], names: tuple[str, ...] | None = None) -> None:
        self.rows = np.concatenate(selected)  #: their numbers in `dataset`
        counts = None if dataset.counts is None else dataset.counts[self.rows]
        super().__init__(dataset, dataset.labels[self.rows], counts)
        self._parts, self._names = tuple(len(each) for each in selected), names

    def __reduce__(self) -> tuple[Any, ...]:
        return SelectedRows, (self._dataset, np.split(self.rows, np.cumsum(self._parts)[:-1]), self._names)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def parts(self) -> tuple[int, ...]:
        return self._parts

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return self._dataset.shapes

    @property
    def names(self) -> tuple[str, ...]:
        return self._names or self._dataset.names

    def read(
        self, rows: np.ndarray | Tensor, names: Collection[str] | None = None, which: np.ndarray | None = None
    ) -> dict[str, Tensor]:
        return self._dataset.read(self._of_dataset(rows), self.names if names is None else names, which)

    def captions(self, rows: np.ndarray | Tensor) -> list[list[str]]:
        return self._dataset.captions(self._of_dataset(rows))

    def _of_dataset(self, rows: np.ndarray | Tensor) -> np.ndarray:
        """Numbers in `dataset` of rows (N,)."""
        at = torch.as_tensor(rows).cpu().numpy().reshape(-1)
        self._check_range(at)
        return self.rows[at]


def one_shard(dataset: Dataset, k: int) -> SelectedRows:
    """A data set as long as `dataset`, of one part, that repeats the rows of its shard k: no other shard is read."""
    begin, count = dataset._starts[k], dataset.manifest.shards[k].count
    return SelectedRows(dataset, [begin + np.arange(len(dataset)) % count])


def split(dataset: Dataset, held_out: int, seed: int) -> tuple[SelectedRows, SelectedRows]:
    """(rows to train on, about `held_out` rows to measure on), moments alone, drawn by the seed; from each part its share.

    At least one row is held out, and at most a tenth of the rows when there are ten or more; a part of several rows keeps one
    to train on. Raises ValueError for data of less than two rows.
    """
    if len(dataset) < 2:
        raise ValueError(f"{dataset.path} holds {dataset.manifest.counted(len(dataset))}; at least two are needed")
    share = min(held_out / len(dataset), 0.1)
    counts = [min(int(share * size), size - 1) for size in dataset.parts]
    if not sum(counts):
        counts[int(np.argmax(dataset.parts))] = 1
    rng, kept, held, begin = np.random.default_rng(seed), [], [], 0
    for size, count in zip(dataset.parts, counts, strict=True):
        order = begin + rng.permutation(size)
        held.append(np.sort(order[:count]))
        kept.append(np.sort(order[count:]))
        begin += size
    return SelectedRows(dataset, kept, ("moments",)), SelectedRows(dataset, held, ("moments",))
