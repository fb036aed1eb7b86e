"""A source cut into shards and batches: pictures by index ⇒ decoded batches, the same on every run.

Shard k holds pictures [k * shard_size, (k + 1) * shard_size) of the source, minus the unreadable ones.
Shape legend: (R, R, C) image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from selftrans.data.sources.decode import BadPicture
from selftrans.data.sources.source import Source


class Decoded(NamedTuple):
    """A batch of pictures read from the source."""

    asked: int  #: how many were to be read
    good: list[int]  #: index in the source of each that was
    images: list[np.ndarray]  #: each (R, R, C) uint8
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Units:
    """The shards of a source, and the batches of a shard."""

    source: Source
    batch_size: int
    shard_size: int
    skip_bad: bool

    def units(self) -> range:
        return range(-(-len(self.source) // self.shard_size))

    def batches(self, unit: int) -> list[range]:
        """Indices of a shard's pictures; cut the same way on every run, since an encoder may round by batch."""
        stop = min((unit + 1) * self.shard_size, len(self.source))
        return [
            range(start, min(start + self.batch_size, stop))
            for start in range(unit * self.shard_size, stop, self.batch_size)
        ]

    def asked(self, unit: int) -> int:
        """How many pictures of the source a shard is made from."""
        return sum(len(batch) for batch in self.batches(unit))

    def decode(self, indices: range) -> Decoded:
        """Read a batch of pictures. Raises ValueError for an unreadable one, unless they are to be skipped."""
        good, skipped, images = [], [], []
        for i in indices:
            try:
                images.append(self.source.read(i))
                good.append(i)
            except BadPicture as error:
                if not self.skip_bad:
                    raise ValueError(f"{error}; repair or remove it, or go on without it by --skip-bad") from error
                skipped.append((error.name, error.reason))
        return Decoded(len(indices), good, images, tuple(skipped))
