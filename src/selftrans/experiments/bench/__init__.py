"""`selftrans bench`: speed of training step, loading and sampling on this machine, compared with a plain implementation.

All candidates are measured in interleaved rounds. The table shows medians; a ratio is the median of its values in the
rounds. `bench.json` holds the numbers of the table. Shape legend: N batch, T tokens, (C, H, W) latent.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import release_memory

from selftrans.config import Log, RunConfig, Train, sections
from selftrans.data.dataset import Dataset
from selftrans.device import default_device, load_average
from selftrans.experiments.bench.loading_sampling import loading, prepare_sampling, random_dataset, sampling
from selftrans.experiments.bench.machine import Clock, Peak, describe
from selftrans.experiments.bench.rounds import (
    PARTS,
    Candidate,
    Memory,
    TimedAccelerator,
    TimedPlainStep,
    TrainerStep,
    interleaved,
    randomise,
)
from selftrans.experiments.step_cost import CAPTURED, PLAIN
from selftrans.messages import first_line
from selftrans.methods.guidance import Frozen
from selftrans.methods.registry import meta_objective
from selftrans.methods.self_transcendence import SELF_TRANSCENDENCE, STRUCTURE, Stage2
from selftrans.methods.spec import Stage
from selftrans.methods.vanilla import VANILLA
from selftrans.models.sit import SiTConfig
from selftrans.precision import PRECISIONS
from selftrans.storage import check_writable, write_json
from selftrans.suggest import nearest
from selftrans.train.captured_step import NotCaptured
from selftrans.train.flops import step_flops
from selftrans.train.processes import keep_memory

#: default batch size: SiT-S takes as long for ten images as the larger models for six
BATCH = {"cpu": {"SiT-S/2": 10}, "cuda": {"SiT-S/2": 256, "SiT-B/2": 256}}
OTHERWISE = {"cpu": 6, "cuda": 64}
NO_MEMORY = "not enough memory for {} candidates; give a smaller --batch-size, or fewer --rows"
QUICK = 90  #: seconds for the steps of a quick run
SAMPLING, LOADING = 25.0, 10.0  #: seconds of the limit that must remain to measure them; sampling compiles two passes
#: name -> (numerator, denominator), both rows of the table
RATIOS = {
    "stage1_over_vanilla": ("stage1", "vanilla"),
    "stage2_over_vanilla": ("stage2", "vanilla"),
    "plain_stage2_over_stage2": ("plain_stage2", "stage2"),
    "plain_stage2_over_vanilla": ("plain_stage2", "vanilla"),
    "plain_vanilla_over_vanilla": ("plain_vanilla", "vanilla"),
    "captured_vanilla_over_vanilla": ("captured_vanilla", "vanilla"),
    "captured_stage2_over_stage2": ("captured_stage2", "stage2"),
    "captured_stage2_over_captured_vanilla": ("captured_stage2", "captured_vanilla"),
}
#: row -> the method that the trainer runs in it
TRAINED = {"vanilla": VANILLA, "stage1": STRUCTURE, "stage2": SELF_TRANSCENDENCE}
ROWS = ("vanilla", "stage1", "stage2", "plain_vanilla", "plain_stage2")  #: what is measured by default
KNOWN = (*ROWS, *(CAPTURED + name for name in TRAINED))


def bench(
    models: Mapping[str, SiTConfig],
    out: Path,
    *,
    batch_size: int | None = None,
    tokens: int = 256,
    device: Literal["cpu", "cuda"] | None = None,
    seconds: float = 300,
    quick: bool = False,
    rows: Sequence[str] | None = None,
    limit: float | None = None,
    steps_only: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure each model and write `out/bench.json`; returns its content.

    Args:
        models: name -> sizes. tokens: T, a square number.
        batch_size: images per step; None: by model and device (BATCH).
        device: None: a GPU if there is one. A GPU is measured in bfloat16 and compiled, a CPU in float32 and eager.
        seconds: for the training steps of each model (at least three rounds). quick: fewer, also latents and images.
        rows: names of `KNOWN`; None: those of `ROWS`. A ratio needs both of its rows.
        limit: seconds for each model in all, building and compilation included; at least one round is measured; sampling
            and loading are left out where fewer than `SAMPLING` and `LOADING` seconds remain. None: no limit.
        steps_only: neither sampling nor loading. overrides: of the settings of the runs, dotted.
    The file is written after each model. A model that does not fit in memory is reported as failed.
    Raises ValueError when tokens is not a square number, for an unavailable device, for unknown rows, and `NotCaptured`
    where a step cannot be captured: no later model can be measured in this process then.
    """
    rows, seconds = tuple(dict.fromkeys(rows or ROWS)), min(seconds, QUICK) if quick else seconds
    where = torch.device(device or default_device().type)
    _check_arguments(models, where, tokens, batch_size, rows, out / "bench.json")
    precision: Literal["fp32", "bf16"] = "bf16" if where.type == "cuda" else "fp32"
    accelerator = _accelerator(where, precision)
    report: dict[str, Any] = {"machine": describe(accelerator.device, precision), "models": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in models.items():
            deadline = math.inf if limit is None else time.monotonic() + limit
            side = math.isqrt(tokens) * model.sizes()["patch"]
            dataset = random_dataset(Path(scratch) / f"{side}", (4, side, side), 2048 if quick else 8192)
            batch = batch_size or BATCH[where.type].get(name, OTHERWISE[where.type])
            config = settings(model, batch, precision).override(overrides or {})
            folder = Path(scratch, name.replace("/", "-"))
            torch.compiler.reset()  # compilations of the previous model
            try:
                result = _steps(accelerator, config, dataset, folder, rows, seconds, deadline)
                if not steps_only and time.monotonic() + SAMPLING < deadline:
                    result |= {"sampling": _sampling(accelerator.clock, config, dataset, quick=quick)}
                    result["ratios"]["sampling_interval_over_full"] = result["sampling"]["interval_over_full"]
            except torch.OutOfMemoryError:
                result = {"failed": NO_MEMORY.format(len(rows))}
            report["models"][name] = {"batch": batch, "tokens": tokens} | result
            write_json(out / "bench.json", report)
            release_memory()
        if not steps_only and time.monotonic() + LOADING < deadline:
            report["loading"] = loading(dataset, accelerator.clock, batches=8 if quick else 40)
    report["machine"]["load_after"] = load_average()
    report["ratios"] = next((model["ratios"] for model in report["models"].values() if "ratios" in model), {})
    write_json(out / "bench.json", report)
    return report


def _accelerator(where: torch.device, precision: str) -> TimedAccelerator:
    found = TimedAccelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=where.type == "cpu")
    if where.type == "cpu":
        keep_memory()  # as `train` does; the plain steps profit too
    found.clock, found.timestamps = Clock(found.device), []
    return found


