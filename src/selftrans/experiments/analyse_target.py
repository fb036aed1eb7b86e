"""`selftrans analyse --target`: what the features that a student is guided by consist of, per block and strength of guidance.

A teacher ⇒ shares, sizes, probes and maps: a table, target.json, target.png and target-maps.png.
Shape legend: N pictures, T tokens, D width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selftrans.checkpoints.load import Weights
from selftrans.data.dataset import Dataset
from selftrans.device import default_device
from selftrans.evaluate.probes import spread_blocks
from selftrans.evaluate.target_measures import Parts, Plan, chance, sum_target
from selftrans.evaluate.target_share import Design
from selftrans.experiments.evaluate_samples import finished
from selftrans.experiments.target_report import draw_maps, draw_measures
from selftrans.experiments.target_teacher import ENCODER, Pictures, Teacher, mean_text, open_teacher
from selftrans.messages import are, plural
from selftrans.progress import progress_bar
from selftrans.storage import check_writable

TIMES = (0.4, 0.5, 0.6, 0.7)  #: of the noisy latents: the published range in which guidance acts
PER_CLASS = 16  #: fewest pictures per class on average; where there are too many classes for that, some are left out
HELD = 4  #: one of HELD pictures is held out
SPREAD = 8  #: number of blocks of a deep model that are measured by default
MAPPED = 8  #: pictures with maps: pairs of a class


def analyse_target(
    origin: str | Path,
    out: Path,
    *,
    data: str | None,
    timesteps: Sequence[float],
    samples: int,
    weights: Weights | None,
    stage: str | None,
    blocks: Sequence[int] | None,
    scales: Sequence[float],
    encoder: bool,
    grid: int | None,
    seed: int,
    show: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure what a teacher's target consists of, write pictures and target.json to `out`, and return the latter.

    origin: what `target_teacher.open_teacher` opens. timesteps: pictures are probed at the first. scales: w. blocks: None is
    every block, or eight of a deep model. samples: pictures, a quarter of which is held out of fitting tables and probes.
    show: called with the report before anything is written.
    ValueError for values out of range, and for data that do not fit.
    """
    check(timesteps, samples, scales, seed)
    check_writable(out / "target.json", size=1 << 20)
    if grid is not None and (not encoder or grid < 1):
        raise ValueError(f"--grid belongs to --encoder, and is at least 1; it is {grid}")
    teacher = open_teacher(
        origin, encoder=encoder, data=data, grid=grid, stage=stage, weights=weights, device=default_device()
    )
    chosen = _blocks(teacher, blocks)
    times = tuple(timesteps) if teacher.depth else (0.0,)
    strengths = tuple(dict.fromkeys(w for w in scales if w)) if teacher.kind != "none" else ()
    pictures = choose_pictures(teacher.dataset, samples, seed)
    plan = _plan(teacher.dataset, pictures, len(times), strengths)
    mapped, kept = _pairs(pictures), dict[str, dict[int, Tensor]]()
    source = teacher.parts(pictures, times, chosen, seed)
    with progress_bar(total=len(pictures.rows) * len(times), desc="target", unit="img") as bar:
        sums = sum_target(_keeping(source, mapped, kept, bar), plan)
    what = "shares" if plan.labels is None else "probes"
    measured = {str(k): sums[k].report() for k in progress_bar(iterable=sums, desc=what, unit="block")}
    report = _settings(teacher, pictures, plan, times, seed) | {"blocks": measured}
    finished(report, out / "target.json", show)
    draw_measures(report, out / "target.png")
    draw_maps(report, teacher.dataset, pictures.rows[mapped], kept, teacher.grid, out / "target-maps.png")
    return report


def _settings(teacher: Teacher, pictures: Pictures, plan: Plan, times: tuple[float, ...], seed: int) -> dict[str, Any]:
    """What the report says of the teacher, the pictures, and how they are measured."""
    return {
        "teacher": teacher.about | {"title": teacher.title, "block": teacher.block, "precision": "fp32"},
        "data": teacher.dataset.origin,
        "pictures": _counts(pictures, plan),
        "condition": teacher.dataset.manifest.conditions.kind,
        "predicted_from": _predictor(teacher.dataset, plan),
        "timesteps": list(times) if teacher.depth else [],
        "probes_at": times[0] if teacher.depth and plan.labels is not None else None,
        "scales": list(plan.scales),
        "seed": seed,
        "chance": None if plan.labels is None else chance(plan.labels, plan.fitted),
    }


def check(timesteps: Sequence[float], samples: int, scales: Sequence[float], seed: int) -> None:
    """ValueError for options out of range."""
    if samples < 40:
        raise ValueError(
            f"{plural(samples, 'picture')} {are(samples)} too few to fit a table on and to hold others out; give at least 40"
        )
    if not timesteps or not all(0 <= t <= 1 for t in timesteps):
        raise ValueError(f"timesteps {list(timesteps)} must be one or more numbers from 0 (data) to 1 (noise)")
    if not scales or not all(math.isfinite(w) for w in scales):
        raise ValueError(f"scales {list(scales)} must be one or more finite numbers, such as 1 5 30")
    if not 0 <= seed < 1 << 31:
        raise ValueError(f"seed {seed} must be from 0 to 2147483647")


