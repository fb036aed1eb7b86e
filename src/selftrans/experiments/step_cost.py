"""What a step of a stage takes: seconds and activations by rows of `selftrans bench` or a given rate, and the bytes sent."""

from __future__ import annotations

from dataclasses import dataclass

from selftrans.config import RunConfig
from selftrans.experiments.bench.read_report import BenchedModel, Row
from selftrans.methods.guidance import Frozen
from selftrans.methods.objective import Objective
from selftrans.train.capture_rules import obstacle_in_settings
from selftrans.train.flops import forward_flops
from selftrans.train.optim import moment_bytes
from selftrans.train.recompute import chosen_blocks
from selftrans.types import Backbone

#: bytes of activations for each token, channel and block in 16 bits, attention matrices not kept (2205.05198, section 4.1)
ACTIVATIONS = 34
SAME = 0.05  #: relative difference up to which operations are those measured: small batches round the selected samples


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
