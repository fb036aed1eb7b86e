"""Reports of `compare`, and what those of `quickstart` share with them: tables, curves, a self-contained page."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from selftrans.encoders.identity import identity_kind
from selftrans.evaluate import plots
from selftrans.messages import filled, terminal_width
from selftrans.methods.registry import BASELINE, titles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXIS_LABELS = {"step": "student steps", "tflops": "TFLOPs in all, the teacher's training included"}  #: of curves
#: heading -> entry of a row, and digits of `spread_text`: means over seeds, and where the baseline's end is reached
MEANS = {
    "seconds": ("seconds", 0),
    "total seconds": ("total_seconds", 0),
    "total TFLOPs": ("total_tflops", 2),
    "distance": ("distance", 2),
    "accuracy": ("accuracy", 3),
    "shallow probe": ("probe", 3),
}
REACHED = {
    f"steps to {BASELINE}'s end": ("steps_to_baseline", 0),
    f"TFLOPs to {BASELINE}'s end": ("tflops_to_baseline", 2),
}
HEADINGS = ("method", "student steps", *MEANS, *REACHED)


def cells(row: dict[str, Any], names: Mapping[str, str]) -> list[str]:
    """One row of the table as text, in the order of HEADINGS."""
    return [
        names[row["method"]],
        "-" if row["steps"] is None else f"{row['steps']:,}",
        *(spread_text(row[key], digits) for key, digits in MEANS.values()),
        *(_reached(row, key, digits) for key, digits in REACHED.values()),
    ]


def _reached(row: dict[str, Any], key: str, digits: int) -> str:
    """Where vanilla's final distance was reached, and by how many seeds if not by all; empty without a vanilla run."""
    if key not in row:
        return ""
    runs = row.get("paired", row["seeds"])
    if row[key] is None:
        return "never" if runs and row["reached"] == 0 else "-"
    bound = "≤ " if row["at_once"] else ""
    some = f" ({row['reached']} of {runs})" if row["reached"] < runs else ""
    return bound + spread_text(row[key], digits) + some


def spread_text(value: Mapping[str, float] | None, digits: int) -> str:
    """`1,234.5 ± 0.3`: mean and standard deviation, without one that rounds to zero; `-` for None.

    digits: after the point; small numbers get more, so that the larger of both has two significant ones (`0.0043`).
    """
    if value is None:
        return "-"
    size = max(abs(value["mean"]), value["std"])
    if size and math.isfinite(size):
        digits = max(digits, 1 - math.floor(math.log10(size)))
    deviation = f" ± {value['std']:,.{digits}f}" if round(value["std"], digits) else ""
    return f"{value['mean']:,.{digits}f}{deviation}"


def marked(table: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Method -> its title in tables and figures, with how many of its runs failed."""
    names = titles(row["method"] for row in table)
    for row in table:
        if lost := row.get("failed"):
            mark = f"{lost} of {lost + row['seeds']} seeds failed" if row["seeds"] else "failed"
            names[row["method"]] += f" ({mark})"
    return names


def failures(summary: Mapping[str, Any]) -> list[str]:
    """A line for each failed run of a compare.json, with the reason; files of earlier versions have no such runs."""
    failed = summary.get("failed", ())
    names = titles(one["method"] for one in (*summary["table"], *failed))
    return [f"failed: {names[one['method']]}, seed {one['seed']}: {one['reason']}" for one in failed]


def text_table(summary: Mapping[str, Any]) -> str:
    """The table of a compare.json for a terminal."""
    names = marked(summary["table"])
    lines = aligned([HEADINGS, *(cells(row, names) for row in summary["table"])])
    return "\n".join([lines, *map(filled, failures(summary)), "", filled(legend(summary["metric"]))])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Headings and rows in columns, with a rule below the headings; all but the first column are right-aligned.

    Columns that a terminal has no room for follow below, after the first column once more.
    """
    first, *others = zip(*lines, strict=True)
    width, parts = terminal_width() or math.inf, [[first]]
    for column in others:
        shown = [*parts[-1], column]
        if len(parts[-1]) > 1 and sum(max(map(len, each)) + 2 for each in shown) - 2 > width:
            parts.append([first, column])
        else:
            parts[-1] = shown
    return "\n\n".join(_aligned(list(zip(*part, strict=True))) for part in parts)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """`aligned`, whatever its width."""
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join([line[0].ljust(first), *(text.rjust(width) for text, width in zip(line[1:], others, strict=True))])
        for line in lines
    ]
    texts.insert(1, "  ".join("-" * width for width in (first, *others)))
    return "\n".join(texts)


