"""Figures: sheets of samples, curves, feature maps, scatter. Uses matplotlib's Agg without global state or windows.

Shape legend: n images, (H, W, C) picture with C of 1 or 3, (C, *S) array. The colours are the colour-blind-safe palette of
Okabe and Ito.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from selftrans.evaluate import fonts
from selftrans.storage import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: blue, vermillion, green, purple, orange, sky, grey, black; the palette's yellow is too pale for lines on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
FRAMES = 8  #: most slices of an array of three spatial dimensions that are shown
STRIP = 0.3  #: least height of a picture in a grid of maps, over its width
INK, RULE = "#222222", "#DDDDDD"

#: (x, y), or (x, y, deviation of y) which is drawn as a band
Series: TypeAlias = tuple[Sequence[float], Sequence[float]] | tuple[Sequence[float], Sequence[float], Sequence[float]]


def image_grid(images: np.ndarray, columns: int | None = None, upscale: int = 1, *, gap: int = 2) -> np.ndarray:
    """One picture, uint8 (height, width, C), of images uint8 (n, H, W, C), in rows, on white.

    Each pixel becomes `upscale` x `upscale` pixels without smoothing. `columns` defaults to the square root of n, or for images
    more than twice as wide as high (or the reverse) to the number that makes the grid about square.
    """
    n, channels = len(images), images.shape[-1]
    ratio = images.shape[1] / images.shape[2]
    columns = min(columns or math.ceil(math.sqrt(n if 0.5 <= ratio <= 2 else n * ratio)), n)
    rows = math.ceil(n / columns)
    large = images.repeat(upscale, axis=1).repeat(upscale, axis=2)
    tiles = np.pad(large, ((0, rows * columns - n), (gap, 0), (gap, 0), (0, 0)), constant_values=255)
    height, width = tiles.shape[1:3]
    grid = tiles.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return np.pad(
        grid.reshape(rows * height, columns * width, channels), ((0, gap), (0, gap), (0, 0)), constant_values=255
    )


def sample_sheet(
    samples: np.ndarray,
    columns: int | None = None,
    upscale: int | None = None,
    *,
    gap: int = 2,
    captions: Sequence[str] | None = None,
) -> np.ndarray:
    """One picture, uint8 (height, width, 1 or 3), of samples: pictures uint8 (n, H, W, C), or arrays float (n, C, *S).

    `columns`, `upscale` and `gap` as in `image_grid`; `upscale` None enlarges pictures of fewer than 64 rows to about
    64; plots of 1-D arrays always keep their size. See `as_pictures` for how arrays are shown. `captions` are written
    below the pictures, one each.
    """
    pictures = as_pictures(samples)
    if samples.ndim == 3:
        upscale = 1
    if upscale is None:
        upscale = max(1, 64 // pictures.shape[1])
    if captions is None:
        return image_grid(pictures, columns, upscale, gap=gap)
    large = pictures.repeat(upscale, axis=1).repeat(upscale, axis=2)
    return image_grid(fonts.with_captions(large, captions), columns, gap=max(gap, 6))


def as_pictures(samples: np.ndarray) -> np.ndarray:
    """Samples as uint8 pictures (n, H, W, 1 or 3), with one scale for all.

    Pictures uint8 (n, H, W, C) are returned unchanged. Float arrays (n, C, L) become line plots with one line per
    channel. For (n, C, H, W), three channels become red, green and blue; otherwise the first one is shown in grey. For
    (n, C, F, H, W) the same is done for at most FRAMES slices of F, evenly spaced and next to each other.
    """
    if samples.dtype == np.uint8:
        return samples
    if samples.ndim == 3:
        return _line_plots(samples)
    if samples.ndim == 5:
        n, channels, frames, height, _ = samples.shape
        chosen = np.linspace(0, frames - 1, min(frames, FRAMES)).round().astype(int)
        samples = samples[:, :, chosen].transpose(0, 1, 3, 2, 4).reshape(n, channels, height, -1)
    shown = (samples if samples.shape[1] == 3 else samples[:, :1]).transpose(0, 2, 3, 1).astype(np.float64)
    low, span = shown.min(), np.ptp(shown) or 1.0
    return np.round((shown - low) * (255 / span)).astype(np.uint8)


def middle_slices(samples: np.ndarray) -> np.ndarray:
    """The middle slice (n, C, H, W) of arrays (n, C, F, H, W), as `flat_map` takes it of their maps; others unchanged."""
    return samples[:, :, samples.shape[2] // 2] if samples.ndim == 5 else samples


def _line_plots(samples: np.ndarray) -> np.ndarray:
    """Arrays (n, C, L) as pictures uint8 (n, 96, 160, 3), one line per channel, all with the same vertical range."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6, 0.96), dpi=100, facecolor="white")
    canvas, pictures = FigureCanvasAgg(figure), []
    axes = figure.add_axes((0, 0, 1, 1))
    low, margin = float(samples.min()), 0.05 * (float(np.ptp(samples)) or 1.0)
    for sample in samples:
        axes.clear()
        axes.set_axis_off()
        axes.set(xlim=(0, max(1, sample.shape[1] - 1)), ylim=(low - margin, float(samples.max()) + margin))
        for i, channel in enumerate(sample):
            axes.plot(channel, color=COLOURS[i % len(COLOURS)], linewidth=0.8)
        canvas.draw()
        pictures.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    return np.stack(pictures)


