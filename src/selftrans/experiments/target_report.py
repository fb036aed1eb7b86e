"""The report of `selftrans analyse --target` as a table on the screen and as two pictures.

`report` is the content of target.json (see `analyse_target`). Shape legend: n pictures, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from selftrans.data.dataset import Dataset
from selftrans.data.decoded import decode_images, latents_of
from selftrans.encoders.autoencoder import load_autoencoder
from selftrans.evaluate import plots
from selftrans.evaluate.fonts import class_names
from selftrans.evaluate.probes import pca_maps
from selftrans.evaluate.target_measures import DIFFERENCE
from selftrans.experiments.html_report import aligned
from selftrans.messages import plural, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = "logistic"  #: the probe in the picture
TICKS = 12  #: most blocks of which each has its tick
LIGHT_TEXT = 0.67  #: a share above which white text has more contrast on its colour than dark text


def table(report: Mapping[str, Any]) -> str:
    """The measurements as text."""
    counts, blocks, scales = report["pictures"], report["blocks"], report["scales"]
    classes = f", {plural(counts['classes'], 'class')}" if "classes" in counts else ""
    about = [
        f"target of {printable(report['teacher']['title'])}",
        f"{plural(counts['fitted'], 'picture')} fitted, {counts['held_out']:,} held out{classes}",
        *([f"t = {' '.join(f'{t:g}' for t in report['timesteps'])}"] if report["timesteps"] else []),
        f"seed {report['seed']}",
        *(["* marks the block that teaches"] if str(report["teacher"]["block"]) in blocks else []),
    ]
    lines, sizes = ["; ".join(about)], {k: of["sizes"] for k, of in blocks.items()}
    for name, title in _titles(report).items():
        if name in next(iter(blocks.values()))["shares"]:
            lines += _rows(report, title, {k: _headed(of["shares"][name], _share) for k, of in blocks.items()})
    norms = {k: _headed(of["token_norm"], "{:#.4g}".format) for k, of in sizes.items()}
    lines += _rows(report, "mean norm of a token", norms)
    if scales:
        ratios = {k: {text: _number(of[key]) for key, text in SIZES.items()} for k, of in sizes.items()}
        lines += _rows(report, "size of f_c - f_u over that of f_u", ratios)
    return "\n".join(lines + _probes(report))


def _titles(report: Mapping[str, Any]) -> dict[str, str]:
    """Key of a share -> the heading of its table."""
    source = report["predicted_from"] or ""
    target = "f_g = f_u + w (f_c - f_u)" if report["scales"] else "the features"
    titles = {"condition": f"share of the variance of {target} that a {source} explains on held-out pictures"}
    if len(report["timesteps"]) > 1:
        titles["condition_time"] = f"the same, one {source.split(' of ')[0]} for each timestep"
        titles["time"] = f"share of the variance of {target} that the timestep alone explains"
    return titles


def _rows(report: Mapping[str, Any], title: str, cells: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A table of cells (block -> heading -> text) with a row for each block; * marks the one that teaches."""
    teaches = str(report["teacher"]["block"])
    rows = [[("-" if k == "0" else k) + "*" * (k == teaches), *of.values()] for k, of in cells.items()]
    return ["", title, aligned([["block", *next(iter(cells.values()))], *rows])]


def _headed(values: Mapping[str, Any], show: Callable[[Any], str]) -> dict[str, str]:
    return {_heading(column): show(value) for column, value in values.items()}


def _probes(report: Mapping[str, Any]) -> list[str]:
    """A table of the probes; nothing where there are none."""
    blocks = report["blocks"]
    if "probes" not in next(iter(blocks.values())):
        return []
    where = f" at t = {report['probes_at']:g}" if report["probes_at"] is not None else ""
    title = f"accuracy of linear probes on held-out pictures{where}, ridge / logistic; chance {report['chance']:.3f}"
    cells = {k: {"f_u": _pair(of["probes"]["f_u"])} for k, of in blocks.items()}
    if report["scales"]:
        w = _shown_scale(report)
        title += f"\nof f_u, and of f_g with w = {w} (target.json has every w):\n{EXPLAINED}"
        for k, of in blocks.items():
            found = of["probes"]["f_g"][w]
            cells[k] |= {text: _pair({kind: found[kind][name] for kind in found}) for name, text in KINDS.items()}
    return _rows(report, title, cells)


KINDS = {
    "own": "own label",
    "random": "random label",
    "rest": "rest",
    "swapped_picture": "swapped: class",
    "swapped_condition": "swapped: label",
}
EXPLAINED = """\
  own label: f_g is computed with the picture's label, which a probe can read from it
  random label: f_g is computed with a label drawn at random; rest: the same minus the mean of that label
  swapped: the probe of `own label` on f_g of another label: how often it names the picture's class, and that label"""
