"""The order of an epoch in which only a few shards are read at a time: shards are shuffled, then the rows of each window.

A function of the seed, the epoch and the sizes of the shards alone, so that a continued run reads on exactly where it stopped.
Shape legend: N rows of all shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: windows that a cache must hold: the current one, the next, and the previous one, which slower processes still read
SHARE_OF_CACHE = 3


@dataclass(frozen=True)
class WindowOrder:
    """The order of one epoch."""

    rows: np.ndarray  #: (N,) int64, every row once, without those that are left out
    ends: np.ndarray  #: positions in `rows` at which each window ends
    shards: tuple[tuple[int, ...], ...]  #: of each window

    def window_at(self, position: int) -> int:
        """The window of a position in `rows`."""
        return int(np.searchsorted(self.ends, position, side="right"))


def windows_of(counts: Sequence[int], window: int, entropy: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The shards of each window: a random order of those that have rows, `window` at a time."""
    order = np.random.default_rng(np.random.SeedSequence(list(entropy))).permutation(np.flatnonzero(counts))
    return tuple(tuple(order[start : start + window].tolist()) for start in range(0, len(order), window))


def window_order(
    counts: Sequence[int], window: int, entropy: Sequence[int], left_out: np.ndarray | None = None
) -> WindowOrder:
    """Shards of `counts` rows, `window` of them at a time, without the rows `left_out`; `entropy`: seed and epoch.

    Rows are shuffled within each window. One window of all shards is a full shuffle (in another order than `permutation`).
    """
    groups = windows_of(counts, window, entropy)
    draw = np.random.default_rng(np.random.SeedSequence([*entropy, 1]))
    starts = np.cumsum([0, *counts])[:-1]
    parts = [
        draw.permutation(np.concatenate([np.arange(starts[k], starts[k] + counts[k]) for k in shards]))
        for shards in groups
    ]
    if left_out is not None:
        parts = [part[~np.isin(part, left_out)] for part in parts]
    return WindowOrder(np.concatenate(parts), np.cumsum([len(part) for part in parts]), groups)


def window_that_fits(shard_bytes: Sequence[int], limit: int) -> int:
    """How many shards a window may have, so that a cache of `limit` bytes holds SHARE_OF_CACHE windows; 0 where none fits."""
    return int(limit // (SHARE_OF_CACHE * max(shard_bytes, default=1)))


def classes_in_a_window(labels: np.ndarray, counts: Sequence[int], window: int) -> float:
    """Mean share, over windows, of the occurring classes that a window contains; 1 where shards are well mixed."""
    every, starts = len(np.unique(labels)), np.cumsum([0, *counts])
    shares = [
        len(np.unique(np.concatenate([labels[starts[k] : starts[k + 1]] for k in shards]))) / max(every, 1)
        for shards in windows_of(counts, window, (0, 0))
    ]
    return float(np.mean(shares))
