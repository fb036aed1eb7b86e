"""`selftrans bench`: the step, loading and sampling, measured on this machine together with the field's plain arithmetic.

One run, interleaved rounds, medians; ratios are medians over the rounds of the ratio within a round. `bench.json` holds
what the table shows. Shape legend: N batch, T tokens, (C, H, W) latent.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from selftrans.config import Log, RunConfig, Train, sections
from selftrans.data.dataset import Dataset
from selftrans.device import default_device
from selftrans.experiments.bench.loading_sampling import loading, made_up, prepare_sampling, sampling
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
#: default number of images a step: SiT-S takes ten in the time that the others take six
BATCH = {"cpu": {"SiT-S/2": 10}, "cuda": {"SiT-S/2": 256, "SiT-B/2": 256}}
OTHERWISE = {"cpu": 6, "cuda": 64}
QUICK = 90  #: seconds for the steps of a quick run
#: name -> (numerator, denominator), both rows of the table
RATIOS = {
    "stage1_over_vanilla": ("stage1", "vanilla"),
    "stage2_over_vanilla": ("stage2", "vanilla"),
    "plain_stage2_over_stage2": ("plain_stage2", "stage2"),
    "plain_stage2_over_vanilla": ("plain_stage2", "vanilla"),
    "plain_vanilla_over_vanilla": ("plain_vanilla", "vanilla"),
}
#: row -> the row whose operations are counted for it: what the method needs, however it is computed
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
) -> dict[str, Any]:
    """Measure each model and write `out/bench.json`; returns what it holds.

    Args:
        models: name -> sizes. batch_size: images a step; None: by model and device (BATCH). tokens: T, a square.
        device: None: a GPU if there is one, in bfloat16 and compiled; a CPU in float32, eager.
        seconds: for the training steps of each model, at least three rounds. quick: fewer latents and images, too.
    The file grows model by model; one that does not fit in memory is reported as failed, and the next one follows.
    Raises ValueError for tokens that are no square, and for a device that is not there.
    """
    where = torch.device(device or default_device().type)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no GPU that torch can use; leave it out")
    for model in models.values():
        model.sizes()
    if tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"tokens {tokens} is not a square number; use 64, 256 or 1024")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size {batch_size} should be 1 or more")
    precision: Literal["fp32", "bf16"] = "bf16" if where.type == "cuda" else "fp32"
    accelerator = TimedAccelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=where.type == "cpu")
    if where.type == "cpu":
        keep_memory()  # as `train` does; the plain steps gain from it too
    accelerator.clock, accelerator.timestamps = Clock(accelerator.device), []
    report: dict[str, Any] = {"machine": describe(accelerator.device, precision), "models": {}}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in models.items():
            side = math.isqrt(tokens) * model.sizes()["patch"]
            shards = made_up(Path(scratch) / f"{side}", (4, side, side), 2048 if quick else 8192)
            batch = batch_size or BATCH[where.type].get(name, OTHERWISE[where.type])
            config = settings(model, batch, precision)
            torch.compiler.reset()  # the last model's compilations
            try:
                found = _model(accelerator, config, shards, Path(scratch) / name.replace("/", "-"), seconds, quick)
            except torch.OutOfMemoryError:
                found = {"failed": "not enough memory for five candidates; give a smaller --batch-size"}
            report["models"][name] = {"batch": batch, "tokens": tokens} | found
            write_json(out / "bench.json", report)
            accelerator.free_memory()
        report["loading"] = loading(shards, accelerator.clock, batches=8 if quick else 40)
    report["machine"]["load_after"] = load()
    report["ratios"] = next((found["ratios"] for found in report["models"].values() if "ratios" in found), {})
    write_json(out / "bench.json", report)
    return report


def published(names: Sequence[str] | None, device: str | None, *, quick: bool = False) -> dict[str, SiTConfig]:
    """Models by their published names; None: the default ones of the device."""
    gpu = torch.cuda.is_available() if device is None else device == "cuda"
    usual = ("SiT-S/2",) if quick else ("SiT-S/2", "SiT-B/2", "SiT-XL/2") if gpu else ("SiT-S/2", "SiT-B/2")
    return {name: SiTConfig(name=name) for name in names or usual}


def settings(model: SiTConfig, batch_size: int, precision: Literal["fp32", "bf16"]) -> RunConfig:
    """The published settings, with guidance that does not end."""
    train = Train(steps=10**9, batch_size=batch_size, precision=precision, preview_every=0)
    guided = sections(Stage2(until_step=None))
    return RunConfig("bench", model=model, sections=guided, train=train, log=Log(tensorboard=False))


def _model(
    accelerator: TimedAccelerator, config: RunConfig, shards: Dataset, folder: Path, seconds: float, quick: bool
) -> dict[str, Any]:
    """Everything about one model: rows, ratios, sampling."""
    clock, memory = accelerator.clock, Memory(accelerator.device)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    candidates = build(accelerator, config, shards, folder, memory)
    before = memory.allocated()
    peaks = Peak(clock, dtype)
    memory.own["matmul"] = memory.allocated() - before
    rounds = interleaved(candidates, clock, peaks, memory, seconds=min(seconds, QUICK) if quick else seconds)
    flops = {name: one.flops for name, one in candidates.items() if isinstance(one, TrainerStep)}
    del candidates, peaks
    peak = max(2 * int(side) ** 3 / _median(rounds["matmul"], side) for side in rounds["matmul"][0])
    shown = {name: _row(each, config.train.batch_size) for name, each in rounds.items() if name != "matmul"}
    for name, row in shown.items():
        row |= {"peak_memory_gb": memory.gigabytes(name), "data_share": row["data_ms"] / row["ms"]}
        row |= {"utilisation": flops[NEEDS.get(name, name)] / (row["ms"] / 1e3) / peak}
    model = config.build_model(shards.manifest.shape, shards.manifest.conditions).to(accelerator.device)
    randomise(model)
    images = (1 if quick else 2) if clock.device.type == "cpu" else 64
    prepare_sampling(model, clock.device, dtype)
    sampled = sampling(model, clock, precision=config.train.precision, images=images, rounds=2 if quick else 3)
    ratios = {name: _ratios(rounds, *pair) for name, pair in RATIOS.items()}
    return {
        "rounds": len(rounds["matmul"]),
        "matmul_peak_tflops": peak / 1e12,
        "rows": shown,
        "ratios": {name: statistics.median(each) for name, each in ratios.items()}
        | {"sampling_interval_over_full": sampled["interval_over_full"]},
        "ratios_range": {name: [min(each), max(each)] for name, each in ratios.items()},
        "sampling": sampled,
    }


def build(
    accelerator: TimedAccelerator, config: RunConfig, shards: Dataset, folder: Path, memory: Memory
) -> dict[str, Candidate]:
    """The candidates: three stages as the trainer runs them, and two plain ones. `memory` records what each holds."""
    runs = {"vanilla": VANILLA, "stage1": STRUCTURE, "stage2": SELF_TRANSCENDENCE}
    candidates: dict[str, Candidate] = {}
    for name in (*runs, "plain_vanilla", "plain_stage2"):
        before = memory.allocated()
        if name in runs:
            stage = runs[name].stages(config)[-1]
            given = teacher(stage, config, shards)
            candidates[name] = TrainerStep(accelerator, config, stage, folder / name, shards, given)
        else:
            candidates[name] = FieldStep(config, shards, accelerator.clock, guided=name == "plain_stage2")
        memory.own[name] = memory.allocated() - before
    return candidates


def teacher(stage: Stage, config: RunConfig, shards: Dataset) -> Frozen | None:
    """A model with random weights in place of a trained one, truncated and cast as in training."""
    if stage.teacher is None:
        return None
    model = config.build_model(shards.manifest.shape, shards.manifest.conditions)
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
    return [ours["total"] / theirs["total"] for ours, theirs in pairs]


__all__ = ["bench", "build", "published", "settings", "table"]