SIZES = {"rms_ratio": "root mean square", "spread_ratio": "around the means"}


def draw_measures(report: Mapping[str, Any], path: Path) -> None:
    """The measurements of every block, and the composition of one block's target, as a picture."""
    blocks = report["blocks"]
    first = next(iter(blocks.values()))
    panels = [_draw_encoder if "0" in blocks and first["shares"].get("condition") else _draw_composition]
    if report["scales"]:
        panels = [*([_draw_shares] if "condition" in first["shares"] else []), _draw_composition, _draw_sizes]
        if "probes" in first:
            panels.insert(2, _draw_probes)
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    figure = plots.blank_figure((5.2 * columns, 3.7 * rows))
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, panel in zip(grid, panels, strict=False):
        panel(report, axes)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(printable(report["teacher"]["title"]), fontsize=11, color=plots.INK, parse_math=False)
    plots.save(figure, path)


def _draw_shares(report: Mapping[str, Any], axes: Axes) -> None:
    """Blocks x strengths: the condition's share."""
    shares = {k: of["shares"]["condition"] for k, of in report["blocks"].items()}
    columns = list(next(iter(shares.values())))
    values = np.array([[(of[c] or [np.nan])[0] for c in columns] for of in shares.values()])
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value > LIGHT_TEXT else plots.INK
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(columns)), [_heading(c) for c in columns], fontsize=8)
    axes.set_yticks(range(len(shares)), list(shares), fontsize=8)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("block")
    axes.set_title(f"share of the target that {_condition(report)} alone explains", loc="left", fontsize=10)


def _draw_composition(report: Mapping[str, Any], axes: Axes) -> None:
    """One block's target: variance by the time, the condition, both together, and the rest, stacked per strength."""
    k = _shown_block(report)
    shares = report["blocks"][k]["shares"]
    columns = list(shares.get("condition") or shares["time"])
    parts = {name: np.array([max(0.0, (of[c] or [0.0])[0]) for c in columns]) for name, of in shares.items()}
    zero = np.zeros(len(columns))
    time, condition = parts.get("time", zero), parts.get("condition", zero)
    both = np.maximum(parts.get("condition_time", np.maximum(time, condition)), np.maximum(time, condition))
    stacked = {
        _condition(report): np.minimum(condition, both),
        f"the timestep, given {_condition(report)}": both - np.minimum(condition, both),
        "the rest: picture and noise": 1 - both,
    }
    bottom = zero
    for (name, heights), colour in zip(stacked.items(), (plots.COLOURS[0], plots.COLOURS[5], plots.RULE), strict=True):
        if heights.any():
            axes.bar(range(len(columns)), heights, bottom=bottom, color=colour, label=name, width=0.8)
        bottom = bottom + heights
    axes.set_xticks(range(len(columns)), [_heading(c) if report["scales"] else "features" for c in columns], fontsize=8)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of variance")
    title = f"what the target of block {k} consists of" if report["scales"] else "what the features consist of"
    plots.style_axes(axes, title, grid="y", size=8)
    _legend(axes, 3)


def _draw_encoder(report: Mapping[str, Any], axes: Axes) -> None:
    """Bars of an encoder's features: the label's share of their variance, and what probes read from them."""
    (of,) = report["blocks"].values()
    bars = {f"share that {_condition(report)} explains": (of["shares"]["condition"]["0"] or [0.0])[0]}
    bars |= {f"{kind} probe": value for kind, value in of.get("probes", {}).get("f_u", {}).items()}
    bars |= {"chance": report["chance"]} if "probes" in of else {}
    axes.barh(list(bars), list(bars.values()), color=[*plots.COLOURS[: len(bars) - 1], plots.COLOURS[6]], height=0.6)
    for row, value in enumerate(bars.values()):
        axes.text(max(0.0, value) + 0.01, row, f"{value:.2f}", va="center", fontsize=8, color=plots.INK)
    axes.set_xlim(0, 1.1)
    axes.invert_yaxis()
    plots.style_axes(axes, "an encoder's features, on held-out pictures", grid="x", size=8)


