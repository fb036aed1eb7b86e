"""The quickstart's outcome at equal steps and equal compute, against hand-computed values."""

from __future__ import annotations

from typing import Any

import pytest

from selftrans.experiments.quickstart import time_taken
from selftrans.experiments.quickstart_report import at_compute, cells, compared, cut, duration, sentence

NAMES = {"vanilla": "vanilla", "structure": "stage 1 only", "both": "Both"}


def run(distances: list[float], *, every: int = 100, per_step: float = 0.01, teacher: float = 0.0) -> Any:
    points = [
        {"step": every * k, "tflops": per_step * every * k, "seconds": 1.0 * k, "distance": distance}
        for k, distance in enumerate(distances, start=1)
    ]
    own = points[-1]["tflops"]
    return {"student_tflops": own, "total_tflops": own + teacher, "total_seconds": 9.0, "student_steps": 1}, points


def results(last: float = 4.0) -> Any:
    """Vanilla 16, 8, 4, 2 after 1, 2, 3, 4 TFLOPs; both stages, for two steps, take 2 and the teacher's 1.5."""
    return {
        ("vanilla", 0): run([16.0, 8.0, 4.0, 2.0]),
        ("structure", 0): run([15.0, 8.0]),
        ("both", 0): run([12.0, last], teacher=1.5),
    }


def test_run_cut_at_a_step_has_the_cost_of_that_step() -> None:
    report, points = cut(run([16.0, 8.0, 4.0]), 200)
    assert [point["step"] for point in points] == [100, 200]
    assert (report["total_tflops"], report["student_tflops"], report["total_seconds"]) == (2.0, 2.0, 2.0)


def test_distance_at_a_compute_between_two_measurements_is_their_geometric_mean() -> None:
    vanilla = run([16.0, 4.0])
    assert at_compute(vanilla, 1.5) == pytest.approx(8.0)
    assert (at_compute(vanilla, 0.1), at_compute(vanilla, 9.0)) == (pytest.approx(16.0), pytest.approx(4.0))
    assert at_compute(run([16.0, 4.0], teacher=1.0), 2.5) == pytest.approx(8.0), "the teacher's compute comes first"


def test_table_at_equal_steps_and_at_equal_compute() -> None:
    found = compared(results(), tuple(NAMES), "vanilla", "both", 200)
    headings, rows = cells(found, NAMES)
    assert headings == ["distance", "total TFLOPs", "at step 100", "at step 200", "at 3.50 TFLOPs"]
    assert rows[0] == ["vanilla", "2.00", "16.00", "8.00", "2.83"], "2 sqrt(2), half way from 4 to 2"
    assert rows[1] == ["stage 1 only", "2.00", "15.00", "8.00", "-"]
    assert rows[2] == ["Both", "3.50", "12.00", "4.00", "4.00"]


@pytest.mark.parametrize(("last", "ahead"), [(4.0, "vanilla"), (2.0, "Both"), (2.8, "neither")])
def test_sentence_names_the_method_that_is_ahead_at_equal_compute(last: float, ahead: str) -> None:
    said = sentence(compared(results(last), tuple(NAMES), "vanilla", "both", 200), "Both", "vanilla")
    assert said.startswith("With one seed, the distance of Both is 0.75 times that of vanilla at student step 100 and ")
    assert f"and {last / 8:.2f} times at step 200, and the smaller one at 2 of the 2 measured steps." in said
    assert f"it is {last / 8**0.5:.2f} times that of vanilla: {ahead} is ahead. A ratio between 0.8 and 1.2 " in said


def test_sentence_counts_the_steps_at_which_the_baseline_is_better() -> None:
    said = sentence(compared(results(last=8.5), tuple(NAMES), "vanilla", "both", 200), "Both", "vanilla")
    assert "the smaller one at 1 of the 2 measured steps" in said, "12 against 16, then 8.5 against 8"


def test_ratios_of_several_seeds_are_of_pairs() -> None:
    both = results() | {(name, 1): value for (name, _), value in results(6.0).items()}
    found = compared(both, tuple(NAMES), "vanilla", "both", 200)
    assert found["ratios"]["last"]["mean"] == pytest.approx((4 / 8 + 6 / 8) / 2)
    assert "0.62 ± 0.18 times at step 200" in sentence(found, "Both", "vanilla")


def test_seconds_of_a_call_that_only_writes_the_report_again_do_not_count(tmp_path):
    trained, kept = ({"spent": {"steps": 1.0, "measuring": 0.0}}, []), ({"spent": {"steps": 0.0}}, [])
    again, now = {("vanilla", 0): kept}, (9.0, True)
    assert time_taken(tmp_path, ["t"], again, now) == now, "of a quickstart whose table was removed"
    (tmp_path / "table.json").write_text('{"table": ["t"], "seconds": 7, "continued": false}')
    assert time_taken(tmp_path, ["t"], again, now) == (7.0, False)
    assert time_taken(tmp_path, ["other"], again, now) == now
    assert time_taken(tmp_path, ["t"], again | {("sra", 0): trained}, now) == now


def test_duration_says_that_interrupted_calls_are_not_in_it() -> None:
    assert duration({"seconds": 232.6, "continued": False}) == "233 s"
    assert duration({"seconds": 706.9, "continued": True}) == "707 s, without earlier calls, which it continued"
