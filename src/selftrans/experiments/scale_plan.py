"""`selftrans plan`: what a run takes on many GPUs, from figures of one: arithmetic alone, nothing is trained or written.

Bytes are those that one GPU sends per step. Shape legend: (C, *S) latent, T tokens, D width.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from selftrans.config import RunConfig
from selftrans.data.shard_file import row_bytes
from selftrans.experiments.step_cost import (
    ACTIVATIONS,
    BenchedModel,
    Cluster,
    StepCost,
    above_zero,
    activations,
    flops_again,
    gathered,
    measured_cost,
    read_measured,
    replayed,
    wire_bytes,
)
from selftrans.messages import duration, gigabytes, plural, printable, shape_text, three_digits
from selftrans.methods.objective import Objective
from selftrans.methods.registry import meta_objective, stages
from selftrans.methods.spec import Stage
from selftrans.precision import PRECISIONS
from selftrans.train.checkpointing import bytes_of, kept_checkpoints
from selftrans.train.flops import step_flops
from selftrans.train.memory_use import memory_use
from selftrans.train.run_data import data_of
from selftrans.types import Conditions

SAMPLES, SHAPE, CLASSES = 1_281_167, (4, 32, 32), 1000  #: ImageNet-256, assumed where no data are given


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


def scale_plan(
    config: RunConfig, cluster: Cluster, *, measured: Path | None = None, rate: float | None = None
) -> ScalePlan:
    """What the run of `config` takes on the cluster.

    Args:
        measured: bench.json of one such GPU. rate: images per second of the last stage on one, in place of that.
    ValueError where neither is given, for a batch that does not divide, and for what `train` refuses.
    """
    if (measured is None) == (rate is None):
        raise ValueError(
            "give --measured bench.json, made by `selftrans bench` on one such GPU, or --rate IMAGES_PER_S"
        )
    if rate is not None:
        above_zero("rate", rate)
    config = config.restricted().check()
    cluster.check(config.train)
    train, world, assumed = config.train, cluster.gpus, list[str]()
    shape, conditions, samples, row = _data(config, assumed)
    try:
        built = [_built(config, stage, shape, conditions) for stage in stages(config)]
    except ValueError as error:
        if not assumed:
            raise
        raise ValueError(f"{error}. Without --data, latents as ImageNet's are assumed: give --data DIR") from error
    figures = read_measured(measured, str(config.model.name)) if measured else None
    if figures:
        graphs = replayed(config, world)
        costs = [
            measured_cost(figures, b.stage.name, b.objective.student, b.flops, b.again, graphs=graphs) for b in built
        ]
    else:
        assert rate is not None
        last = built[-1].flops + built[-1].again  # a step of another stage, in proportion to operations
        costs = [StepCost((each.flops + each.again) / last / rate, 0.0, None, None) for each in built]
    found = [_stage(config, cluster, each, cost) for each, cost in zip(built, costs, strict=True)]
    assumed += _assumptions(config, cluster, figures, rate, costs)
    hours = sum(each.hours[0] for each in found), sum(each.hours[1] for each in found)
    fastest = max(each.images_per_s[0] for each in found)
    return ScalePlan(
        recipe=config.recipe,
        model=str(config.model.name),
        cluster=dataclasses.asdict(cluster) | {"machines": cluster.machines},
        batch_size=train.batch_size,
        sharded=train.shard and world > 1,
        samples=samples,
        latents_bytes=samples * row,
        read_bytes_per_s=fastest * row / cluster.machines,
        checkpoints_bytes=sum(s.kept * s.checkpoint for s in found) + max(s.checkpoint for s in found),
        hours=hours,
        gpu_hours=(hours[0] * world, hours[1] * world),
        stages=found,
        assumed=assumed,
    )


def _data(config: RunConfig, assumed: list[str]) -> tuple[tuple[int, ...], Conditions, int, int]:
    """Shape of a latent, conditions, number of samples, and bytes of one."""
    data = config.data
    if data.path is not None:
        dataset = data_of(data)
        manifest = dataset.manifest
        return tuple(manifest.shape), manifest.conditions, len(dataset), row_bytes(manifest.layout)
    if data.builtin is not None:
        raise ValueError(f"recipe {config.recipe} brings its own data, of which nothing is known here; give --data DIR")
    shape, classes = tuple(data.shape or SHAPE), CLASSES if data.classes is None else data.classes
    row = row_bytes({"moments": ("float16", (2 * shape[0], *shape[1:])), "labels": ("int64", ())})
    assumed.append(
        f"data: {SAMPLES:,} latents {shape_text(shape)} (mean and std, float16) of {plural(classes, 'class')}, as "
        "ImageNet's; "
        "--data DIR takes those of your data"
    )
    return shape, Conditions("labels", classes) if classes else Conditions("none"), SAMPLES, row


class Built(NamedTuple):
    """A stage whose weights take no memory."""

    stage: Stage
    objective: Objective
    memory: dict[str, int]  #: bytes that the weights would take, by what they are for
    flops: float  #: operations of an image
    again: float  #: of those that are done again in the backward pass


def _built(config: RunConfig, stage: Stage, shape: tuple[int, ...], conditions: Conditions) -> Built:
    if stage.encoder:
        raise ValueError(f"stage {stage.name} is taught by an external encoder, whose cost is not known here")
    objective = meta_objective(config, stage, shape, conditions, dtype=PRECISIONS[config.train.precision])
    average = copy.deepcopy(objective.student)
    frozen = next((guidance.teacher for guidance in objective.guidances if guidance.teacher), None)
    objective.watch(average)  # so that a guidance which it teaches counts its operations
    memory = memory_use(objective, average, frozen, config.train.optimizer)
    flops = sum(step_flops(objective, conditions.example(), 1000).values()) / 1000
    return Built(stage, objective, memory, flops, flops_again(config.override(stage.settings), objective.student))


def _stage(config: RunConfig, cluster: Cluster, built: Built, cost: StepCost) -> StageScale:
    stage, objective, memory = built.stage, built.objective, built.memory
    train, world, student = config.train, cluster.gpus, objective.student
    sharded, batch = train.shard and world > 1, train.batch_size // world
    micro = batch // train.accumulate
    compute = batch * cost.per_image + cost.fixed / (world if sharded else 1)
    # a teacher that takes no memory is the average, which is sharded as the student is
    live = 0 if memory.get("teacher") else sum(gathered(each.teacher) for each in objective.guidances if each.teacher)
    sent = wire_bytes(
        memory["weights"], memory["gradients"], world, sharded=sharded, accumulate=train.accumulate, average=live
    )
    wire = cluster.seconds(sent)
    fast, slow = max(compute, wire), compute + wire
    parts = {name: size // world if sharded and name != "teacher" else size for name, size in memory.items()}
    if world > 1 and not sharded and train.accumulate > 1:  # sums of gradients, apart from those that are sent
        parts["buckets"] = memory["gradients"]
    own = config.override(stage.settings)
    parts["activations"] = activations(own, objective, memory, micro, cost.measured)
    return StageScale(
        name=stage.name,
        steps=stage.steps,
        parameters=sum(p.numel() for p in student.parameters()),
        trained=sum(p.numel() for p in objective.parameters() if p.requires_grad),
        tflops_per_step=built.flops * train.batch_size / 1e12,
        batch_per_gpu=batch,
        wire_bytes=sent,
        compute_seconds=compute,
        wire_seconds=wire,
        step_seconds=(fast, slow),
        images_per_s=(train.batch_size / fast, train.batch_size / slow),
        hours=(stage.steps * fast / 3600, stage.steps * slow / 3600),
        memory=parts,
        checkpoint=bytes_of(memory),
        kept=kept_checkpoints(train, stage.steps),
    )


def _assumptions(
    config: RunConfig, cluster: Cluster, figures: BenchedModel | None, rate: float | None, costs: Sequence[StepCost]
) -> list[str]:
    train, names = config.train, [stage.name for stage in stages(config)]
    other = [name for name, cost in zip(names, costs, strict=True) if cost.measured is None]
    row = costs[-1].row
    if figures is not None and row is not None:
        graphs = ", as CUDA graphs" if row.replayed else ""
        found = [
            f"speed: {printable(figures.source)}, {figures.model} on one {figures.device}, batch {row.batch}{graphs}; images "
            "cost the same in smaller batches, in which kernels are less efficient"
        ]
        if other:
            found.append(
                f"{', '.join(other)} of {config.model.name}: not measured in these sizes; as many operations per second as "
                f"{figures.model}, and the time of the optimiser by the parameters"
            )
        if row.replayed and not replayed(config, cluster.gpus):
            found.append(
                "steps were measured as CUDA graphs, which this run has not: those of small models take longer than here; "
                "measure the rows of `selftrans bench` whose names do not begin with captured_"
            )
        if figures.precision not in ("", train.precision):
            found.append(
                f"steps were measured in {figures.precision}, and train.precision is {train.precision}: another speed, and "
                "other activations"
            )
    else:
        found = [f"speed: {rate:g} images/s of the last stage on one GPU, as given; other stages by their operations"]
    if any(cost.measured is None or cost.measured.peak_bytes is None for cost in costs):
        found.append(
            f"activations: {ACTIVATIONS} bytes for each token, channel and block in 16 bits, attention matrices not kept"
        )
    if cluster.gpus > 1:
        kind = (
            "FSDP2: weights gathered twice in each micro-batch, gradients scattered" if train.shard else "DDP: a ring"
        )
        found.append(
            f"{kind}, in float32; {cluster.link:g} Gb/s between machines, {cluster.local:g} Gb/s within one; the first figure "
            "hides communication behind computation, the second does not"
        )
    return [*found, "previews, checkpoints and the guidance's end, which makes later steps cheaper, are not counted"]


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