def curves(
    series: Mapping[str, Series],
    *,
    xlabel: str,
    ylabel: str,
    logy: bool = False,
    size: tuple[float, float] = (6.4, 4.0),
) -> Figure:
    """A figure with `draw_lines`. Size in inches. Where every x is a whole number, so is every tick."""
    figure = blank_figure(size)
    axes = figure.subplots()
    style_axes(axes, size=9)
    draw_lines(axes, series, logy=logy)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    plain_ticks(axes)
    if all((x == np.round(x)).all() for x in (np.asarray(each[0], dtype=float) for each in series.values())):
        axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False)
    return figure


def draw_lines(axes: Axes, series: Mapping[str, Series], *, logy: bool = False) -> None:
    """One line with markers per name; colours and markers follow the order of `series`.

    A line that later ones coincide with is drawn wider, so that it is seen on both sides of them.
    """
    drawn = [np.asarray(values[:2], dtype=float) for values in series.values()]
    if logy:  # how far lines are from each other on the picture; what is not above zero is not on it
        drawn = [np.stack([x, np.log(np.where(y > 0, y, np.nan))]) for x, y in drawn]
    for i, (name, values) in enumerate(series.items()):
        wider = 2.0 * min(2, sum(_coincide(drawn[i], later) for later in drawn[i + 1 :]))
        x, y = np.asarray(values[0], dtype=float), np.asarray(values[1], dtype=float)
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        style: dict[str, Any] = {"color": colour, "linestyle": dash, "marker": MARKERS[i % len(MARKERS)]}
        style |= {"markeredgecolor": "white", "markeredgewidth": 0.6}
        style |= {"linewidth": 1.5 + wider, "markersize": 6 + wider} if wider else {}
        axes.plot(x, y, label=name, zorder=3 + i, **style)
        if len(values) == 3:
            deviation = np.asarray(values[2], dtype=float)
            low = np.where(y - deviation > 0, y - deviation, y) if logy else y - deviation
            axes.fill_between(x, low, y + deviation, color=colour, alpha=0.18, linewidth=0, zorder=2)
    axes.set_yscale("log" if logy else "linear")


