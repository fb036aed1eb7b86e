"""Methods side by side: the same model, data, seeds, sampler and metric for each; resumable; one table, one set of curves.

Every run is an ordinary run directory `OUT/<method>-seed<k>`, its checkpoints are the points of its curve, and each
point is measured once and kept in `measured.json` beside them. Shape legend: n images, (R, R, C) uint8 image.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selftrans.analyse.features import collect, linear_probe
from selftrans.config import RunConfig
from selftrans.data.shards import Shards
from selftrans.evaluate.classifier import write_beside
from selftrans.evaluate.features import Extractor
from selftrans.evaluate.metrics import evaluate
from selftrans.evaluate.statistics import Statistics
from selftrans.flow import PATHS
from selftrans.latents import load_autoencoder
from selftrans.measure import data_latents, shard_images
from selftrans.sample import EVALUATIONS, sample_images
from selftrans.train import checkpoint
from selftrans.train.pipeline import train
from selftrans.train.restore import FILES, restore

POINTS = 6  #: measurements along a run
PROBE_T = 0.4  #: noise level of the linear probe, the paper's


@dataclass(frozen=True)
class Ruler:
    """What everything is measured with."""

    extractor: Extractor
    reference: Statistics
    shards: Shards
    images: int  #: samples for each distance
    block: int  #: the shallow block that is probed (1-based)


def ruler(shards: Shards, extractor: Extractor, *, images: int, block: int) -> Ruler:
    """Measure against the data themselves."""
    reference = Statistics.of(shard_images(shards), extractor, source="training data")
    return Ruler(extractor, reference, shards, images, block)


class Progress:
    """One bar over all runs and measurements, counted in training steps, so that its time left is honest."""

    def __init__(self, total: int) -> None:
        from selftrans.train.log import progress_bar

        self.bar = progress_bar(total=total, unit="step")

    def inner(self, **options: Any) -> _Inner:
        """Stands in for a run's own bar."""
        self.bar.update(options["initial"])
        return _Inner(self.bar)

    def say(self, text: str) -> None:
        self.bar.set_description(text)


class _Inner:
    """A run's steps, counted on the bar of the whole."""

    def __init__(self, bar: Any) -> None:
        self.update = bar.update
        self.set_postfix = bar.set_postfix

    def close(self) -> None:
        """The bar of the whole stays open."""


def measuring_cost(config: RunConfig, images: int) -> int:
    """What measuring one checkpoint costs, in training steps (a step is three forward passes of its batch)."""
    passes = config.sample.steps * EVALUATIONS[config.sample.sampler] * images / config.train.batch_size
    return max(1, round(passes / 3))


