"""What a step of a stage takes: seconds and activations by rows of `selftrans bench` or a given rate, and the bytes sent.

bench.json of an earlier run ⇒ `BenchedModel` ⇒ `StepCost` of each stage. `Cluster`: N GPUs in machines of M.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selftrans.config import RunConfig, Train
from selftrans.messages import first_line, plural, printable
from selftrans.methods.guidance import Frozen
from selftrans.methods.objective import Objective
from selftrans.models.registry import find
from selftrans.plain_json import UNREADABLE
from selftrans.train.capture_rules import obstacle_in_settings
from selftrans.train.flops import forward_flops
from selftrans.train.optim import moment_bytes
from selftrans.train.recompute import chosen_blocks
from selftrans.types import Backbone, Conditions

#: prefixes of rows: of the plain implementation (`plain_step`), which `train` does not run, and of steps replayed as CUDA
#: graphs (`train.capture`)
PLAIN, CAPTURED = "plain_", "captured_"
#: bytes of activations for each token, channel and block in 16 bits, attention matrices not kept (2205.05198, section 4.1)
ACTIVATIONS = 34
SAME = 0.05  #: relative difference up to which operations are those measured: small batches round the selected samples


@dataclass(frozen=True)
class Cluster:
    """The machines; speeds in gigabits per second and direction."""

    gpus: int
    per_machine: int = 8
    link: float = 400.0  #: of one machine to the others
    local: float = 3600.0  #: of one GPU to the others of its machine

    def check(self, train: Train) -> None:
        """ValueError for numbers that describe no cluster, and for batches that do not divide among its GPUs."""
        given = {
            "gpus": self.gpus,
            "gpus-per-machine": self.per_machine,
            "link-gbps": self.link,
            "local-gbps": self.local,
        }
        for option, value in given.items():
            above_zero(option, value)
        if self.gpus > self.per_machine and self.gpus % self.per_machine:
            raise ValueError(
                f"{plural(self.gpus, 'GPU')} do not divide into machines of {self.per_machine}; give --gpus-per-machine"
            )
        if train.batch_size % (self.gpus * train.accumulate):
            raise ValueError(
                f"train.batch_size {train.batch_size} does not divide among {plural(self.gpus, 'GPU')} x "
                f"{plural(train.accumulate, 'micro-batch')}; choose a multiple of {self.gpus * train.accumulate}"
            )

    @property
    def machines(self) -> int:
        return -(-self.gpus // self.per_machine)

    def seconds(self, sent: float) -> float:
        """Time of a ring in which each GPU sends `sent` bytes; between machines one GPU of each passes them on."""
        slowest = min(self.link, self.local) if self.machines > 1 else self.local
        return 8 * sent / (slowest * 1e9)


def above_zero(option: str, value: float) -> None:
    """ValueError for a number that is not."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"--{option} is {value:g}; it must be a number above zero")


@dataclass(frozen=True)
class Row:
    """A step of one stage."""

    name: str
    batch: int
    seconds: float
    fixed: float  #: seconds of it that do not depend on the batch: clipping, optimiser, average
    flops: float  #: floating-point operations of one image
    peak_bytes: float | None  #: of the device's memory

    @property
    def replayed(self) -> bool:
        """Whether its steps were replays of CUDA graphs."""
        return self.name.startswith(CAPTURED)

    @property
    def stage(self) -> str:
        """The stage of which it is a step."""
        return self.name.removeprefix(CAPTURED)

    @property
    def per_image(self) -> float:
        """Seconds of one more image in the batch."""
        return (self.seconds - self.fixed) / self.batch


@dataclass(frozen=True)
class BenchedModel:
    """The rows of one model on one device."""

    source: str
    device: str
    model: str
    rows: dict[str, Row]
    precision: str = ""  #: of the steps, as `train.precision` has it; empty where it is not recorded

    @functools.cached_property
    def parameters(self) -> int | None:
        """Number of parameters of the model, on latents as `bench` has them; None where its name is not known here."""
        try:
            with torch.device("meta"):
                config = RunConfig("bench", model=find(self.model).Config(name=self.model))
                model = config.build_model((4, 32, 32), Conditions("labels", 1000))
        except ValueError:
            return None
        return sum(p.numel() for p in model.parameters())

    def row(self, stage: str, *, replayed: bool = False) -> Row:
        """The row of this stage, or else the first: of replayed steps, or of launched ones, where there are any of these."""
        wanted = [row for row in self.rows.values() if row.replayed == replayed]
        known = [*wanted, *self.rows.values()] if replayed else wanted or [*self.rows.values()]
        return next((row for row in known if row.stage == stage), known[0])


