"""The figures of the pages in docs/results/, from the runs of `selftrans compare` and `ablations.py` in a directory.

    python benchmarks/figures.py results/digits --out docs/figures --name digits
    python benchmarks/figures.py docs/figures/digits.json --out docs/figures --name digits    # drawn again, from its numbers

Writes <name>-probes.png (linear-probe accuracy per block and timestep of every method), <name>-norms.png (feature and
target norms over training, per target), <name>-ablations.png (convergence, one panel per question) and <name>.json with the
numbers. Methods and variants without a run in the directory are left out. A file of numbers may also hold the compare.json of
`selftrans compare` as "compare": its curves become <name>.png, with the baseline's longer runs over all compute (LONGER).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from selftrans.checkpoints.load import load_model
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import data_latents
from selftrans.evaluate.plots import blank_figure, draw_lines, plain_ticks, save, style_axes
from selftrans.evaluate.probes import collect, linear_probe
from selftrans.experiments.html_report import convergence
from selftrans.flow import PATHS
from selftrans.storage import write_json
from selftrans.train.log import read_log

METHODS = ("vanilla", "structure", "self_transcendence", "repa", "sra", "layersync", "dispersive")
TIMESTEPS = (0.2, 0.4, 0.6, 0.8)
#: question -> the variants that answer it
QUESTIONS = {
    "w": ("vanilla", "w1", "w2", "self_transcendence", "w5", "w10", "w30"),
    "range": ("vanilla", "self_transcendence", "scale-mode", "all-times"),
    "timesteps": ("vanilla", "vanilla-uniform", "self_transcendence", "uniform-times"),
    "target": ("vanilla", "self_transcendence", "layer", "cosine", "w30", "w30-layer", "w30-cosine"),
    "stage 1: length and weights": ("vanilla", "self_transcendence", "stage1-200", "stage1-400", "ema-teacher"),
    "stage 1: what it predicts": ("structure", "structure-latent", "self_transcendence", "latent"),
    "end": ("vanilla", "ends-300", "self_transcendence", "never-ends"),
    "weights of other methods": (
        *("vanilla", "sra", "sra-tenth", "layersync", "layersync-tenth", "dispersive", "dispersive-tenth"),
    ),
}
LONGER = "vanilla, 2,000 steps"  #: part of <name>.json: an ablations.json of the baseline alone
SIZES = ("self/feature_norm", "self/target_norm")  #: in the log
NORMS = ("self_transcendence", "layer", "cosine", "w30", "w30-layer", "w30-cosine")


def runs(folder: Path, name: str) -> list[Path]:
    """Finished runs of a variant, by seed."""
    return sorted(run for run in folder.glob(f"{name}-seed*") if (run / "run.json").exists())


def panels(
    count: int, columns: int, ylabel: str, *, size: tuple[float, float] = (3.7, 3.1), shared: bool = True
) -> tuple[Figure, list[Any]]:
    """A figure with `count` panels, with a common y axis if `shared`."""
    lines = -(-count // columns)
    figure = blank_figure((size[0] * columns, size[1] * lines))
    axes = list(figure.subplots(lines, columns, sharey=shared, squeeze=False).flat)
    for spare in axes[count:]:
        spare.axis("off")
    for i, axis in enumerate(axes[:count]):
        style_axes(axis)
        if i % columns == 0:
            axis.set_ylabel(ylabel)
    return figure, axes[:count]


def over_seeds(
    x: Sequence[float], rows: Sequence[Sequence[float]]
) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
    """x, mean over seeds (`rows`), and their deviation."""
    values = np.array(rows)
    deviation = values.std(axis=0, ddof=1) if len(values) > 1 else 0 * values[0]
    return x, values.mean(axis=0).tolist(), deviation.tolist()


def probes(folder: Path) -> dict[str, Any]:
    """Accuracy of a ridge classifier on each block's features, per timestep and method, under the null condition."""
    found: dict[str, Any] = {}
    for name in METHODS:
        for run in runs(folder, name):
            one = load_model(run)
            shards = Dataset.open(str(one.config.data.path))
            z0, labels = data_latents(shards, 4000)
            blocks = tuple(range(1, one.model.depth + 1))
            for t in TIMESTEPS:
                path = PATHS[one.config.train.path]
                feats = collect(one.model, z0, one.model.null(labels), t=t, taps=blocks, path=path)
                accuracy = [linear_probe(feats[k], labels) for k in blocks]
                found.setdefault(name, {}).setdefault(f"{t:g}", []).append(accuracy)
    return found


