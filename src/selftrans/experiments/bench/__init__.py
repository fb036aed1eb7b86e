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

from selftrans.config import Log, RunConfig, Train, sections
from selftrans.data.dataset import Dataset
from selftrans.device import default_device
from selftrans.experiments.bench.loading_sampling import loading, prepare_sampling, random_dataset, sampling
from selftrans.experiments.bench.machine import Clock, Peak, describe, load
from selftrans.experiments.bench.rounds import (
    Candidate,
    FieldStep,
    Memory,
    TimedAccelerator,
    TrainerStep,
    interleaved,
    randomise,
)
from selftrans.experiments.bench.text_table import table
from selftrans.methods.guidance import Frozen
from selftrans.methods.self_transcendence import SELF_TRANSCENDENCE, STRUCTURE, Stage2
from selftrans.methods.spec import Stage
from selftrans.methods.vanilla import VANILLA
from selftrans.models.sit import SiTConfig
from selftrans.storage import write_json
from selftrans.train.processes import keep_memory

CLASSES = 1000
#: default batch size: SiT-S takes as long for ten images as the larger models for six
BATCH = {"cpu": {"SiT-S/2": 10}, "cuda": {"SiT-S/2": 256, "SiT-B/2": 256}}
OTHERWISE = {"cpu": 6, "cuda": 64}
QUICK = 90  #: seconds for the steps of a quick run
#: what is measured: three stages in the trainer, and two plain steps
ROWS = ("vanilla", "stage1", "stage2", "plain_vanilla", "plain_stage2")
#: name -> (numerator, denominator), both rows of the table
RATIOS = {
    "stage1_over_vanilla": ("stage1", "vanilla"),
    "stage2_over_vanilla": ("stage2", "vanilla"),
    "plain_stage2_over_stage2": ("plain_stage2", "stage2"),
    "plain_stage2_over_vanilla": ("plain_stage2", "vanilla"),
    "plain_vanilla_over_vanilla": ("plain_vanilla", "vanilla"),
}
#: row -> the row whose operations are counted for it, so that utilisation counts only what the method needs
NEEDS = {"plain_vanilla": "vanilla", "plain_stage2": "stage2"}


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
) -> dict[str, Any]:
    """Measure each model and write `out/bench.json`; returns its content.

    Args:
        models: name -> sizes.
        batch_size: images per step; None: by model and device (BATCH).
        tokens: T, a square number.
        device: None: a GPU if there is one. A GPU is measured in bfloat16 and compiled, a CPU in float32 and eager.
        seconds: time for the training steps of each model (at least three rounds).
        quick: less time, and fewer latents and images.
        rows: names of the steps that are measured; None: all of ROWS. A ratio needs both of its rows.
        limit: seconds for each model in all, building and compilation included; at least one round is measured, and sampling
            is left out when the time is over. None: no limit.
    The file is written after each model. A model that does not fit in memory is reported as failed.
    Raises ValueError when tokens is not a square number, and for an unavailable device.
    """
    rows, where = tuple(dict.fromkeys(rows or ROWS)), torch.device(device or default_device().type)
    _check(models, rows, where, batch_size, tokens)
    precision: Literal["fp32", "bf16"] = "bf16" if where.type == "cuda" else "fp32"
    accelerator = TimedAccelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=where.type == "cpu")
    if where.type == "cpu":
        keep_memory()  # as `train` does; the plain steps profit too
    accelerator.clock, accelerator.timestamps = Clock(accelerator.device), []
    report: dict[str, Any] = {"machine": describe(accelerator.device, precision), "models": {}}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in models.items():
            side = math.isqrt(tokens) * model.sizes()["patch"]
            dataset = random_dataset(Path(scratch) / f"{side}", (4, side, side), 2048 if quick else 8192)
            batch = batch_size or BATCH[where.type].get(name, OTHERWISE[where.type])
            config = settings(model, batch, precision)
            torch.compiler.reset()  # compilations of the previous model
            try:
                budget = Budget(seconds, limit, quick)
                result = _model(accelerator, config, dataset, Path(scratch) / name.replace("/", "-"), budget, rows)
            except torch.OutOfMemoryError:
                result = {"failed": f"not enough memory for {len(rows)} candidates; give a smaller --batch-size"}
            report["models"][name] = {"batch": batch, "tokens": tokens} | result
            write_json(out / "bench.json", report)
            accelerator.free_memory()
        report["loading"] = loading(dataset, accelerator.clock, batches=8 if quick else 40)
    report["machine"]["load_after"] = load()
    report["ratios"] = next((model["ratios"] for model in report["models"].values() if "ratios" in model), {})
    write_json(out / "bench.json", report)
    return report


def _check(
    models: Mapping[str, SiTConfig], rows: Sequence[str], where: torch.device, batch_size: int | None, tokens: int
) -> None:
    """ValueError as `bench`."""
    if unknown := [name for name in rows if name not in ROWS]:
        raise ValueError(f"row {unknown[0]!r} is unknown; choose from {', '.join(ROWS)}")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no GPU that torch can use; omit --device")
    for model in models.values():
        model.sizes()
    if tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"tokens {tokens} is not a square number; use 64, 256 or 1024")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size {batch_size} should be 1 or more")


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


