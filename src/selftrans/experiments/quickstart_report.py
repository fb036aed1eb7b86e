"""The quickstart's outcome at equal steps and at equal compute: one sentence, one figure, one table; then its page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from selftrans.evaluate.plots import INK, Series, blank_figure, figure_to_data_uri, pca_grid, sample_sheet
from selftrans.experiments.comparison.runner import Result, Results
from selftrans.experiments.comparison.summary import curve, spread
from selftrans.experiments.html_report import (
    AXIS_LABELS,
    aligned,
    document,
    draw_curves,
    html_figure,
    html_table,
    legend,
    method_table,
    spread_text,
)
from selftrans.messages import filled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLOSE = 0.05  #: relative difference below which a comparison names no winner


def duration(summary: Mapping[str, Any]) -> str:
    """Seconds that the quickstart took. Those of calls that were interrupted are not known."""
    return f"{summary['seconds']:.0f} s" + (
        ", without earlier calls, which it continued" if summary["continued"] else ""
    )


def cut(result: Result, steps: int) -> Result:
    """A run of one stage as it was after `steps`."""
    report, points = result
    kept = [point for point in points if point["step"] <= steps]
    cost = {"student_tflops": "tflops", "total_tflops": "tflops", "total_seconds": "seconds", "student_steps": "step"}
    return report | {name: kept[-1][key] for name, key in cost.items()}, kept


def at_compute(run: Result, tflops: float) -> float:
    """A run's distance at this total compute: log distance, linear in TFLOPs between two measurements; else the nearest."""
    x, y = curve(run, "tflops")
    return float(np.exp(np.interp(tflops, x, np.log(y))))


def compared(results: Results, names: Sequence[str], baseline: str, guided: str, steps: int) -> dict[str, Any]:
    """Distances of each method along `steps` and at the total compute of `guided`, and ratios of `guided` to the baseline.

    `ahead` counts the steps at which the mean distance of `guided` is the smaller one.

    The baseline is trained longer than `steps`, for the comparison at equal compute; a method that is not has None there. Means
    and deviations over seeds; ratios are of pairs with the same seed.
    """
    seeds = [seed for name, seed in results if name == guided]
    costs = [results[guided, seed][0]["total_tflops"] for seed in seeds]
    table, distances, equal = [], {}, {}
    for name in names:
        runs = [results[name, seed] for seed in seeds]
        short = [cut(run, steps) if name == baseline else run for run in runs]
        distances[name] = [curve(run)[1] for run in short]
        equal[name] = [at_compute(run, cost) for run, cost in zip(runs, costs, strict=True)]
        reached = all(curve(run, "tflops")[0][-1] >= 0.99 * cost for run, cost in zip(runs, costs, strict=True))
        row: dict[str, Any] = {"method": name, "tflops": spread([run[0]["total_tflops"] for run in short])}
        row["distances"] = [spread(found) for found in zip(*distances[name], strict=True)]
        row["at_compute"] = spread(equal[name]) if reached else None
        table.append(row)
    ours, theirs = distances[guided], distances[baseline]
    ratios = {
        "first": spread([a[0] / b[0] for a, b in zip(ours, theirs, strict=True)]),
        "last": spread([a[-1] / b[-1] for a, b in zip(ours, theirs, strict=True)]),
        "at_compute": spread([a[-1] / b for a, b in zip(ours, equal[baseline], strict=True)]),
    }
    ahead = sum(sum(a) < sum(b) for a, b in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True))
    tflops, at_steps = spread(costs), [point["step"] for point in results[guided, seeds[0]][1]]
    return {"steps": at_steps, "tflops": tflops, "rows": table, "ratios": ratios, "ahead": ahead, "seeds": len(seeds)}


def sentence(found: Mapping[str, Any], guided: str, baseline: str) -> str:
    """What came out, and how much of it one seed can show."""
    ratios, steps, many = found["ratios"], found["steps"], found["seeds"] > 1
    first, last, equal = (spread_text(ratios[key], 2) for key in ("first", "last", "at_compute"))
    mean = ratios["at_compute"]["mean"]
    ahead = guided if mean < 1 - CLOSE else baseline if mean > 1 + CLOSE else "neither"
    seeds = f"{found['seeds']} seeds" if many else "one seed"
    doubt = (
        "± is one standard deviation over seeds."
        if many
        else "A ratio between 0.8 and 1.2 at the end of one seed may be chance: repeat with --seeds 0 1 2."
    )
    return (
        f"With {seeds}, the distance of {guided} is {first} times that of {baseline} at student step {steps[0]:,} and {last} "
        f"times at step {steps[-1]:,}, and the smaller one at {found['ahead']} of the {len(steps)} measured steps. At equal "
        f"total compute, the teacher's training included, it is {equal} times that of {baseline}: {ahead} is ahead. {doubt}"
    )


