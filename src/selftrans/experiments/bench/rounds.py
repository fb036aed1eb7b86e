"""Training steps interleaved: each candidate takes one step in turn, so that machine noise affects all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
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
from selftrans.train.trainer import Trainer

PARTS = ("data", "forward", "backward", "optimiser")


class Candidate(Protocol):
    """One implementation of a training step."""

    def step(self) -> list[Any]:
        """Take one step and return five timestamps: its beginning and the end of each of PARTS."""
        ...


class TimedAccelerator(Accelerator):
    """accelerate's engine, with a timestamp after each backward pass."""

    timestamps: list[Any]
    clock: Clock

    def backward(self, loss: Tensor, **options: Any) -> None:
        super().backward(loss, **options)
        self.timestamps.append(self.clock.now())


class TrainerStep:
    """The trainer's own step, complete: from the stream of data to the moving average."""

    def __init__(
        self,
        accelerator: TimedAccelerator,
        config: RunConfig,
        stage: Stage,
        folder: Path,
        shards: Dataset,
        teacher: Frozen | None,
    ) -> None:
        self.accelerator, self.clock = accelerator, accelerator.clock
        self.trainer = Trainer(accelerator, config, stage, folder, shards, teacher=teacher)
        randomise(self.trainer.objective)
        self.trainer.wrapped.register_forward_pre_hook(lambda *_: self._timestamp())
        self.trainer.wrapped.register_forward_hook(lambda *_: self._timestamp())
        self.batches = self.trainer.stream.from_step(0, pin=accelerator.device.type == "cuda")
        self.flops = sum(self.trainer.flops.values())  #: that the method needs for one step

    def _timestamp(self) -> None:
        self.accelerator.timestamps.append(self.clock.now())

    def step(self) -> list[Any]:
        self.accelerator.timestamps = [self.clock.now()]
        self.trainer._train_step(self.batches)
        self._timestamp()
        return self.accelerator.timestamps


class FieldStep:
    """The step of the field's code (`plain_step`) on the same stream of data."""

    def __init__(self, config: RunConfig, shards: Dataset, clock: Clock, *, guided: bool) -> None:
        self.clock, self.shards, manifest = clock, shards, shards.manifest
        self.plain = PlainStep(config, manifest.shape, manifest.conditions, clock.device, guided=guided)
        randomise(self.plain.model)
        if self.plain.teacher is not None:
            randomise(self.plain.teacher)
        stream = Stream(shards, batch_size=config.train.batch_size, accumulate=1, seed=0)
        self.batches = stream.from_step(0, pin=clock.device.type == "cuda")

    def step(self) -> list[Any]:
        times = [self.clock.now()]
        batch = to_batch(next(self.batches), self.shards, self.clock.device)
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
    """Give every matrix small random weights: a GPU draws less power for the zeros of a new model than for a trained one."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)


class Memory:
    """Peak memory of each of several candidates on one GPU; on a CPU nothing is measured."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.known = device, device.type == "cuda"
        self.own: dict[str, int] = {}
        self.peak: dict[str, int] = {}

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.known else 0

    def begin(self) -> None:
        if self.known:
            torch.cuda.reset_peak_memory_stats(self.device)

    def end(self, name: str) -> None:
        """Record the peak of `name` since `begin`, without what the others hold."""
        if self.known:
            others = sum(size for other, size in self.own.items() if other != name)
            self.peak[name] = max(self.peak.get(name, 0), torch.cuda.max_memory_allocated(self.device) - others)

    def gigabytes(self, name: str) -> float | None:
        return round(self.peak[name] / 1e9, 3) if name in self.peak else None


def interleaved(
    candidates: Mapping[str, Candidate], clock: Clock, peak: Peak, memory: Memory, *, seconds: float, least: int = 3
) -> dict[str, list[dict[str, float]]]:
    """Seconds of each part of a step, per round: at least `least` rounds, more while `seconds` last.

    Before the rounds every candidate takes steps that do not count (the first ones allocate and compile). In a round
    each takes one step, on a GPU the median of eight, and the order rotates. "matmul" holds the products.
    """
    names, several = list(candidates), 8 if clock.device.type == "cuda" else 1
    for name in names:
        before = memory.allocated()
        _timed_steps(candidates[name], clock, 3 if several > 1 else 1)
        memory.own[name] = memory.own.get(name, 0) + memory.allocated() - before  # its optimiser's state
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in [*names, "matmul"]}
    began, each = time.monotonic(), 0.0
    while len(rounds["matmul"]) < least or time.monotonic() - began + each < seconds:
        started, number = time.monotonic(), len(rounds["matmul"])
        for name in names[number % len(names) :] + names[: number % len(names)]:
            memory.begin()
            rounds[name].append(_timed_steps(candidates[name], clock, several))
            memory.end(name)
        rounds["matmul"].append({str(side): took for side, took in peak.measure().items()})
        each = time.monotonic() - started
    return rounds


def _timed_steps(candidate: Candidate, clock: Clock, steps: int) -> dict[str, float]:
    """Median seconds of each part over some steps in a row."""
    times = [candidate.step() for _ in range(steps)]
    clock.wait()
    spans = [[clock.seconds(a, b) for a, b in pairwise(step)] for step in times]
    parts = {part: statistics.median(span[i] for span in spans) for i, part in enumerate(PARTS)}
    return parts | {"total": statistics.median(clock.seconds(step[0], step[-1]) for step in times)}
