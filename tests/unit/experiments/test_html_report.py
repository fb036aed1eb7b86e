"""The table of a comparison as text, and what its page says of the seeds."""

import html

import numpy as np
import pytest
from matplotlib.figure import Figure

from selftrans.experiments import html_report
from selftrans.experiments.html_report import (
    HEADINGS,
    aligned,
    cells,
    comparison_page,
    convergence,
    spread_text,
    text_table,
)


def row(deviation=0.0):
    value = {"mean": 1234.5, "std": deviation}
    columns = ("seconds", "total_seconds", "total_tflops", "distance", "accuracy", "probe")
    reached = {"steps_to_baseline": {"mean": 1000.0, "std": 0.0}, "tflops_to_baseline": None}
    counts = {"reached": 1, "seeds": 1, "at_once": 0}
    return {"method": "vanilla", "steps": 1000} | dict.fromkeys(columns, value) | reached | counts


def test_numbers_of_a_row_have_their_thousands_marked():
    found = dict(zip(HEADINGS, cells(row(deviation=0.25), {"vanilla": "vanilla"}), strict=True))
    assert found["student steps"] == found["steps to vanilla's end"] == "1,000"
    assert found["distance"] == "1,234.50 ± 0.25" and found["TFLOPs to vanilla's end"] == "-"


def test_compute_of_a_tiny_run_is_not_zero_in_the_table():
    tiny = row() | {"total_tflops": {"mean": 0.00432, "std": 0.00008}}
    found = dict(zip(HEADINGS, cells(tiny, {"vanilla": "vanilla"}), strict=True))
    assert found["total TFLOPs"] == "0.0043 ± 0.0001" and found["distance"] == "1,234.50"
    assert spread_text({"mean": 0.0, "std": 0.0}, 2) == "0.00" and spread_text({"mean": 0.43, "std": 0.0}, 2) == "0.43"


def test_numbers_of_a_table_in_a_terminal_are_right_aligned():
    assert aligned([("block", "norm", "f_u"), ("1", "9.5", "-0.051"), ("12*", "123.4", "-")]) == (
        "block   norm     f_u\n-----  -----  ------\n1        9.5  -0.051\n12*    123.4       -"
    )


def test_a_table_in_a_narrow_terminal_goes_on_below(monkeypatch):
    monkeypatch.setattr(html_report, "terminal_width", lambda: 18)
    table = [("block", "norm", "f_u", "f_g"), ("1", "9.5", "-0.051", "2")]
    above, below = "block  norm\n-----  ----\n1       9.5", "block     f_u  f_g\n-----  ------  ---\n1      -0.051    2"
    assert aligned(table) == f"{above}\n\n{below}"
    monkeypatch.setattr(html_report, "terminal_width", lambda: None)
    assert len(aligned(table).splitlines()) == 3, "a file has lines of any length"


def test_failed_run_is_in_table_figure_and_page_with_its_reason(monkeypatch):
    monkeypatch.setattr(html_report, "depends_on", lambda summary: {})
    reason = "a-seed1/step-00000004 cannot be measured: sample 0 is not <finite>; leave its method out"
    curves = {axis: {"vanilla": ([1.0, 2.0], [4.0, 3.0], [0.0, 0.0])} for axis in ("step", "tflops")}
    summary = {"table": [row() | {"failed": 1}], "metric": "m", "seeds": [0, 1], "curves": curves}
    summary |= {"failed": [{"method": "vanilla", "seed": 1, "reason": reason}]}
    line, name = f"failed: vanilla, seed 1: {reason}", "vanilla (1 of 2 seeds failed)"
    assert f"\n{line}\n" in text_table(summary) and f"\n{name} " in text_table(summary)
    figure = convergence(summary)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [name]
    assert figure.get_supxlabel() == line.partition(";")[0]
    page = comparison_page(summary, figure, {})
    assert "None of vanilla: they are not finite." in page and "its run failed" not in page
    summary["failed"][0]["seed"] = 0  # whose samples are shown
    assert "None of vanilla: its run failed." in comparison_page(summary, figure, {})
    assert f"<td>{name}</td>" in page and f"<p>{html.escape(line)}</p>".replace("<p>", '<p class="note">') in page
    assert convergence(summary | {"failed": []}).get_supxlabel() == ""


def test_failed_run_of_a_method_without_a_row_is_listed():
    """In a file from elsewhere: the rows that `compare` writes have all of its methods."""
    failed = [{"method": "structure", "seed": 0, "reason": "r"}]
    assert html_report.failures({"table": [row()], "failed": failed}) == ["failed: stage 1 only, seed 0: r"]


def test_methods_have_their_titles_in_table_figure_and_page(monkeypatch):
    monkeypatch.setattr(html_report, "depends_on", lambda summary: {})
    names = ("structure", "self_transcendence", "mine")
    curves = {axis: {name: ([1.0, 2.0], [4.0, 3.0], [0.0, 0.0]) for name in names} for axis in ("step", "tflops")}
    summary = {"table": [row() | {"method": name} for name in names], "metric": "m", "seeds": [0], "curves": curves}
    summary |= {"failed": [{"method": "structure", "seed": 0, "reason": "r"}]}
    titles = ["stage 1 only", "Self-Transcendence", "mine"]
    figure = convergence(summary)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == titles
    page = comparison_page(summary, figure, {name: np.zeros((1, 8, 8, 1), np.uint8) for name in names[1:]})
    assert [f"<td>{title}</td>" in page for title in titles] == [True] * 3 and "<td>structure" not in page
    assert "None of stage 1 only: its run failed." in page and "<figcaption>Self-Transcendence</figcaption>" in page
    assert "accuracies without classes or without a classifier" in page, "as with --features values"
    assert "failed: stage 1 only, seed 0: r" in text_table(summary) and "\nSelf-Transcendence " in text_table(summary)


@pytest.mark.parametrize(
    ("mean", "std", "text"), [(1234.56, 0.26, "1,234.6 ± 0.3"), (2.0, 0.04, "2.0"), (-0.1, 1.0, "-0.1 ± 1.0")]
)
def test_deviation_that_rounds_to_zero_is_left_out(mean, std, text):
    assert spread_text({"mean": mean, "std": std}, 1) == text and spread_text(None, 1) == "-"


@pytest.mark.parametrize(
    ("seeds", "expected"), [([0], ("One seed; distance:", ">One seed.<")), ([0, 1], ("over 2 seeds; ", "the band is"))]
)
def test_page_says_what_the_deviations_are_of(seeds, expected, monkeypatch):
    monkeypatch.setattr(html_report, "depends_on", lambda summary: {})
    page = comparison_page(
        {"table": [row()], "metric": "m", "seeds": seeds}, Figure(), {"vanilla": np.zeros((1, 8, 8, 1), np.uint8)}
    )
    assert all(text in page for text in expected)
    assert ("standard deviation" in page) == (len(seeds) > 1)