def _coincide(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two lines (2, n) share a segment: neighbouring points of both, on one x and within 0.5 % of the range of y."""
    shared, i, j = np.intersect1d(one[0], other[0], return_indices=True)
    finite = [y for y in (*one[1], *other[1]) if np.isfinite(y)]
    near = np.abs(one[1][i] - other[1][j]) <= 0.005 * (max(finite, default=0.0) - min(finite, default=0.0) or 1.0)
    return bool(len(shared) and (near[1:] & near[:-1] if len(shared) > 1 else near).any())


def scatter(points: np.ndarray, labels: np.ndarray, *, title: str = "", names: Sequence[str] | None = None) -> Figure:
    """Points (n, 2), such as those of t-SNE, coloured by label (n,); without ticks, since the axes have no units."""
    figure = blank_figure((5.6, 4.6))
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    for i, label in enumerate(np.unique(labels)):
        rows, name = labels == label, names[int(label)] if names is not None else str(label)
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]
        axes.scatter(
            points[rows, 0], points[rows, 1], s=14, color=colour, marker=marker, alpha=0.85, linewidths=0, label=name
        )
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    key = axes.legend(frameon=False, bbox_to_anchor=(1.0, 1.0), loc="upper left", markerscale=1.6, handletextpad=0.2)
    for text in key.get_texts():
        text.set_parse_math(False)  # names may contain dollar signs
    return figure


def pca_grid(
    rows: Mapping[str, np.ndarray], *, columns: Sequence[str] | None = None, title: str = "", cell: float = 0.9
) -> Figure:
    """One row of pictures per name: colour maps float (n, *grid, 3) in [0, 1], or images uint8 (n, H, W, 1 or 3).

    A map of a 1-D grid is drawn as a strip, a map of a 3-D grid by its middle slice. `columns` are headings; `cell` is
    the width of a picture in inches. All rows have the same n.
    """
    n, heights = len(next(iter(rows.values()))), [_height(maps[0]) for maps in rows.values()]
    size = 1.4 + cell * n, cell * sum(heights) + 0.1 + 0.3 * bool(title) + 0.2 * bool(columns)
    figure = blank_figure(size, pad=0.02)
    grid = figure.subplots(len(rows), n, squeeze=False, height_ratios=heights)
    for row, (name, maps) in zip(grid, rows.items(), strict=True):
        for axes, picture in zip(row, maps, strict=True):
            shape = "auto" if picture.ndim == 2 else "equal"
            axes.imshow(flat_map(picture), cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect=shape)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8, color=INK)
    for axes, heading in zip(grid[0], columns or (), strict=False):
        axes.set_title(heading, fontsize=9, color=INK, pad=4, parse_math=False)  # names may contain dollar signs
    if title:
        figure.suptitle(title, fontsize=11, color=INK)
    return figure


def _height(picture: np.ndarray) -> float:
    """Height of a picture or map in a `pca_grid`, over its width."""
    shown = flat_map(picture)
    return STRIP if picture.ndim == 2 else min(2.0, max(STRIP, shown.shape[0] / shown.shape[1]))


def flat_map(picture: np.ndarray) -> np.ndarray:
    """A map (*grid, 3) as a picture (h, w, 3): of three dimensions the middle slice, of one a strip; others unchanged."""
    if picture.ndim == 4:
        return picture[len(picture) // 2]
    return picture[None] if picture.ndim == 2 else picture


def save(shown: Figure | np.ndarray, path: str | Path, *, dpi: int = 150) -> None:
    """Write a figure, or a picture uint8 (height, width, 1 or 3), atomically, in the format of the path's suffix."""
    content = rendered(shown, Path(path).suffix.lstrip(".") or "png", dpi)
    with atomic_write(Path(path)) as file:
        file.write(content)


def figure_to_data_uri(shown: Figure | np.ndarray) -> str:
    """A figure, or a picture uint8 (height, width, 1 or 3), as a png in a `data:` URI."""
    return "data:image/png;base64," + base64.b64encode(rendered(shown, dpi=110)).decode("ascii")


def rendered(shown: Figure | np.ndarray, kind: str = "png", dpi: int = 150) -> bytes:
    """A figure, or a picture uint8 (height, width, 1 or 3), as the content of a file: png, and of figures also svg or pdf."""
    from PIL import Image

    buffer = io.BytesIO()
    if isinstance(shown, np.ndarray):
        Image.fromarray(shown[..., 0] if shown.shape[-1] == 1 else shown).save(buffer, format=kind)
    else:
        fonts.fit(shown)
        shown.savefig(buffer, format=kind, dpi=dpi)
    return buffer.getvalue()


def blank_figure(size: tuple[float, float], pad: float = 0.04) -> Figure:
    """A figure outside pyplot's registry: it need not be closed and selects no backend. Sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=pad, h_pad=pad, wspace=0.02, hspace=0.02)
    figure = Figure(figsize=size, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style_axes(
    axes: Axes, title: str = "", *, grid: Literal["x", "y", "both"] = "both", size: float | None = None
) -> None:
    """No box, and a light grid behind the data, of the values of one axis or both; `size` of the tick labels, in points."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis=grid, which="both", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=size)
    axes.set_title(title, loc="left", fontsize=11 if size is None else size + 2, color=INK)


def plain_ticks(axes: Any) -> None:
    """Tick labels with thousands separators; on a log axis 20 instead of 2x10¹, and no minor labels, which overlap."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plain = FuncFormatter(lambda value, _: f"{value:,.6g}")
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high < 1000 * low else (1,)))
            axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(plain)
