"""The samples and the noise of a step: both are functions of (seed, step) alone, so a resumed run needs no state.

The data are read as an endless sequence of shuffled epochs; step s takes positions [s B, (s + 1) B) of it, B the batch of
all processes. Shape legend: N batch, M moments channels, (C, *S) latent, T tokens and D width of stored features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from selftrans.data.dataset import Dataset
from selftrans.types import Batch

CAPTIONS = 3  #: apart from other random numbers of the same seed


class Loaded(NamedTuple):
    """The stored tensors from which a micro-batch is made."""

    rows: np.ndarray  #: (N,) positions in the data
    tensors: dict[
        str, Tensor
    ]  #: moments (N, copies, M, *S), labels (N,); text or ids, and mask, of one caption; features if they are read


class Stream:
    """Batches of one process, read ahead in a thread while the step runs."""

    def __init__(
        self, dataset: Dataset, *, batch_size: int, accumulate: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size % (accumulate * world):
            raise ValueError(
                f"train.batch_size {batch_size} does not divide among {world} processes x {accumulate} micro-batches; "
                f"choose a multiple of {accumulate * world}"
            )
        self.dataset, self.batch_size, self.accumulate, self.seed = dataset, batch_size, accumulate, seed
        self.rank, self.micro = rank, batch_size // (accumulate * world)
        self.features = False  #: whether stored features are read, too
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def indices(self, step: int, micro: int) -> np.ndarray:
        """(N,) positions in the data of this process' micro-batch."""
        start = step * self.batch_size + (self.rank * self.accumulate + micro) * self.micro
        return np.array([self._at(position) for position in range(start, start + self.micro)], dtype=np.int64)

    def caption(self, rows: np.ndarray, step: int, micro: int) -> np.ndarray | None:
        """(N,) which caption of each row this visit reads, drawn from (seed, step, micro, rank); None without captions."""
        if self.dataset.counts is None:
            return None
        drawn = np.random.default_rng(np.random.SeedSequence([self.seed, CAPTIONS, step, micro, self.rank]))
        return drawn.integers(0, self.dataset.counts[rows])

    def all_indices(self, step: int) -> np.ndarray:
        """(B,) positions in the data of the batch of all processes. Safe while the thread reads ahead."""
        mine = copy.copy(self)  # the thread uses the order of this one
        return np.array([mine._at(step * self.batch_size + i) for i in range(self.batch_size)], dtype=np.int64)

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            order = np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
            self._epoch, self._order = epoch, order.permutation(len(self.dataset))
        return int(self._order[offset])

    def from_step(self, step: int, *, pin: bool = False) -> Iterator[Loaded]:
        """Each micro-batch from `step` on, without end.

        `pin` puts what is read from the disk into page-locked memory, which a GPU fetches without the host waiting.
        """

        def read(at: int) -> Loaded:
            rows = self.indices(*divmod(at, self.accumulate))
            names = [name for name in self.dataset.names if name != "features" or self.features]
            tensors = self.dataset.read(rows, names, self.caption(rows, *divmod(at, self.accumulate)))
            if pin:  # in this thread, not in the step: only copies from pinned memory are asynchronous
                tensors = {name: x.pin_memory() if x.device.type == "cpu" else x for name, x in tensors.items()}
            return Loaded(rows, tensors)

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


def to_batch(loaded: Loaded, dataset: Dataset, device: torch.device) -> Batch:
    """moments => latents on the device: one stored copy (mirrored or not) and one posterior sample for each visit."""
    moments = loaded.tensors["moments"].to(device, non_blocking=True)
    n, copies = moments.shape[:2]
    chosen = torch.arange(n, device=device), torch.randint(copies, (n,), device=device)
    z0 = dataset.manifest.latent_space.sample(moments[chosen])
    cond = dataset.condition(loaded.tensors, device)
    features = loaded.tensors.get("features")
    if features is not None:
        features = features.to(device, non_blocking=True)[chosen]
    return Batch(z0, cond, features)