def _check_arguments(
    models: Mapping[str, SiTConfig],
    where: torch.device,
    tokens: int,
    batch_size: int | None,
    rows: Sequence[str],
    file: Path,
) -> None:
    for row in rows:
        if row not in KNOWN:
            raise ValueError(f"row '{row}' is unknown{nearest(row, KNOWN)}")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no GPU that torch can use; omit --device")
    for model in models.values():
        model.sizes()
    if tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"tokens {tokens} is not a square number; use 64, 256 or 1024")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size {batch_size} should be 1 or more")
    check_writable(file)


def published(names: Sequence[str] | None, device: str | None, *, quick: bool = False) -> dict[str, SiTConfig]:
    """Models by their published names; None: the defaults of the device."""
    gpu = torch.cuda.is_available() if device is None else device == "cuda"
    usual = ("SiT-S/2",) if quick else ("SiT-S/2", "SiT-B/2", "SiT-XL/2") if gpu else ("SiT-S/2", "SiT-B/2")
    return {name: SiTConfig(name=name) for name in names or usual}


def settings(model: SiTConfig, batch_size: int, precision: Literal["fp32", "bf16"]) -> RunConfig:
    """The published settings, with guidance in all steps."""
    train = Train(steps=10**9, batch_size=batch_size, precision=precision, preview_every=0)
    guided = sections(Stage2(until_step=None))
    return RunConfig("bench", model=model, sections=guided, train=train, log=Log(tensorboard=False))