def legend(metric: str) -> str:
    """An explanation of the table's columns."""
    return (
        f"distance: {metric}, lower is better; accuracy: of the classifier on the samples' labels; shallow probe: accuracy "
        "of a linear classifier on the features of an early block, the same for all methods, at t = 0.4; seconds: of the "
        "student's training; total seconds and TFLOPs: with the teacher's training. Runs may train in parallel, so compare "
        f"TFLOPs rather than seconds. To {BASELINE}'s end: student steps and total TFLOPs at which the method first reaches "
        f"the final distance of {BASELINE} with the same seed, with log distance interpolated linearly between measurements; "
        "≤: reached at the first measurement; never: with no seed; -: unknown, as the training of an imported teacher, "
        "accuracies without classes or without a classifier, or runs that failed."
    )


def draw_curves(axes: Any, series: Mapping[str, plots.Series], xlabel: str, metric: str) -> None:
    """Mean distance of each method, with its standard deviation as a band, on a logarithmic axis."""
    plots.draw_lines(axes, series, logy=True)
    axes.set(xlabel=xlabel, ylabel=textwrap.fill(metric, 46))  # longer lines would leave the figure
    plots.style_axes(axes)
    plots.plain_ticks(axes)


def convergence(summary: Mapping[str, Any]) -> Figure:
    """Distance against student steps and against total compute, of a compare.json; below, which runs failed."""
    figure = plots.blank_figure((12, 4.6))
    left, right = figure.subplots(1, 2, sharey=True)
    names = marked(summary["table"])
    for axes, (axis, label) in zip((left, right), AXIS_LABELS.items(), strict=True):
        series = {names[name]: curve for name, curve in summary["curves"][axis].items()}
        draw_curves(axes, series, label, summary["metric"])
    right.set_ylabel("")
    left.legend(frameon=False)
    reasons = [failure.partition(";")[0] for failure in failures(summary)]  # without the remedies
    if lines := [line for reason in reasons for line in textwrap.wrap(reason, 160, break_on_hyphens=False)]:
        figure.supxlabel("\n".join(lines), x=0.01, horizontalalignment="left", fontsize="small")
    return figure


STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #222; max-width: 71rem; margin: 2.5rem auto; padding: 0 1.2rem; }
p { max-width: 60rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin-top: 2.2rem; font-size: 1.2rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .4rem .45rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; border-bottom: 2px solid #222; white-space: normal; vertical-align: bottom; }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } .note { color: #555; font-size: .9rem; }
img { max-width: 100%; height: auto; } .grids { display: flex; flex-wrap: wrap; gap: 1.5rem; } figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: .3rem; } code { background: #f3f3f3; padding: .1em .3em; border-radius: 3px; }
"""


def comparison_page(
    summary: dict[str, Any],
    figure: Figure,
    grids: Mapping[str, np.ndarray],
    captions: Sequence[str] | None = None,
) -> str:
    """compare.html: table, convergence over steps and compute, samples with their `captions`, and settings."""
    names, seeds = titles(row["method"] for row in summary["table"]), summary["seeds"]
    said = "captions" if captions else "labels"
    table, bands = "One seed; ", "One seed."
    if len(seeds) > 1:
        table = f"Mean ± standard deviation over {len(seeds)} seeds; "
        bands = "Mean over seeds; the band is one standard deviation."
    samples = "".join(
        html_figure(names[name], plots.sample_sheet(images, columns=8, captions=captions), names[name])
        for name, images in grids.items()
    )
    failed = {one["method"] for one in summary.get("failed", ()) if one["seed"] == seeds[0]}
    absent = [
        f"None of {title}: {'its run failed' if name in failed else 'they are not finite'}."
        for name, title in names.items()
        if name not in grids
    ]
    body = f"""<h1>Methods compared</h1>
<div class="scroll">{method_table(summary["table"], marked(summary["table"]))}</div>
{notes(failures(summary))}<p class="note">{table}{html.escape(legend(summary["metric"]))}</p>
<h2>Convergence</h2>
<p class="note">{bands}</p>
<img src="{plots.figure_to_data_uri(figure)}" alt="{html.escape(summary["metric"])} against student steps and against compute">
<h2>Samples at the end</h2>
<p class="note">Seed {seeds[0]}; the same noise and the same {said} for each method.</p>
{notes(absent)}<div class="grids">{samples}</div>
<h2>What the numbers depend on</h2>
{settings_table(depends_on(summary))}
<p class="note">The same numbers are in <code>compare.json</code> and <code>compare.csv</code> next to this page.</p>"""
    return document("selftrans compare", body)


def depends_on(summary: dict[str, Any]) -> dict[str, str]:
    """What the numbers of a compare.json depend on: name of each setting -> its text."""
    config = summary["config"]
    return {
        "recipe": config["recipe"],
        "model": settings_text(config["model"]),
        "student steps, batch, learning rate": "{steps:,}, {batch_size}, {lr:g}".format(**config["train"]),
        "autoencoder": summary["autoencoder"],
        "teachers from other runs": _teachers(summary["teachers"]),
        **{name: settings_text(config[name]) for name in summary["sections"]},
        "seeds": ", ".join(map(str, summary["seeds"])),
        "distance": f"{summary['metric']}, {summary['images']:,} samples of the averaged weights, to the training data"
        + ("" if identity_kind(summary["autoencoder"]) else " as the autoencoder decodes them"),
        "sampler": settings_text(summary["sampler"]),
        "extractor": f"{summary['features']}, sha256 {summary['extractor_sha256']}",
    }


def document(title: str, body: str) -> str:
    """A page in the style of the reports, with this content."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body>
{body}
</body></html>
"""


def notes(lines: Sequence[str]) -> str:
    """A paragraph for each line."""
    return "".join(f'<p class="note">{html.escape(line)}</p>\n' for line in lines)


def settings_table(values: Mapping[str, str]) -> str:
    """A table of names and values."""
    lines = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in values.items()
    )
    return f'<table class="settings">{lines}</table>'


def _teachers(teachers: Sequence[Mapping[str, Any]]) -> str:
    """`a/ema.safetensors, step 1,000`: the weights of the teachers."""
    return "; ".join(f"{teacher['path']}, step {teacher['steps']:,}" for teacher in teachers) or "none"


def settings_text(section: Mapping[str, Any]) -> str:
    """`block 2, weight 0.5`: the settings that are not None."""
    return ", ".join(f"{key} {value}" for key, value in section.items() if value is not None)


def method_table(table: list[dict[str, Any]], names: Mapping[str, str]) -> str:
    """The table with the columns HEADINGS."""
    return html_table(HEADINGS, [cells(row, names) for row in table])


def html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    head = "".join(f"<th>{html.escape(name, quote=False)}</th>" for name in headings)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def html_figure(name: str, picture: Any, alt: str) -> str:
    """An embedded picture with its caption."""
    image = f'<img src="{plots.figure_to_data_uri(picture)}" alt="{html.escape(alt)}">'
    return f"<figure><figcaption>{html.escape(name)}</figcaption>{image}</figure>"