class Budget:
    """The time for one model, from its construction on."""

    def __init__(self, seconds: float, limit: float | None, quick: bool) -> None:
        self.seconds, self.quick = min(seconds, QUICK) if quick else seconds, quick  #: for the rounds
        self.deadline = None if limit is None else time.monotonic() + limit

    @property
    def over(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


def _model(
    accelerator: TimedAccelerator,
    config: RunConfig,
    dataset: Dataset,
    folder: Path,
    budget: Budget,
    rows: Sequence[str],
) -> dict[str, Any]:
    """Measure one model: rows, ratios, sampling."""
    clock, memory = accelerator.clock, Memory(accelerator.device)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    candidates = build(accelerator, config, dataset, folder, memory, rows)
    before = memory.allocated()
    peaks = Peak(clock, dtype)
    memory.own["matmul"] = memory.allocated() - before
    first: dict[str, float] = {}
    timing = {"seconds": budget.seconds, "deadline": budget.deadline}
    rounds = interleaved(candidates, clock, peaks, memory, **timing, first=first)  # type: ignore[arg-type]
    flops = {name: one.flops for name, one in candidates.items() if isinstance(one, TrainerStep)}
    del candidates, peaks
    peak = max(2 * int(side) ** 3 / _median(rounds["matmul"], side) for side in rounds["matmul"][0])
    shown = {name: _row(each, config.train.batch_size) for name, each in rounds.items() if name != "matmul"}
    for name, row in shown.items():
        row |= {"peak_memory_gb": memory.gigabytes(name), "data_share": row["data_ms"] / row["ms"]}
        counted = flops.get(NEEDS.get(name, name))
        row |= {"utilisation": None if counted is None else counted / (row["ms"] / 1e3) / peak}
        row |= {"first_step_s": first[name]}
    ratios = {name: _ratios(rounds, *pair) for name, pair in RATIOS.items() if set(pair) <= set(rounds)}
    found: dict[str, Any] = {
        "rounds": len(rounds["matmul"]),
        "matmul_peak_tflops": peak / 1e12,
        "rows": shown,
        "ratios": {name: statistics.median(each) for name, each in ratios.items()},
        "ratios_range": {name: [min(each), max(each)] for name, each in ratios.items()},
    }
    if budget.over:
        return found
    model = config.build_model(dataset.manifest.shape, dataset.manifest.conditions).to(accelerator.device)
    randomise(model)
    images = (1 if budget.quick else 2) if clock.device.type == "cpu" else 64
    prepare_sampling(model, clock.device, dtype)
    sampled = sampling(model, clock, precision=config.train.precision, images=images, rounds=2 if budget.quick else 3)
    found["ratios"] |= {"sampling_interval_over_full": sampled["interval_over_full"]}
    return found | {"sampling": sampled}


def build(
    accelerator: TimedAccelerator,
    config: RunConfig,
    dataset: Dataset,
    folder: Path,
    memory: Memory,
    rows: Sequence[str] = ROWS,
) -> dict[str, Candidate]:
    """The candidates: stages in the trainer, and plain steps. `memory` records what each allocates."""
    runs = {"vanilla": VANILLA, "stage1": STRUCTURE, "stage2": SELF_TRANSCENDENCE}
    candidates: dict[str, Candidate] = {}
    for name in rows:
        before = memory.allocated()
        if name in runs:
            stage = runs[name].stages(config)[-1]
            frozen = teacher(stage, config, dataset)
            candidates[name] = TrainerStep(accelerator, config, stage, folder / name, dataset, frozen)
        else:
            candidates[name] = FieldStep(config, dataset, accelerator.clock, guided=name == "plain_stage2")
        memory.own[name] = memory.allocated() - before
    return candidates


def teacher(stage: Stage, config: RunConfig, dataset: Dataset) -> Frozen | None:
    """A model with random weights as the teacher, truncated and cast as in training."""
    if stage.teacher is None:
        return None
    model = config.build_model(dataset.manifest.shape, dataset.manifest.conditions)
    randomise(model)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else None
    return Frozen(model, stage.teacher.block(model.depth), dtype=dtype)


def _median(rounds: list[dict[str, float]], part: str) -> float:
    return statistics.median(each[part] for each in rounds)


def _row(rounds: list[dict[str, float]], batch_size: int) -> dict[str, Any]:
    """Medians over rounds, in milliseconds."""
    parts = {f"{part}_ms": 1e3 * _median(rounds, part) for part in rounds[0] if part != "total"}
    total = _median(rounds, "total")
    return {"images_per_s": batch_size / total, "ms": 1e3 * total} | parts


def _ratios(rounds: dict[str, list[dict[str, float]]], numerator: str, denominator: str) -> list[float]:
    pairs = zip(rounds[numerator], rounds[denominator], strict=True)
    return [above["total"] / below["total"] for above, below in pairs]


__all__ = ["bench", "build", "published", "settings", "table"]
