"""The samples and the noise of a step: both are functions of (seed, step) alone, so a resumed run needs no state.

The data are read as an endless sequence of shuffled epochs; step s takes positions [s B, (s + 1) B) of it, B the batch of
all processes. With a window, an epoch reads a few shards at a time (see `windows`). Data of several shapes have such a
sequence for each, and a step takes its whole batch from one of them.
Shape legend: N batch, M moments channels, (C, *S) latent, T tokens and D width of stored features.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from selftrans.data.dataset import Dataset
from selftrans.data.windows import WindowOrder, window_order, windows_of
from selftrans.encoders.latent_space import LatentSpace
from selftrans.types import Batch, Cond

CAPTIONS = 3  #: stream of the random numbers that choose captions


class Loaded(NamedTuple):
    """The stored tensors from which a micro-batch is made."""

    rows: np.ndarray  #: (N,) positions in the data
    #: moments (N, copies, M, *S), labels (N,); text or ids, and mask, of one caption; features if they are read
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Schedule:
    """Which of several parts each step takes its batch from: in proportion to their sizes, as evenly as integers allow.

    A function of the seed and the step alone, in integer arithmetic. Part k takes the steps s, of those that parts
    0 .. k - 1 leave over, at which floor((s w_k + o_k) / W_k) increases; w_k is its size, W_k = w_k + w_k+1 + ..., and
    0 <= o_k < W_k is drawn from the seed. Then the floor is the number of steps that it had before.
    """

    sizes: tuple[int, ...]
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, sizes: Sequence[int], seed: int) -> Schedule:
        """The schedule of parts of these sizes, each above 0."""
        drawn, rest = np.random.default_rng(np.random.SeedSequence([seed, len(sizes)])), np.cumsum(sizes[::-1])[::-1]
        return cls(tuple(map(int, sizes)), tuple(int(drawn.integers(total)) for total in rest))

    def at(self, step: int) -> tuple[int, int]:
        """The part of `step`, and how many of the steps before it took the same part."""
        rest = sum(self.sizes)
        for part, (size, offset) in enumerate(zip(self.sizes[:-1], self.offsets[:-1], strict=True)):
            before = (step * size + offset) // rest
            if ((step + 1) * size + offset) // rest > before:
                return part, before
            step, rest = step - before, rest - size
        return len(self.sizes) - 1, step


class Stream:
    """Batches of one process, read ahead in a thread while the step runs."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        accumulate: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        window: int | None = None,
        held_out: np.ndarray | None = None,
    ) -> None:
        if batch_size % (accumulate * world):
            raise ValueError(
                f"train.batch_size {batch_size} does not divide among {world} processes x {accumulate} micro-batches; "
                f"choose a multiple of {accumulate * world}"
            )
        self.dataset, self.batch_size, self.accumulate, self.seed = dataset, batch_size, accumulate, seed
        self.rank, self.micro = rank, batch_size // (accumulate * world)
        self.features = False  #: whether stored features are read, too
        #: held while the thread reads; holding it elsewhere keeps the thread off the device
        self.reading = threading.Lock()
        self.held_out = held_out  #: rows that are never read; None: there are none
        self._kept = None if held_out is None else _kept_of_parts(dataset.parts, held_out)
        self.schedule = Schedule.of(dataset.parts if self._kept is None else [len(rows) for rows in self._kept], seed)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  #: part of the data -> an epoch and its order
        assert window is None or len(dataset.parts) == 1, "windows are of data of one shape"
        self.window = window  #: shards whose rows are shuffled together; None: all
        self._windows: WindowOrder | None = None  #: of the epoch that is read
        self._prefetched: tuple[int, int] | None = None  #: epoch and window of the last `Dataset.prefetch`

    def indices(self, step: int, micro: int) -> np.ndarray:
        """(N,) positions in the data of this process' micro-batch."""
        return self._rows(step, (self.rank * self.accumulate + micro) * self.micro, self.micro)

    def caption(self, rows: np.ndarray, step: int, micro: int) -> np.ndarray | None:
        """(N,) index of the caption that is read of each row, drawn from (seed, step, micro, rank); None without captions."""
        if self.dataset.counts is None:
            return None
        drawn = np.random.default_rng(np.random.SeedSequence([self.seed, CAPTIONS, step, micro, self.rank]))
        return drawn.integers(0, self.dataset.counts[rows])

    def all_indices(self, step: int) -> np.ndarray:
        """(B,) positions in the data of the batch of all processes. Safe while the thread reads ahead."""
        mine = copy.copy(self)  # the thread changes `_orders` of the original
        mine._orders = dict(self._orders)
        return mine._rows(step, 0, self.batch_size)

    def _rows(self, step: int, first: int, count: int) -> np.ndarray:
        """Rows `first` .. `first + count - 1` of the batch of all processes."""
        part, visit = self.schedule.at(step)
        begin, start = sum(self.dataset.parts[:part]), visit * self.batch_size + first
        return np.array([begin + self._at(part, at) for at in range(start, start + count)], dtype=np.int64)

    def _at(self, part: int, position: int) -> int:
        size = self.schedule.sizes[part]
        epoch, offset = divmod(position, size)
        if part not in self._orders or self._orders[part][0] != epoch:
            self._orders[part] = epoch, self._order(part, epoch)
        return int(self._orders[part][1][offset])

    def _order(self, part: int, epoch: int) -> np.ndarray:
        """The rows of a part, counted in it, in the order of an epoch."""
        if self.window is not None:
            self._windows = window_order(self._counts, self.window, (self.seed, epoch), self.held_out)
            return self._windows.rows
        rows = self.schedule.sizes[part] if self._kept is None else self._kept[part]
        return np.random.default_rng(np.random.SeedSequence([self.seed, epoch])).permutation(rows)

    @property
    def _counts(self) -> list[int]:
        return [shard.count for shard in self.dataset.manifest.shards]

    def _expect(self, step: int) -> None:
        """At the first step of a window, name the shards of this window and of the next one to the data (`prefetch`)."""
        epoch, offset = divmod(step * self.batch_size, self.schedule.sizes[0])
        self._at(0, step * self.batch_size)
        assert self._windows is not None and self.window is not None
        number = self._windows.window_at(offset)
        if self._prefetched != (epoch, number):
            self._prefetched = epoch, number
            following = self._windows.shards[number + 1 : number + 2]
            after = following or windows_of(self._counts, self.window, (self.seed, epoch + 1))[:1]
            self.dataset.prefetch(self._windows.shards[number], after[0])

    def from_step(self, step: int, *, pin: bool = False) -> Iterator[Loaded]:
        """Each micro-batch from `step` on, without end.

        `pin` puts what is read from the disk into page-locked memory, which a GPU fetches without the host waiting.
        """

        def read(at: int) -> Loaded:
            if self.window is not None:
                self._expect(at // self.accumulate)
            rows = self.indices(*divmod(at, self.accumulate))
            names = [name for name in self.dataset.names if name != "features" or self.features]
            with self.reading:
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


def _kept_of_parts(parts: Sequence[int], held_out: np.ndarray) -> list[np.ndarray]:
    """Of each part the rows that are not held out, counted in it."""
    kept = np.ones(sum(parts), dtype=bool)
    kept[held_out] = False
    return [np.flatnonzero(each) for each in np.split(kept, np.cumsum(parts)[:-1])]


def derived_seed(*numbers: int) -> int:
    """A seed for random numbers of their own: from the seed of a run, and what the numbers are for."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_step(seed: int, stream: int, step: int, micro: int, rank: int) -> None:
    """Seed torch's default generators for one micro-step: everything random in it follows."""
    state = np.random.SeedSequence([seed, stream, step, micro, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state) % 2**63)


class Inputs(NamedTuple):
    """What a micro-batch is made of, on the training device, before anything is drawn."""

    moments: Tensor  #: (N, copies, M, *S)
    cond: Cond  #: true condition of each sample
    features: Tensor | None  #: (N, copies, T, D), if a guidance reads them


def inputs_of(loaded: Loaded, dataset: Dataset, device: torch.device) -> Inputs:
    """The stored tensors on the device; ids of captions are encoded there. Draws nothing."""
    moments = loaded.tensors["moments"].to(device, non_blocking=True)
    features = loaded.tensors.get("features")
    if features is not None:
        features = features.to(device, non_blocking=True)
    return Inputs(moments, dataset.condition(loaded.tensors, device), features)


def draw_batch(inputs: Inputs, space: LatentSpace) -> Batch:
    """moments => latents: one stored copy (mirrored or not) and one posterior sample of each row, both drawn at random."""
    n, copies = inputs.moments.shape[:2]
    device = inputs.moments.device
    chosen = torch.arange(n, device=device), torch.randint(copies, (n,), device=device)
    z0 = space.sample(inputs.moments[chosen])
    return Batch(z0, inputs.cond, None if inputs.features is None else inputs.features[chosen])


def to_batch(loaded: Loaded, dataset: Dataset, device: torch.device) -> Batch:
    """moments => latents on the device, by `inputs_of` and `draw_batch`."""
    return draw_batch(inputs_of(loaded, dataset, device), dataset.manifest.latent_space)