def read_measured(path: Path, model: str) -> BenchedModel:
    """The rows of `model` in a bench.json, or of the model in it with the most operations. ValueError where there are none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        machine = report["machine"]
        device = printable(machine["gpu"] or machine["cpu"])
        found = {
            name: BenchedModel(printable(path), device, printable(name), _rows(each), str(machine.get("dtype", "")))
            for name, each in report["models"].items()
            if "rows" in each
        }
        found = {name: each for name, each in found.items() if each.rows}
        if not found:
            raise ValueError("it has no measured model")
    except UNREADABLE as error:
        reason = f"{type(error).__name__} {first_line(error)}" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(f"{path} is not a bench.json ({reason}); give one that `selftrans bench` wrote") from None
    return found.get(model) or max(found.values(), key=lambda each: each.row("").flops)


def _rows(model: dict[str, Any]) -> dict[str, Row]:
    peak, batch = float(model["matmul_peak_tflops"]) * 1e12, int(model["batch"])
    rows = {}
    for name, row in model["rows"].items():
        if name.startswith(PLAIN):
            continue
        seconds, fixed = float(row["ms"]) / 1e3, float(row["optimiser_ms"] or 0) / 1e3
        memory = row.get("peak_memory_gb")
        flops = float(row["utilisation"]) * peak * seconds / batch
        if not (0 <= fixed < seconds < math.inf and 0 < flops < math.inf):
            raise ValueError(f"the numbers of row {printable(name)} are impossible")
        rows[name] = Row(name, batch, seconds, fixed, flops, None if memory is None else float(memory) * 1e9)
    return rows


@dataclass(frozen=True)
class StepCost:
    """A step on one GPU."""

    per_image: float  #: seconds of an image
    fixed: float  #: seconds of a step besides
    row: Row | None  #: the measured row that they are computed from; None: a given rate
    measured: Row | None  #: `row`, if it was measured in this stage with models of these sizes


def replayed(config: RunConfig, world: int) -> bool:
    """Whether the settings of a run on `world` GPUs let it replay its steps as CUDA graphs."""
    return config.train.capture != "off" and obstacle_in_settings(config.train, world) is None


def recomputed(config: RunConfig, student: Backbone) -> int:
    """How many blocks are computed again in the backward pass; `config` is that of the stage."""
    chosen = chosen_blocks(config.train.recompute, student.depth)
    return student.depth * chosen if isinstance(chosen, bool) else len(chosen)


def flops_again(config: RunConfig, student: Backbone) -> float:
    """Operations of an image that `train.recompute` adds to those of a step: the forward pass of these blocks."""
    again = recomputed(config, student)
    return again / student.depth * forward_flops(student, student.conditions.example()) if again else 0.0


def measured_cost(
    figures: BenchedModel, stage: str, student: Backbone, flops: float, again: float, *, graphs: bool
) -> StepCost:
    """The cost of a step by a measured row: time per image in proportion to operations, `flops` and those done `again`; the
    fixed time in proportion to the student's parameters.

    graphs: whether the steps will be replays of CUDA graphs.
    """
    row = figures.row(stage, replayed=graphs)
    count, work = sum(p.numel() for p in student.parameters()), flops / row.flops
    size = count / (figures.parameters or count)
    same = row.stage == stage and max(abs(work - 1), abs(size - 1)) < SAME
    return StepCost(row.per_image * (flops + again) / row.flops, row.fixed * size, row, row if same else None)


def activations(
    config: RunConfig, objective: Objective, memory: dict[str, int], micro: int, measured: Row | None
) -> int:
    """Bytes of activations of a micro-batch: from a measured peak, else by the rule of ACTIVATIONS.

    The peak was measured with moments of 32 bits and no block recomputed; `config`, that of the stage, may differ in both.
    """
    student = objective.student
    each = ACTIVATIONS * (2 if config.train.precision == "fp32" else 1) * student.tokens * student.width
    again = recomputed(config, student)
    # blocks that are recomputed keep their float32 input, and are computed again one at a time
    rule = micro * (each * (student.depth - again + (again > 0)) + 4 * student.tokens * student.width * again)
    if measured is None or measured.peak_bytes is None:
        return rule
    trained = [p for p in objective.parameters() if p.requires_grad]
    held = sum(memory.values()) - memory["optimizer"] + moment_bytes(trained, "adamw")
    whole = (measured.peak_bytes - held) * micro / measured.batch
    return max(0, round(whole * rule / (micro * each * student.depth)))


def gathered(teacher: Frozen) -> int:
    """Bytes of the weights that a forward pass of the teacher reads."""
    return sum(p.numel() * p.element_size() for p in teacher.model.truncated(teacher.block).parameters())


def wire_bytes(
    weights: int, gradients: int, world: int, *, sharded: bool, accumulate: int = 1, average: int = 0
) -> int:
    """Bytes that each of `world` GPUs sends per step.

    DDP: a ring all-reduce of the gradients, 2 (N - 1) / N of them. FSDP2: the weights are gathered for the forward and again
    for the backward pass of each micro-batch, those of an `average` that teaches for its forward pass, and the gradients are
    scattered once, (N - 1) / N of each.
    """
    share = (world - 1) / world
    if sharded:
        return round(share * (accumulate * (2 * weights + average) + gradients))
    return round(2 * share * gradients)