def interval(steps: int) -> int:
    """Steps between two measurements."""
    return max(1, steps // POINTS)


def points(steps: int) -> int:
    """How many measurements a run of `steps` gets: every interval, and the end."""
    return -(-steps // interval(steps))


def run_one(config: RunConfig, method: str, seed: int, out: Path, progress: Progress) -> Path:
    """Train one method with one seed (or continue it), every point a checkpoint; returns its run directory."""
    run = out / f"{method}-seed{seed}"
    settings = dataclasses.replace(
        config.train, seed=seed, checkpoint_every=interval(config.train.steps), keep=0, preview_every=0
    )
    config = dataclasses.replace(config, method=method, train=settings)
    teacher = shared_teacher(config, out / f"structure-seed{seed}") if method == "self_transcendence" else None
    config = dataclasses.replace(config, stage2=dataclasses.replace(config.stage2, teacher=teacher))
    progress.say(f"{method}, seed {seed}")
    train(config, run, bar=progress.inner, quiet=True)
    return run


def shared_teacher(config: RunConfig, structure: Path) -> str | None:
    """A checkpoint of the stage-1 run that equals, bit for bit, the teacher that self_transcendence would train for itself."""
    steps = config.stage1.steps or max(1, config.train.steps // 2)
    return next(
        (str(path) for step, path in checkpoint.steps(structure / "stage1" / "checkpoints") if step == steps), None
    )


def measure_run(run: Path, ruler: Ruler, progress: Progress, cost: int) -> list[dict[str, Any]]:
    """Every checkpoint of a run's last stage measured, oldest first; what was measured before is read, not repeated."""
    stage = json.loads((run / "run.json").read_text())["stages"][-1]["stage"]
    path = run / "measured.json"
    known = {entry["sha256"]: entry for entry in (json.loads(path.read_text()) if path.exists() else [])}
    entries = []
    for _, folder in checkpoint.steps(run / stage / "checkpoints"):
        digest = checkpoint.read(folder).state["sha256"][FILES["ema"]]
        entries.append(known.get(digest) or measure_checkpoint(folder, ruler) | {"sha256": digest})
        progress.bar.update(cost)
        write_beside(path, lambda file: file.write(json.dumps(entries, indent=1).encode()))
    return entries


def measure_checkpoint(folder: Path, ruler: Ruler) -> dict[str, Any]:
    """Distance, accuracy and shallow probe of a checkpoint's EMA, and what it has cost until there."""
    found = restore(folder, weights="ema")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, config = found.model.to(device), dataclasses.replace(found.config.sample, num=ruler.images, batch_size=500)
    autoencoder = load_autoencoder(found.autoencoder, device=device)
    path = PATHS[found.config.train.path]
    batches = list(sample_images(model, autoencoder, config, num_classes=model.num_classes, device=device, path=path))
    labels = np.concatenate([labels for _, labels, _ in batches])
    images = (images for _, _, images in batches)
    report = evaluate(images, ruler.reference, ruler.extractor, labels=labels, metrics=("frechet", "accuracy"))
    spent = checkpoint.read_header(folder / FILES["ema"])
    return {
        "step": found.step,
        "seconds": spent["seconds"],
        "tflops": spent["tflops"],
        "metric": report["label"],
        "distance": report[report["metric"]],
        "accuracy": report.get("accuracy"),
        "probe": probe(found.model, ruler, path),
        "sampler": config.settings(),
        "images": ruler.images,
        "extractor_sha256": report["extractor_sha256"],
    }


def probe(model: Any, ruler: Ruler, path: Any, most: int = 4000) -> float:
    """Accuracy of a linear classifier on the shallow block's features at t = 0.4, under the null condition."""
    z0, labels = data_latents(ruler.shards, most)
    feats = collect(model, z0, model.null(labels), t=PROBE_T, taps=(ruler.block,), path=path)
    return linear_probe(feats[ruler.block], labels, kind="ridge")


def rows(
    results: dict[tuple[str, int], tuple[dict[str, Any], list[dict[str, Any]]]], methods: Sequence[str]
) -> list[dict]:
    """The table: one row per method, mean and standard deviation over seeds of its last point.

    `results` maps (method, seed) to the run's report and its measured points.
    """
    table = []
    for method in methods:
        runs = [value for (name, _), value in results.items() if name == method]
        last = [measured[-1] for _, measured in runs]
        row: dict[str, Any] = {"method": method, "seeds": len(runs), "steps": last[0]["step"]}
        row["seconds"] = _spread([point["seconds"] for point in last])
        row["total_tflops"] = _spread([report["total_tflops"] for report, _ in runs])
        for key in ("distance", "accuracy", "probe"):
            row[key] = _spread([point[key] for point in last]) if last[0][key] is not None else None
        table.append(row)
    return table


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def mean_curve(
    runs: Sequence[list[dict[str, Any]]], key: str = "distance"
) -> tuple[list[float], list[float], list[float]]:
    """(steps, mean, standard deviation) over seeds."""
    steps = [point["step"] for point in runs[0]]
    values = np.array([[point[key] for point in measured] for measured in runs])
    return (
        steps,
        values.mean(axis=0).tolist(),
        (values.std(axis=0, ddof=1) if len(runs) > 1 else 0 * values[0]).tolist(),
    )
