"""Training steps side by side: each contestant one step at a time, in rounds, so that they share the machine's moods."""

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


class Contestant(Protocol):
    """One way to take a training step."""

    def step(self) -> list[Any]:
        """Take one, and return five marks: its beginning and the end of each of PARTS."""
        ...


class Marked(Accelerator):
    """accelerate's engine, with a mark when a backward pass has been asked for."""

    marks: list[Any]
    clock: Clock

    def backward(self, loss: Tensor, **options: Any) -> None:
        super().backward(loss, **options)
        self.marks.append(self.clock.mark())


class Ours:
    """The trainer's own step, nothing left out: from the stream of shards to the moving average."""

    def __init__(
        self, accelerator: Marked, config: RunConfig, stage: Stage, room: Path, shards: Dataset, teacher: Frozen | None
    ) -> None:
        self.accelerator, self.clock = accelerator, accelerator.clock
        self.trainer = Trainer(accelerator, config, stage, room, shards, teacher=teacher)
        randomise(self.trainer.objective)
        self.trainer.wrapped.register_forward_pre_hook(lambda *_: self._mark())
        self.trainer.wrapped.register_forward_hook(lambda *_: self._mark())
        self.batches = self.trainer.stream.from_step(0, pin=accelerator.device.type == "cuda")
        self.flops = sum(self.trainer.flops.values())  #: that the method needs for one step

    def _mark(self) -> None:
        self.accelerator.marks.append(self.clock.mark())

    def step(self) -> list[Any]:
        self.accelerator.marks = [self.clock.mark()]
        self.trainer._train_step(self.batches)
        self._mark()
        return self.accelerator.marks


class Plain:
    """The field's step (`bench.plain`) on the same stream of data."""

    def __init__(self, config: RunConfig, shards: Dataset, clock: Clock, *, guided: bool) -> None:
        self.clock, self.shards, manifest = clock, shards, shards.manifest
        self.plain = PlainStep(config, manifest.shape, manifest.conditions, clock.device, guided=guided)
        randomise(self.plain.model)
        if self.plain.teacher is not None:
            randomise(self.plain.teacher)
        stream = Stream(shards, batch_size=config.train.batch_size, accumulate=1, seed=0)
        self.batches = stream.from_step(0, pin=clock.device.type == "cuda")

    def step(self) -> list[Any]:
        marks = [self.clock.mark()]
        batch = to_batch(next(self.batches), self.shards, self.clock.device)
        marks.append(self.clock.mark())
        losses = self.plain.forward(batch)
        marks.append(self.clock.mark())
        self.plain.backward(losses[0])
        marks.append(self.clock.mark())
        self.plain.update(losses)
        marks.append(self.clock.mark())
        return marks


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give every matrix small random weights: the zeros of a fresh model draw less power than those of a trained one."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)


class Memory:
    """Peak memory of each of several contestants that live on one GPU together; nothing is known elsewhere."""

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
        """Note what `name` has needed since `begin`, without what the others hold."""
        if self.known:
            others = sum(size for other, size in self.own.items() if other != name)
            self.peak[name] = max(self.peak.get(name, 0), torch.cuda.max_memory_allocated(self.device) - others)

    def gigabytes(self, name: str) -> float | None:
        return round(self.peak[name] / 1e9, 3) if name in self.peak else None


def race(
    contestants: Mapping[str, Contestant], clock: Clock, peak: Peak, memory: Memory, *, seconds: float, least: int = 3
) -> dict[str, list[dict[str, float]]]:
    """Seconds of each part of a step, per round: at least `least` rounds, more while `seconds` last.

    Before the rounds every contestant takes steps that do not count (the first ones allocate and compile). In a round
    each takes one step, on a GPU the median of eight, and another begins it each time. "matmul" holds the products.
    """
    names, several = list(contestants), 8 if clock.device.type == "cuda" else 1
    for name in names:
        before = memory.allocated()
        _visit(contestants[name], clock, 3 if several > 1 else 1)
        memory.own[name] = memory.own.get(name, 0) + memory.allocated() - before  # its optimiser's state
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in [*names, "matmul"]}
    began, each = time.monotonic(), 0.0
    while len(rounds["matmul"]) < least or time.monotonic() - began + each < seconds:
        started, number = time.monotonic(), len(rounds["matmul"])
        for name in names[number % len(names) :] + names[: number % len(names)]:
            memory.begin()
            rounds[name].append(_visit(contestants[name], clock, several))
            memory.end(name)
        rounds["matmul"].append({str(side): took for side, took in peak.measure().items()})
        each = time.monotonic() - started
    return rounds


def _visit(contestant: Contestant, clock: Clock, steps: int) -> dict[str, float]:
    """Median seconds of each part over some steps in a row."""
    marks = [contestant.step() for _ in range(steps)]
    clock.wait()
    spans = [[clock.seconds(a, b) for a, b in pairwise(step)] for step in marks]
    parts = {part: statistics.median(span[i] for span in spans) for i, part in enumerate(PARTS)}
    return parts | {"total": statistics.median(clock.seconds(step[0], step[-1]) for step in marks)}
