"""Interleaved timing: the candidates take steps in turn, so that machine noise affects all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from selftrans.config import RunConfig
from selftrans.data.dataset import Dataset
from selftrans.experiments.bench.machine import Clock, Peak
from selftrans.experiments.bench.plain_step import PlainStep
from selftrans.methods.guidance import Frozen
from selftrans.methods.spec import Stage
from selftrans.train.batches import Stream, to_batch
from selftrans.train.captured_step import NotCaptured
from selftrans.train.trainer import Trainer

PARTS = ("data", "forward", "backward", "optimiser")


class Candidate(Protocol):
    """One implementation of a training step."""

    flops: int  #: floating-point operations that the method needs per step
    captured_in: float  #: seconds that it took to capture the step; 0 where it is not captured
    #: of a captured step: mean loss (`flow`) and `grad_norm` of the steps before the measurement, which a change of the way in
    #: which the same step is computed may only round
    means: dict[str, float | None]

    @property
    def replayed(self) -> bool:
        """Whether its steps are replays of CUDA graphs."""
        ...

    def step(self) -> list[Any]:
        """Take one step and return five timestamps: its start and the end of each of PARTS."""
        ...


class TimedAccelerator(Accelerator):
    """An Accelerator that takes a timestamp after each backward pass."""

    timestamps: list[Any] | None  #: None: off
    clock: Clock

    def backward(self, loss: Tensor, **options: Any) -> None:
        super().backward(loss, **options)
        self.timestamp()

    def timestamp(self) -> None:
        """Note the time, unless timestamps are off: a step that is captured would make it part of the graph."""
        if self.timestamps is not None:
            self.timestamps.append(self.clock.now())


class TrainerStep:
    """The trainer's complete step, from reading data to the moving average; captured ones are timed as a whole."""

    def __init__(
        self,
        accelerator: TimedAccelerator,
        config: RunConfig,
        stage: Stage,
        folder: Path,
        dataset: Dataset,
        teacher: Frozen | None,
    ) -> None:
        self.accelerator, self.clock = accelerator, accelerator.clock
        self.trainer = Trainer(accelerator, config, stage, folder, dataset, teacher=teacher)
        randomise(self.trainer.objective)
        self.batches = self.trainer.stream.from_step(0, pin=accelerator.device.type == "cuda")
        self.flops = sum(self.trainer.flops.values())  #: floating-point operations that the method needs per step
        self.captured_in, self.means = 0.0, dict[str, float | None]()
        if self.trainer.captured:
            accelerator.timestamps, started = None, time.monotonic()
            for _ in range(self.trainer.captured.untimed):
                self.trainer.train_step(self.batches)
            self.captured_in = time.monotonic() - started
            if accelerator.device.type == "cuda" and not self.replayed:
                raise NotCaptured("no graph was recorded in the steps before the measurement")
            self.trainer.captured.flush()
            means = {name: float(self.trainer.since_log.means()[name]) for name in ("flow", "grad_norm")}
            self.means = {name: value if math.isfinite(value) else None for name, value in means.items()}
        else:
            self.trainer.wrapped.register_forward_pre_hook(lambda *_: accelerator.timestamp())
            self.trainer.wrapped.register_forward_hook(lambda *_: accelerator.timestamp())

    @property
    def replayed(self) -> bool:
        return self.trainer.captured is not None and self.trainer.captured.replaying

    @property
    def transient(self) -> int:
        """Bytes of a captured step that the allocator's statistics do not show."""
        return self.trainer.captured.transient if self.trainer.captured else 0

    def step(self) -> list[Any]:
        start = self.clock.now()
        self.accelerator.timestamps = None if self.trainer.captured else [start]
        self.trainer.train_step(self.batches)
        end = self.clock.now()
        if self.accelerator.timestamps is None:
            return [start, start, start, start, end]
        return [*self.accelerator.timestamps, end]