def cells(found: Mapping[str, Any], names: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table as text."""
    headings = ["distance", "total TFLOPs", *(f"at step {step:,}" for step in found["steps"])]
    headings.append(f"at {spread_text(found['tflops'] | {'std': 0.0}, 2)} TFLOPs")
    rows = [
        [
            names[row["method"]],
            spread_text(row["tflops"], 2),
            *(spread_text(cell, 2) for cell in row["distances"]),
            spread_text(row["at_compute"], 2),
        ]
        for row in found["rows"]
    ]
    return headings, rows


def note(summary: Mapping[str, Any]) -> str:
    """What the numbers of the table are."""
    sampler, seeds = summary["sampler"], summary["seeds"]
    return (
        f"{summary['metric']}, lower is better; {summary['images']:,} samples of the averaged weights, {sampler['steps']} "
        f"steps of the sampler {sampler['sampler']}, guidance scale {sampler['guidance_scale']:g}; "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}. Total TFLOPs: up to the last step in the table, "
        "with the teacher's training. Last column: each method after as much total compute as both stages took; -: not "
        "trained as long."
    )


def text(summary: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Sentence and table for a terminal."""
    headings, rows = cells(summary["compared"], names)
    return "\n".join([aligned([headings, *rows]), "", filled(note(summary)), "", filled(summary["outcome"])])


def overview(both: Mapping[str, Mapping[str, Series]], grids: Mapping[str, np.ndarray], metric: str) -> Figure:
    """Convergence over student steps and over total compute, and samples of each method at the last step of the former."""
    figure = blank_figure((14, 4.2))
    mosaic: dict[Any, Any] = figure.subplot_mosaic(
        [["step", "tflops", str(i)] for i in range(len(grids))], width_ratios=[1, 1, 0.95]
    )
    for axis, label in AXIS_LABELS.items():
        draw_curves(mosaic[axis], both[axis], label, metric if axis == "step" else "")
    limits = [limit for axis in AXIS_LABELS for limit in mosaic[axis].get_ylim()]
    for axis in AXIS_LABELS:
        mosaic[axis].set_ylim(min(limits), max(limits))
    mosaic["step"].legend(frameon=False)
    for i, (name, images) in enumerate(grids.items()):
        picture = sample_sheet(images, columns=-(-len(images) // 3), upscale=6, gap=6)
        mosaic[str(i)].imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        mosaic[str(i)].set_title(name, fontsize=10, color=INK, loc="left")
        mosaic[str(i)].axis("off")
    return figure


def page(
    summary: Mapping[str, Any],
    names: Mapping[str, str],
    figure: Figure,
    grids: Mapping[str, np.ndarray],
    maps: Mapping[str, Mapping[str, np.ndarray]],
) -> str:
    """report.html: the outcome, figure and table, then accuracies, samples and PCA maps, with all pictures embedded."""
    samples = "".join(html_figure(name, sample_sheet(x, columns=7, upscale=5), name) for name, x in grids.items())
    features = "".join(html_figure(name, pca_grid(x, cell=0.62), f"feature maps, {name}") for name, x in maps.items())
    body = f"""<h1>Self-Transcendence on real digits</h1>
<p><strong>{html.escape(summary["outcome"])}</strong></p>
<img src="{figure_to_data_uri(figure)}" alt="{html.escape(summary["metric"])} against student steps and total compute; samples">
<div class="scroll">{html_table(*cells(summary["compared"], names))}</div>
<p class="note">{html.escape(note(summary))} Classifier {summary["extractor_sha256"][:12]}.</p>
<p>The same 6-block transformer is trained on scikit-learn's 1,797 scanned digits with each method. The teacher of stage 2 is
the checkpoint of stage 1 at step {summary["teacher_steps"]:,}. Learning rate and label table were tuned for the baseline.
This is a toy problem: it shows that the code does what it says, and says nothing about the size of ImageNet.</p>
<h2>Samples at step {summary["steps"]:,}</h2>
<p class="note">The same noise and the same labels for each method.</p>
<div class="grids">{samples}</div>
<h2>Accuracy, early features and time at step {summary["steps"]:,}</h2>
<div class="scroll">{method_table(summary["table"], names)}</div>
<p class="note">{html.escape(legend(summary["metric"]))}</p>
<h2>Features of the shallow block</h2>
<p class="note">First three principal components of block {summary["block"]}, the one that stage 1 guides, at t = 0.4, over
training, for the digits of the first row. All rows use the components of the last checkpoint.</p>
{features}
<p class="note">Made by <code>selftrans quickstart</code>: {duration(summary)}. The same numbers are in
<code>table.json</code> and <code>table.csv</code> next to this page.</p>"""
    return document("selftrans quickstart", body)
