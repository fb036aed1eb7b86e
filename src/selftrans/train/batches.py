"""Which samples a step sees, and what noise: both are functions of (seed, step) alone, so a resumed run needs no state.

The data are read as an endless sequence of shuffled epochs; step s takes positions [s B, (s + 1) B) of it, B the batch of
all processes. Shape legend: N batch, M moments channels, (C, H, W) latent, T tokens and D width of stored features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from selftrans.data.dataset import Shards
from selftrans.encoders.autoencoder import sample_latents
from selftrans.types import Batch


class Loaded(NamedTuple):
    """What a micro-batch is made from, as it is stored."""

    rows: np.ndarray  #: (N,) positions in the data
    moments: Tensor  #: (N, copies, M, H, W)
    labels: Tensor  #: (N,)
    features: Tensor | None = None  #: (N, copies, T, D), where they are wanted


class Stream:
    """Batches of one process, read ahead in a thread while the step runs."""

    def __init__(
        self, shards: Shards, *, batch_size: int, accumulate: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size % (accumulate * world):
            raise ValueError(
                f"train.batch_size {batch_size} does not divide among {world} processes x {accumulate} micro-batches; "
                f"choose a multiple of {accumulate * world}"
            )
        self.shards, self.batch_size, self.accumulate, self.seed = shards, batch_size, accumulate, seed
        self.rank, self.micro = rank, batch_size // (accumulate * world)
        self.features = False  #: whether stored features are read, too
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def indices(self, step: int, micro: int) -> np.ndarray:
        """(N,) positions in the data of this process' micro-batch."""
        start = step * self.batch_size + (self.rank * self.accumulate + micro) * self.micro
        return np.array([self._at(position) for position in range(start, start + self.micro)], dtype=np.int64)

    def whole(self, step: int) -> np.ndarray:
        """(B,) positions in the data of the batch of all processes. Safe beside the thread that reads ahead."""
        mine = copy.copy(self)  # with an order of its own
        return np.array([mine._at(step * self.batch_size + i) for i in range(self.batch_size)], dtype=np.int64)

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.shards))
        if epoch != self._epoch:
            order = np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
            self._epoch, self._order = epoch, order.permutation(len(self.shards))
        return int(self._order[offset])

    def from_step(self, step: int, *, pin: bool = False) -> Iterator[Loaded]:
        """Each micro-batch from `step` on, without end.

        `pin` puts what is read from the disk into page-locked memory, which a GPU fetches without the host waiting.
        """

        def read(at: int) -> Loaded:
            rows = self.indices(*divmod(at, self.accumulate))
            moments, labels = self.shards.read(rows)
            features = self.shards.read_features(rows) if self.features else None
            if pin and moments.device.type == "cpu":  # here, not in the step, and only then does a copy not wait
                moments, labels = moments.pin_memory(), labels.pin_memory()
            if pin and features is not None:
                features = features.pin_memory()
            return Loaded(rows, moments, labels, features)

        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") as pool:
            at = step * self.accumulate
            ahead: list[Future] = [pool.submit(read, at), pool.submit(read, at + 1)]
            while True:
                yield ahead.pop(0).result()
                at += 1
                ahead.append(pool.submit(read, at + 1))


def seed_step(seed: int, stream: int, step: int, micro: int, rank: int) -> None:
    """Seed torch's default generators for one micro-step: everything random in it follows."""
    state = np.random.SeedSequence([seed, stream, step, micro, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state) % 2**63)


def to_batch(loaded: Loaded, shards: Shards, device: torch.device) -> Batch:
    """moments ⇒ latents on the device: one stored copy (mirrored or not) and one posterior sample for each visit."""
    _, moments, labels, features = loaded
    moments = moments.to(device, non_blocking=True)
    n, copies = moments.shape[:2]
    chosen = torch.arange(n, device=device), torch.randint(copies, (n,), device=device)
    manifest = shards.manifest
    z0 = sample_latents(moments[chosen], stochastic=manifest.stochastic, scale=manifest.scale, shift=manifest.shift)
    if features is not None:
        features = features.to(device, non_blocking=True)[chosen]
    return Batch(z0, labels.to(device, non_blocking=True), features)
