"""The figure of `selftrans analyse RUN` with the accuracy of the probes; the command is tested in cli/test_main."""

from __future__ import annotations

from selftrans.experiments.analyse_run import _accuracies


def test_the_legend_of_the_probes_covers_no_curve():
    """Curves that fill the axes, so that no place inside them is free."""
    series = {t: [0.12, 0.5, 0.9, 0.97, 0.5, 0.12] for t in (0.3, 0.4, 0.5, 0.6, 0.7)}
    figure = _accuracies(series, 0.1, 90)
    figure.canvas.draw()
    (axes,) = figure.axes
    key, inside = axes.get_legend().get_window_extent(), axes.get_window_extent()
    assert key.y0 >= inside.y1 and figure.bbox.x0 <= key.x0 < key.x1 <= figure.bbox.x1 and key.y1 <= figure.bbox.y1
