"""What `selftrans plan` found, as a record and as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from selftrans.messages import duration, gigabytes, plural, three_digits


@dataclass
class StageScale:
    """One stage on the cluster. Two figures are those with communication hidden behind computation, and not hidden."""

    name: str
    steps: int
    parameters: int
    trained: int  #: parameters with gradients, heads included
    tflops_per_step: float
    batch_per_gpu: int
    wire_bytes: int  #: sent by each GPU per step
    compute_seconds: float
    wire_seconds: float
    step_seconds: tuple[float, float]
    images_per_s: tuple[float, float]
    hours: tuple[float, float]
    memory: dict[str, int]  #: bytes per GPU, by what they are for; activations included
    checkpoint: int  #: bytes
    kept: int  #: checkpoints at the end


@dataclass
class ScalePlan:
    """What a run takes, and what was assumed."""

    recipe: str
    model: str
    cluster: dict[str, Any]
    batch_size: int
    sharded: bool
    samples: int
    latents_bytes: int
    read_bytes_per_s: float  #: of latents, by one machine
    checkpoints_bytes: int
    hours: tuple[float, float]
    gpu_hours: tuple[float, float]
    stages: list[StageScale] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)


def text(plan: ScalePlan) -> str:
    """The plan for a reader."""
    world, machines = plan.cluster["gpus"], plan.cluster["machines"]
    lines = [
        f"{plan.recipe}, {plan.model}: {plural(world, 'GPU')} in {plural(machines, 'machine')}, "
        f"batches of {plan.batch_size}{', sharded' if plan.sharded else ''}"
    ]
    for stage in plan.stages:
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in stage.memory.items())
        lines += [
            f"{stage.name}: {stage.parameters / 1e6:.3g} M parameters, {plural(stage.steps, 'step')}, "
            f"{stage.tflops_per_step:.3g} TFLOPs each",
            f"  batch       {plural(stage.batch_per_gpu, 'image')} per GPU",
            f"  wire        {gigabytes(stage.wire_bytes)} sent by each GPU per step, {1e3 * stage.wire_seconds:.3g} ms; "
            f"computation {1e3 * stage.compute_seconds:.3g} ms",
            f"  rate        {_range(stage.images_per_s)} images/s",
            f"  time        {_range(stage.hours)} h",
            f"  memory      {gigabytes(sum(stage.memory.values()))} per GPU: {parts}",
            f"  disk        {plural(stage.kept, 'checkpoint')} of about {gigabytes(stage.checkpoint)}",
        ]
    first, last = (duration(3600 * hours) for hours in plan.hours)
    lines += [
        f"total: {first if first == last else f'{first} to {last}'}, {_range(plan.gpu_hours)} GPU hours",
        f"data: {plan.samples:,} latents, {gigabytes(plan.latents_bytes)}; each machine reads "
        f"{gigabytes(plan.read_bytes_per_s)} per second of them, from its cache or the network",
        f"disk: {gigabytes(plan.checkpoints_bytes)} of checkpoints",
        "assumed:",
    ]
    return "\n".join([*lines, *(f"  {line}" for line in plan.assumed)])


def _range(values: tuple[float, float]) -> str:
    low, high = sorted(values)
    shown = [three_digits(value) for value in (low, high)]
    return shown[0] if shown[0] == shown[1] else f"{shown[0]} to {shown[1]}"