def _steps(
    accelerator: TimedAccelerator,
    config: RunConfig,
    dataset: Dataset,
    folder: Path,
    rows: Sequence[str],
    seconds: float,
    deadline: float,
) -> dict[str, Any]:
    """Measure the steps of one model: rows and ratios."""
    clock, memory = accelerator.clock, Memory(accelerator.device)
    candidates = build(accelerator, config, dataset, folder, memory, rows)
    before = memory.allocated()
    peaks = Peak(clock, PRECISIONS[config.train.precision])
    memory.own["matmul"] = memory.allocated() - before
    rounds, first = interleaved(candidates, clock, peaks, memory, seconds=seconds, deadline=deadline)
    flops = {name: one.flops for name, one in candidates.items()}
    captured = {
        name: {"replayed": one.replayed, "loss": one.means["flow"], "grad_norm": one.means["grad_norm"]}
        for name, one in candidates.items()
        if name.startswith(CAPTURED)
    }
    del candidates, peaks
    peak = max(2 * int(side) ** 3 / _median(rounds["matmul"], side) for side in rounds["matmul"][0])
    shown = {name: _row(each, config.train.batch_size) for name, each in rounds.items() if name != "matmul"}
    for name, row in shown.items():
        share = None if row["data_ms"] is None else row["data_ms"] / row["ms"]
        row |= {"peak_memory_gb": memory.gigabytes(name), "data_share": share}
        row |= {"utilisation": flops[name] / (row["ms"] / 1e3) / peak, "first_step_s": first[name]}
        row |= captured.get(name, {})
    ratios = {name: _ratios(rounds, *pair) for name, pair in RATIOS.items() if rounds.keys() >= set(pair)}
    return {
        "rounds": len(rounds["matmul"]),
        "matmul_peak_tflops": peak / 1e12,
        "rows": shown,
        "ratios": {name: statistics.median(each) for name, each in ratios.items()},
        "ratios_range": {name: [min(each), max(each)] for name, each in ratios.items()},
    }


def _sampling(clock: Clock, config: RunConfig, dataset: Dataset, *, quick: bool) -> dict[str, Any]:
    """Measure sampling with one model."""
    model = config.build_model(dataset.manifest.shape, dataset.manifest.conditions).to(clock.device)
    randomise(model)
    prepare_sampling(model, clock.device, PRECISIONS[config.train.precision])
    images = (1 if quick else 2) if clock.device.type == "cpu" else 64
    return sampling(model, clock, precision=config.train.precision, images=images, rounds=2 if quick else 3)


def build(
    accelerator: TimedAccelerator,
    config: RunConfig,
    dataset: Dataset,
    folder: Path,
    memory: Memory,
    rows: Sequence[str] = ROWS,
) -> dict[str, Candidate]:
    """The candidates: stages in the trainer, some captured, and plain steps. `memory` records what each allocates."""
    candidates: dict[str, Candidate] = {}
    for name in rows:
        before = memory.allocated()
        memory.begin()
        stage = TRAINED[name.removeprefix(CAPTURED).removeprefix(PLAIN)].stages(config)[-1]
        if name.startswith(PLAIN):
            needed = step_flops_of(config, stage, dataset)
            candidates[name] = TimedPlainStep(
                config, dataset, accelerator.clock, guided=bool(stage.teacher), flops=needed
            )
        else:
            own = config.override({"train.capture": "on" if name.startswith(CAPTURED) else "off"})
            frozen = teacher(stage, config, dataset)
            try:
                one = TrainerStep(accelerator, own, stage, folder / name, dataset, frozen)
            except NotCaptured as error:
                reason = first_line(error.__cause__ or error)
                raise NotCaptured(f"{name} cannot be captured ({reason}); leave it out of --rows") from error
            candidates[name], memory.transient[name] = one, one.transient
        memory.own[name] = memory.allocated() - before
    return candidates


def step_flops_of(config: RunConfig, stage: Stage, dataset: Dataset) -> int:
    """Operations that one step of a stage needs, counted without memory for weights."""
    conditions = dataset.manifest.conditions
    objective = meta_objective(config, stage, dataset.manifest.shape, conditions)
    return sum(step_flops(objective, conditions.example(), config.train.batch_size).values())


def teacher(stage: Stage, config: RunConfig, dataset: Dataset) -> Frozen | None:
    """A model with random weights as the teacher, truncated and cast as in training."""
    if stage.teacher is None:
        return None
    model = config.build_model(dataset.manifest.shape, dataset.manifest.conditions)
    randomise(model)
    return Frozen(model, stage.teacher.block(model.depth), dtype=PRECISIONS[config.train.precision])


def _median(rounds: list[dict[str, float]], part: str) -> float:
    return statistics.median(each[part] for each in rounds)


def _row(rounds: list[dict[str, float]], batch_size: int) -> dict[str, Any]:
    """Medians over rounds, in milliseconds; parts are None where the step was timed as a whole."""
    parts: dict[str, Any] = {part: 1e3 * _median(rounds, part) for part in rounds[0] if part != "total"}
    total = _median(rounds, "total")
    if not any(parts[part] for part in PARTS[:-1]):
        parts = dict.fromkeys(parts)
    return {"images_per_s": batch_size / total, "ms": 1e3 * total} | {f"{k}_ms": v for k, v in parts.items()}


def _ratios(rounds: dict[str, list[dict[str, float]]], numerator: str, denominator: str) -> list[float]:
    pairs = zip(rounds[numerator], rounds[denominator], strict=True)
    return [above["total"] / below["total"] for above, below in pairs]