def choose_pictures(dataset: Dataset, samples: int, seed: int) -> Pictures:
    """At most `samples` pictures, drawn by `seed`; a quarter of them, and of each class, is held out.

    With more classes than there are PER_CLASS pictures for, classes are drawn, too. Classes with fewer than HELD pictures are
    left out. ValueError where nothing is left.
    """
    rng, labels = np.random.default_rng(seed), dataset.labels
    order, present = rng.permutation(len(dataset)), np.unique(labels)
    most = max(2, samples // PER_CLASS)
    if len(present) > most:
        warnings.warn(f"{most} of {len(present)} classes are measured, {PER_CLASS} pictures of each", stacklevel=3)
        present = np.sort(rng.choice(present, most, replace=False))
    rows = order[np.isin(labels[order], present)][:samples]
    of_class = [rows[labels[rows] == label] for label in present]
    enough = [each for each in of_class if len(each) >= HELD]
    if few := len(of_class) - len(enough):
        have = "has" if few == 1 else "have"
        said = f"{plural(few, 'class')} {have} fewer than {HELD} pictures among these, and {are(few)} left out"
        warnings.warn(said, stacklevel=3)
    if not enough:
        raise ValueError(f"{dataset.path} has too few {dataset.manifest.unit} of each class; give more")
    every = slice(HELD - 1, None, HELD)
    held = np.concatenate([each[every] for each in enough])
    both = np.concatenate([*(np.delete(each, every) for each in enough), held])
    others = rng.choice(np.unique(labels[both]), len(both))
    fitted = torch.arange(len(both)) < len(both) - len(held)
    return Pictures(both, torch.from_numpy(labels[both]), torch.from_numpy(others), fitted)


def _plan(dataset: Dataset, pictures: Pictures, times: int, scales: tuple[float, ...]) -> Plan:
    """Table and probes of data with classes; a regression on the text of data with captions."""
    kind, labels = dataset.manifest.conditions.kind, pictures.labels
    if kind == "text":
        warnings.warn(f"no probes: {dataset.path} has captions, and no classes to be probed", stacklevel=3)
        design = Design.of_vectors(mean_text(dataset.text(pictures.rows)), pictures.fitted)
        return Plan(pictures.fitted, times, scales, design)
    if len(torch.unique(labels)) < 2:
        reason = "they have one class" if kind == "labels" else "they have no conditions, so no guidance"
        warnings.warn(f"no table by label and no probes of {dataset.path}: {reason}", stacklevel=3)
        return Plan(pictures.fitted, times, scales, None)
    return Plan(pictures.fitted, times, scales, Design.of_labels(labels), labels, pictures.others)


def _predictor(dataset: Dataset, plan: Plan) -> str | None:
    if plan.design is None:
        return None
    if plan.labels is not None:
        return "table of means by label and token"
    return f"ridge regression on the mean text embedding of {dataset.manifest.conditions.width} channels"


def _blocks(teacher: Teacher, blocks: Sequence[int] | None) -> tuple[int, ...]:
    depth = teacher.depth
    if not depth:
        return (ENCODER,)
    if blocks is None:
        return spread_blocks(depth, SPREAD, [teacher.block])
    if not blocks or min(blocks) < 1 or max(blocks) > depth:
        raise ValueError(f"blocks {list(blocks)} are not in a model of {depth} blocks; choose from 1 to {depth}")
    return tuple(sorted(set(blocks)))


def _pairs(pictures: Pictures) -> Tensor:
    """Positions of at most MAPPED held-out pictures: two of each of the first classes, next to each other."""
    held = torch.nonzero(~pictures.fitted)[:, 0]
    of_class = [held[pictures.labels[held] == label] for label in torch.unique(pictures.labels[held])]
    pairs = torch.cat([each[:2] for each in of_class if len(each) > 1 and len(of_class) > 1] or [held])
    return pairs[:MAPPED]


def _keeping(parts: Iterable[Parts], chosen: Tensor, kept: dict[str, dict[int, Tensor]], bar: Any) -> Iterator[Parts]:
    """Yield the same parts, counted by `bar`; stores in `kept` the features of the pictures `chosen` (n,), in their order, at
    the first timestep."""
    for batch in parts:
        at, where = torch.nonzero(batch.rows[:, None] == chosen[None, :], as_tuple=True)
        if batch.time == 0 and len(at):
            for name, feats in (("u", batch.u), ("own", batch.own)):
                for k, values in (feats or {}).items():
                    store = kept.setdefault(name, {}).setdefault(k, values.new_zeros(len(chosen), *values.shape[1:]))
                    store[where] = values[at]
        yield batch
        bar.update(len(batch.rows))


def _counts(pictures: Pictures, plan: Plan) -> dict[str, Any]:
    fitted = pictures.fitted
    counts = {"fitted": int(fitted.sum()), "held_out": int((~fitted).sum())}
    if plan.labels is None:
        return counts
    each = torch.unique(pictures.labels[fitted], return_counts=True)[1]
    return counts | {"classes": len(each), "fitted_per_class": [int(each.min()), int(each.max())]}
