"""A source divided into shards and batches: samples by index => decoded batches, the same in every run.

Shard k holds samples [k * shard_size, (k + 1) * shard_size) of the source, minus the unreadable ones.
Shape legend: (H, W, C) image, (C, *S) values of data that are not pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from selftrans.data.sources.decode import BadSample
from selftrans.data.sources.source import Samples


class Decoded(NamedTuple):
    """A batch of samples read from the source."""

    asked: int  #: how many were requested
    good: list[int]  #: index in the source of each sample that was read
    arrays: list[np.ndarray]  #: each (H, W, C) uint8 or (C, *S) float32
    skipped: tuple[tuple[str, str], ...]  #: name of each sample that was not read, and why


@dataclass(frozen=True)
class ShardPlan:
    """The shards of a source, and the batches of a shard."""

    source: Samples
    batch_size: int
    shard_size: int
    skip_bad: bool

    def shards(self) -> range:
        return range(-(-len(self.source) // self.shard_size))

    def batches(self, shard: int) -> list[range]:
        """Indices of a shard's samples, by batch; the same in every run, since rounding may depend on the batch."""
        stop = min((shard + 1) * self.shard_size, len(self.source))
        return [
            range(start, min(start + self.batch_size, stop))
            for start in range(shard * self.shard_size, stop, self.batch_size)
        ]

    def asked(self, shard: int) -> int:
        """How many samples of the source a shard is made from."""
        return sum(len(batch) for batch in self.batches(shard))

    @property
    def threads(self) -> int | None:
        """Threads that read the source: 1 where it must be read in order; None: as many as suit the machine."""
        return 1 if self.source.in_order else None

    def decode(self, indices: range) -> Decoded:
        """Read a batch of samples. Raises ValueError for an unreadable one, unless `skip_bad`."""
        good, skipped, arrays = [], [], []
        for i in indices:
            try:
                arrays.append(self.source.read(i))
                good.append(i)
            except BadSample as error:
                if not self.skip_bad:
                    raise ValueError(f"{error}; repair or remove it, or skip it with --skip-bad") from error
                skipped.append((error.name, error.reason))
        return Decoded(len(indices), good, arrays, tuple(skipped))