def draw_probes(found: dict[str, Any]) -> Figure:
    """A panel for each timestep."""
    figure, axes = panels(len(TIMESTEPS), 4, "linear probe accuracy", shared=False)
    for axis, t in zip(axes, TIMESTEPS, strict=True):
        by_name = {name: by_time[f"{t:g}"] for name, by_time in found.items()}
        draw_lines(axis, {n: over_seeds(range(1, len(rows[0]) + 1), rows) for n, rows in by_name.items()})
        axis.set(xlabel="block", title=f"t = {t:g}")
    axes[0].set_ylim(bottom=axes[0].get_ylim()[0] - 0.05)  # below the lines, for the legend
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def norms(folder: Path) -> dict[str, Any]:
    """Mean token norms of the student's guided block and of its target, from the logs of the first seed."""
    found: dict[str, Any] = {}
    for name in NORMS:
        for run in runs(folder, name)[:1]:
            lines = [entry for entry in read_log(run / "stage2" / "log.jsonl") if SIZES[0] in entry]
            found[name] = {"step": [entry["step"] for entry in lines]}
            found[name] |= {key: [entry[key] for entry in lines] for key in SIZES}
    return found


def draw_norms(found: dict[str, Any]) -> Figure:
    """A panel for the student's features, and one for the target, whose lines of equal w coincide."""
    figure, axes = panels(2, 2, "mean token norm")
    for axis, key in zip(axes, SIZES, strict=True):
        draw_lines(axis, {name: (of["step"], of[key]) for name, of in found.items()}, logy=True)
    for axis, title in zip(axes, ("feature of the student's block", "target f_g: the same for equal w"), strict=True):
        axis.set(xlabel="student steps", title=title)
        plain_ticks(axis)
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def ablations(folder: Path) -> dict[str, Any]:
    """Distance over student steps, one panel per question."""
    found: dict[str, Any] = {}
    for name in sorted({name for names in QUESTIONS.values() for name in names} | set(METHODS)):
        measured = [json.loads((run / "measured.json").read_text()) for run in runs(folder, name)]
        if measured and len({len(points) for points in measured}) == 1:
            found[name] = {"step": [point["step"] for point in measured[0]], "seeds": len(measured)}
            for key in ("distance", "probe", "accuracy"):
                found[name][key] = [[point[key] for point in points] for points in measured]
    for row in found.values():
        last = [values[-1] for values in row["distance"]]
        row["last"] = {"mean": statistics.fmean(last), "std": statistics.stdev(last) if len(last) > 1 else 0.0}
    return found


def draw_ablations(found: dict[str, Any]) -> Figure:
    """A panel for each question of which at least two variants were measured."""
    asked = {question: [n for n in names if n in found] for question, names in QUESTIONS.items()}
    asked = {question: names for question, names in asked.items() if len(names) > 1}
    figure, axes = panels(max(1, len(asked)), 4, "Fréchet distance (classifier features)")
    for axis, (question, names) in zip(axes, asked.items(), strict=False):
        draw_lines(axis, {name: over_seeds(found[name]["step"], found[name]["distance"]) for name in names}, logy=True)
        axis.set(xlabel="student steps", title=question)
        plain_ticks(axis)
        axis.legend(frameon=False, fontsize=7)
    return figure


def over_more_compute(summary: dict[str, Any], longer: dict[str, Any] | None) -> dict[str, Any]:
    """A compare.json whose baseline goes on in the panel of all compute, by the ablations.json of its longer runs."""
    if longer is None:
        return summary
    summary = copy.deepcopy(summary)
    for row in longer["table"]:
        points, shown = longer["curves"][row["method"]], summary["curves"]["tflops"][row["method"]]
        a_step, last = row["total_tflops"]["mean"] / row["steps"], shown[0][-1]
        for step, mean, deviation in zip(*points, strict=True):
            if step * a_step > last * (1 + 1e-6):  # the others are those of the compared runs
                for held, value in zip(shown, (step * a_step, mean, deviation), strict=True):
                    held.append(value)
    return summary


#: part of <name>.json -> how it is measured, and drawn
FIGURES = {"probes": (probes, draw_probes), "norms": (norms, draw_norms), "ablations": (ablations, draw_ablations)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of runs, or the <name>.json of an earlier call")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", required=True)
    options = parser.parse_args()
    measured = not options.results.is_file()
    numbers = {} if measured else json.loads(options.results.read_text())
    for what, (measure, draw) in FIGURES.items():
        if measured:
            numbers[what] = measure(options.results)
        if numbers.get(what):
            save(draw(numbers[what]), options.out / f"{options.name}-{what}.png")
    if "compare" in numbers:
        save(
            convergence(over_more_compute(numbers["compare"], numbers.get(LONGER))), options.out / f"{options.name}.png"
        )
    if measured:
        write_json(options.out / f"{options.name}.json", numbers)
    print(f"{options.out / options.name}*")


if __name__ == "__main__":
    main()