class TimedPlainStep:
    """The plain step (`plain_step`) on the same stream of data."""

    def __init__(self, config: RunConfig, dataset: Dataset, clock: Clock, *, guided: bool, flops: int) -> None:
        self.clock, self.dataset, manifest = clock, dataset, dataset.manifest
        self.flops = flops  #: of the method, not of this step, which computes more
        self.captured_in, self.replayed, self.means = 0.0, False, dict[str, float | None]()
        self.plain = PlainStep(config, manifest.shape, manifest.conditions, clock.device, guided=guided)
        randomise(self.plain.model)
        if self.plain.teacher is not None:
            randomise(self.plain.teacher)
        stream = Stream(dataset, batch_size=config.train.batch_size, accumulate=1, seed=0)
        self.batches = stream.from_step(0, pin=clock.device.type == "cuda")

    def step(self) -> list[Any]:
        times = [self.clock.now()]
        batch = to_batch(next(self.batches), self.dataset, self.clock.device)
        times.append(self.clock.now())
        losses = self.plain.forward(batch)
        times.append(self.clock.now())
        self.plain.backward(losses[0])
        times.append(self.clock.now())
        self.plain.update(losses)
        times.append(self.clock.now())
        return times


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give every matrix small random weights: the zeros of a new model use less GPU power and would distort the timing."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)


class Memory:
    """Peak memory of each candidate on a GPU; on a CPU it is not measured."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.known = device, device.type == "cuda"
        self.own: dict[str, int] = {}
        self.transient: dict[str, int] = {}  #: bytes of captured steps that the allocator's statistics do not count
        self.peak: dict[str, int] = {}

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.known else 0

    def begin(self) -> None:
        if self.known:
            torch.cuda.reset_peak_memory_stats(self.device)

    def end(self, name: str) -> None:
        """Record the peak of `name` since `begin`, without the memory of the other candidates."""
        if self.known:
            others = sum(size for other, size in self.own.items() if other != name)
            most = torch.cuda.max_memory_allocated(self.device) + self.transient.get(name, 0)
            self.peak[name] = max(self.peak.get(name, 0), most - others)

    def gigabytes(self, name: str) -> float | None:
        return round(self.peak[name] / 1e9, 3) if name in self.peak else None


def interleaved(
    candidates: Mapping[str, Candidate],
    clock: Clock,
    peak: Peak,
    memory: Memory,
    *,
    seconds: float,
    least: int = 3,
    deadline: float = math.inf,
) -> tuple[dict[str, list[dict[str, float]]], dict[str, float]]:
    """(seconds of each part of a step, per candidate and round; seconds of each candidate's first step, compilation included).

    At least `least` rounds are measured, and more within `seconds`.

    Before the rounds every candidate takes warm-up steps, which allocate and compile. In a round each candidate takes one
    step (on a GPU the median of eight), in rotating order. The key "matmul" holds the seconds of the matrix products.
    After `deadline` (of `time.monotonic`) no round begins, except the first.
    """
    names, several, first = list(candidates), 8 if clock.device.type == "cuda" else 1, dict[str, float]()
    for name in names:
        before, started = memory.allocated(), time.monotonic()
        _timed_steps(candidates[name], clock, 1)
        first[name] = candidates[name].captured_in + time.monotonic() - started
        _timed_steps(candidates[name], clock, 3 if several > 1 else 1)
        memory.own[name] = memory.own.get(name, 0) + memory.allocated() - before  # the optimiser's state
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in [*names, "matmul"]}
    began, each = time.monotonic(), 0.0
    while len(rounds["matmul"]) < least or time.monotonic() - began + each < seconds:
        if rounds["matmul"] and time.monotonic() + each > deadline:
            break
        started, number = time.monotonic(), len(rounds["matmul"])
        for name in names[number % len(names) :] + names[: number % len(names)]:
            memory.begin()
            rounds[name].append(_timed_steps(candidates[name], clock, several))
            memory.end(name)
        rounds["matmul"].append({str(side): duration for side, duration in peak.measure().items()})
        each = time.monotonic() - started
    return rounds, first


def in_turn(ways: Mapping[str, Callable[[], object]], clock: Clock, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in interleaved rounds, in alternating order, after a first one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            clock.wait()
            began = time.perf_counter()
            ways[name]()
            clock.wait()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _timed_steps(candidate: Candidate, clock: Clock, steps: int) -> dict[str, float]:
    """Median seconds of each part over consecutive steps."""
    times = [candidate.step() for _ in range(steps)]
    clock.wait()
    spans = [[clock.seconds(a, b) for a, b in pairwise(step)] for step in times]
    parts = {part: statistics.median(span[i] for span in spans) for i, part in enumerate(PARTS)}
    return parts | {"total": statistics.median(clock.seconds(step[0], step[-1]) for step in times)}