def _draw_probes(report: Mapping[str, Any], axes: Axes) -> None:
    """Accuracy per block, with the label's leak and without."""
    w = _shown_scale(report)
    probes = [of["probes"] for of in report["blocks"].values()]
    _draw_blocks(
        report,
        axes,
        {
            "f_u": [each["f_u"][SHOWN] for each in probes],
            "f_g, the picture's own label": [each["f_g"][w][SHOWN]["own"] for each in probes],
            "f_g, a random label, minus its mean": [each["f_g"][w][SHOWN]["rest"] for each in probes],
            "f_g, a random label": [each["f_g"][w][SHOWN]["random"] for each in probes],
            "own-label probe, shown another label": [each["f_g"][w][SHOWN]["swapped_picture"] for each in probes],
        },
    )
    axes.axhline(report["chance"], color=plots.INK, linewidth=0.8, linestyle=":", label="chance")
    axes.set(ylabel=f"accuracy ({SHOWN} probe, held out)", ylim=(-0.03, 1.03))
    title = f"does a probe name the picture's class? (w = {w}, t = {report['probes_at']:g})"
    plots.style_axes(axes, title, grid="y", size=8)
    _legend(axes, 2)


def _draw_sizes(report: Mapping[str, Any], axes: Axes) -> None:
    """Size of f_c - f_u relative to f_u per block."""
    sizes = [of["sizes"] for of in report["blocks"].values()]
    _draw_blocks(report, axes, {name: [each[key] for each in sizes] for key, name in SIZES.items()})
    axes.set(ylabel="size of f_c - f_u over f_u")
    axes.set_ylim(0, 1.06 * (axes.dataLim.ymax or 1.0))
    plots.style_axes(axes, "what guidance multiplies by w", grid="y", size=8)
    axes.legend(frameon=False, fontsize=8)


def _draw_blocks(report: Mapping[str, Any], axes: Axes, lines: Mapping[str, Sequence[float | None]]) -> None:
    """Lines over the blocks; a value that is not known, None, is left out."""
    blocks = [int(k) for k in report["blocks"]]
    plots.draw_lines(axes, {name: (blocks, np.array(each, dtype=float).tolist()) for name, each in lines.items()})
    axes.set(xlabel="block")
    if len(blocks) <= TICKS:  # else chosen by matplotlib
        axes.set_xticks(blocks)
    else:
        axes.locator_params(axis="x", integer=True)


def draw_maps(
    report: Mapping[str, Any],
    dataset: Dataset,
    rows: np.ndarray,
    kept: Mapping[str, Mapping[int, Tensor]],
    grid: tuple[int, ...],
    path: Path,
) -> None:
    """Principal components of f_u, f_c and f_g of some pictures, each row in its own basis, below the pictures.

    rows: positions of the n pictures in the data; kept: "u" and "own" -> block -> features (n, T, D).
    """
    decoded = decode_images(load_autoencoder(dataset.manifest.autoencoder, device="cpu"), latents_of(dataset, rows)[0])
    maps = {"data": plots.as_pictures(plots.middle_slices(decoded))}
    blocks = sorted(kept["u"])
    for k in sorted({blocks[0], int(_shown_block(report)), blocks[-1]}):
        u = kept["u"][k]
        if u.shape[-1] < 3:
            continue
        maps[f"block {k}: f_u" if k else "features"] = pca_maps(u, grid)
        for w in _mapped_scales(report["scales"]):
            name = "f_c" if w == 1 else f"f_g, w = {w:g}"
            maps[f"block {k}: {name}"] = pca_maps(u + w * kept["own"][k], grid)
    classes = class_names(dataset.manifest.classes)
    names = [classes[label][:10] for label in dataset.labels[rows]] if classes else None
    title = f"principal components at t = {report['timesteps'][0]:g}" if report["timesteps"] else "principal components"
    title += ", middle frame" * (len(grid) == 3)
    plots.save(plots.pca_grid(maps, columns=names, title=title, cell=0.7), path)


def _mapped_scales(scales: Sequence[float]) -> list[float]:
    """f_c, a middle strength and the largest."""
    if not scales:
        return []
    ordered = sorted(scales, key=abs)
    return sorted({1.0, ordered[len(ordered) // 2], ordered[-1]})


def _shown_block(report: Mapping[str, Any]) -> str:
    """The block that teaches, or the one that is nearest to two thirds of those measured."""
    ks, block = list(report["blocks"]), report["teacher"]["block"]
    return str(block) if str(block) in ks else ks[max(0, round(len(ks) * 2 / 3) - 1)]


def _shown_scale(report: Mapping[str, Any]) -> str:
    scales = report["scales"]
    return f"{sorted(scales, key=abs)[len(scales) // 2]:g}"


def _condition(report: Mapping[str, Any]) -> str:
    return "the text" if report["condition"] == "text" else "the label"


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(
        frameon=False, fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=columns, handlelength=1.5
    )


def _heading(column: str) -> str:
    return {"0": "f_u", "1": "f_c", DIFFERENCE: "f_c-f_u"}.get(column, f"w={column}")


def _share(value: Sequence[float] | None) -> str:
    return _number(value[0] if value else None)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _pair(of: Mapping[str, float | None]) -> str:
    return f"{_number(of['ridge'])} / {_number(of['logistic'])}"
