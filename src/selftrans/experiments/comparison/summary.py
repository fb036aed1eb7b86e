"""Measured runs => the table: means over seeds, curves, and the steps and compute to reach vanilla's final distance."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from selftrans.experiments.comparison.runner import Results
from selftrans.experiments.comparison.schedule import Job
from selftrans.messages import plural
from selftrans.methods.registry import BASELINE

#: x axis of a curve (student steps, or total compute with the teacher's training) -> column of the table
AXES = {"step": "steps_to_baseline", "tflops": "tflops_to_baseline"}


def rows(
    results: Results, names: Sequence[str], baseline: str = BASELINE, failed: Collection[Job] = ()
) -> list[dict[str, Any]]:
    """The table: one row per variant, with mean and standard deviation over seeds of its last point.

    `failed` runs are counted in their rows, and are in no mean: a row of which no run is left has None.

    `steps_to_baseline` and `tflops_to_baseline` are where a run first reaches the final distance of the baseline with the
    same seed (None if no run does). `reached` counts the runs that do, `at_once` those that do at their first point, which
    may have reached it earlier. `paired`: the runs with such a baseline, where not all have one. Compute is None for a run
    whose teacher's training is unknown.
    """
    table = []
    goals = {seed: points[-1]["distance"] for (one, seed), (_, points) in results.items() if one == baseline}
    for name in names:
        runs = {seed: value for (one, seed), value in results.items() if one == name}
        last = [points[-1] for _, points in runs.values()]
        row: dict[str, Any] = {"method": name, "seeds": len(runs), "steps": last[0]["step"] if last else None}
        row |= {"failed": lost} if (lost := sum(one == name for one, _ in failed)) else {}
        row["seconds"] = spread([point["seconds"] for point in last])
        for key in ("total_seconds", "total_tflops"):
            row[key] = spread([report[key] for report, _ in runs.values()])
        for key in ("distance", "accuracy", "probe"):
            row[key] = spread([point[key] for point in last])
        paired = {seed: run for seed, run in runs.items() if seed in goals}
        row |= {"paired": len(paired)} if goals and len(paired) < len(runs) else {}
        for axis, column in AXES.items() if goals else ():
            if axis == "tflops" and row["total_tflops"] is None:
                row[column] = None
                continue
            reached = [first_below(*curve(run, axis), goals[seed]) for seed, run in paired.items()]
            known = [x for x in reached if x is not None]
            row[column] = spread(known)
            row["reached"] = len(known)
            row["at_once"] = sum(points[0]["distance"] <= goals[seed] for seed, (_, points) in paired.items())
        table.append(row)
    return table


def time_shares(results: Results, seconds: float, workers: int) -> dict[str, Any]:
    """What `workers` processes did in `seconds`: shares of their time for training steps and the rest.

    `training`: building models, compilation, checkpoints. `other`: starting the workers, the reference, waiting for jobs.
    """
    spent = [run["spent"] for run, _ in results.values() if "spent" in run]
    total = max(seconds * workers, 1e-9)
    steps, training, measuring = (sum(each[key] for each in spent) for key in ("steps", "training", "measuring"))
    shares = {"steps": steps / total, "training": max(0.0, training - steps) / total, "measuring": measuring / total}
    return {"seconds": round(seconds, 2), "workers": workers, **shares, "other": max(0.0, 1 - sum(shares.values()))}


def time_line(shares: dict[str, Any]) -> str | None:
    """The shares for a reader; None where no step was trained."""
    if not shares["steps"]:
        return None
    return (
        f"time: {shares['steps']:.0%} training steps, {shares['training']:.0%} models and checkpoints, "
        f"{shares['measuring']:.0%} measuring, {shares['other']:.0%} other, of "
        f"{plural(shares['workers'], 'worker')} in {shares['seconds']:.0f} s"
    )


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean and sample standard deviation (0 for a single value); None if there is no value, or any is unknown."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return {"mean": statistics.fmean(known), "std": statistics.stdev(known) if len(known) > 1 else 0.0}


def curve(run: tuple[dict[str, Any], list[dict[str, Any]]], axis: str = "step") -> tuple[list[float], list[float]]:
    """(x, distance) of one run; compute includes the teacher's training from the first point on."""
    report, points = run
    before = report["total_tflops"] - report["student_tflops"] if axis == "tflops" else 0.0
    return [before + point[axis] for point in points], [point["distance"] for point in points]


def first_below(x: Sequence[float], y: Sequence[float], goal: float) -> float | None:
    """The x at which a curve first reaches `goal`, with x linear in log y between two points; None if it never does."""
    for i, value in enumerate(y):
        if value <= goal:
            if i == 0 or min(goal, value) <= 0:
                return float(x[i])
            share = np.log(y[i - 1] / goal) / np.log(y[i - 1] / value)
            return float(x[i - 1] + share * (x[i] - x[i - 1]))
    return None


def mean_curve(results: Results, name: str, axis: str = "step") -> tuple[list[float], list[float], list[float]]:
    """(x, mean distance, standard deviation) of a variant over its seeds, at the steps measured for all of them.

    Empty without runs, and if the compute is unknown and `axis` needs it.
    """
    runs = [run for (one, _), run in results.items() if one == name]
    if not runs or (axis == "tflops" and any(report["total_tflops"] is None for report, _ in runs)):
        return [], [], []
    shared = set[int].intersection(*({point["step"] for point in points} for _, points in runs))
    pairs = [curve((report, [point for point in points if point["step"] in shared]), axis) for report, points in runs]
    x, values = np.array([pair[0] for pair in pairs]).mean(axis=0), np.array([pair[1] for pair in pairs])
    deviation = values.std(axis=0, ddof=1) if len(pairs) > 1 else 0 * values[0]
    return x.tolist(), values.mean(axis=0).tolist(), deviation.tolist()


def as_csv(table: list[dict[str, Any]]) -> str:
    """The table with a column for each mean and each standard deviation."""
    text = io.StringIO()
    flat: list[dict[str, Any]] = []
    for row in table:
        flat.append({})
        for key, cell in row.items():
            flat[-1] |= {key: cell["mean"], f"{key}_std": cell["std"]} if isinstance(cell, dict) else {key: cell}
    columns = list(dict.fromkeys(column for row in flat for column in row))
    writer = csv.DictWriter(text, fieldnames=columns)
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()
