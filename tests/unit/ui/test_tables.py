"""Comparisons as the page shows them: those that commands wrote, and runs that were measured alike."""

import copy
import json
from pathlib import Path

import pytest

from selftrans.experiments.comparison.summary import mean_curve, rows
from selftrans.ui.contained import Contained, JsonFiles
from selftrans.ui.found_runs import Found
from selftrans.ui.tables import distances, measured_tables, stored_table
from tests.support.ui_runs import begun, state

FIGURES = Path(__file__).parents[3] / "docs" / "figures"
KEPT = FIGURES / "moving-compare.json"
IDENTITY = {
    "sampler": {"steps": 12, "labels": "balanced"},
    "images": 100,
    "extractor_sha256": "ab",
    "block": 2,
    "metric": "distance",
}


def stored(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return stored_table(Found("id", "name", Contained(folder.resolve())), JsonFiles())


@pytest.mark.parametrize("file", [KEPT, FIGURES / "digits-compare.json"], ids=["present", "of an earlier version"])
def test_a_comparison_that_is_kept_with_the_documents(tmp_path, file):
    summary = json.loads(file.read_text())
    found = stored(tmp_path, "compare.json", summary)
    first = summary["table"][0]
    row = dict(zip([each["name"] for each in found["headings"]], found["rows"][0], strict=True))
    assert row["method"] == first["method"] == "vanilla"
    assert row["distance"].startswith(f"{first['distance']['mean']:.2f}")
    assert found["curves"]["step"]["vanilla"] == summary["curves"]["step"]["vanilla"]
    shown = [row[0] for row in found["rows"]]
    assert "Self-Transcendence" in shown and "self_transcendence" not in shown, "titles, as in compare.html"
    assert set(found["curves"]["step"]) == set(found["curves"]["tflops"]) == set(shown)
    assert found["settings"]["extractor"].endswith(summary["extractor_sha256"])
    assert all(each["depends"] for each in found["headings"] if each["name"] in ("distance", "accuracy", "seconds"))
    json.dumps(found, allow_nan=False)


def test_runs_that_failed_are_named_with_the_reason(tmp_path):
    summary = json.loads(KEPT.read_text())
    first, second = "vanilla", "stage 1 only"
    assert [row["method"] for row in summary["table"][:2]] == [first, "structure"]
    summary["table"][0]["failed"] = 1
    summary["table"][1] |= {"seeds": 0, "failed": 3, "steps": None, "distance": None, "accuracy": None, "probe": None}
    summary["failed"] = [{"method": first, "seed": 7, "reason": "not \x1b finite"}]
    found = stored(tmp_path, "compare.json", summary)
    seeds = summary["table"][0]["seeds"]
    assert (
        found["rows"][0][0] == f"{first} (1 of {seeds + 1} seeds failed)"
        and found["rows"][1][0] == f"{second} (failed)"
    )
    assert found["outcome"] == f"failed: {first}, seed 7: not \\x1b finite"
    note = stored(tmp_path, "compare.json", summary | {"failed": [3]})["note"]
    assert "compare.json is not a comparison that this version reads" in note


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda s: "{", "name/compare.json cannot be read"),
        (lambda s: [], "does not hold what selftrans writes"),
        (
            lambda s: {k: v for k, v in s.items() if k != "curves"},
            "compare.json is not a comparison that this version reads",
        ),
        (lambda s: s | {"table": [{"method": "x"}]}, "compare.json is not a comparison that this version reads"),
        (
            lambda s: s | {"curves": {"step": {"a": [1]}, "tflops": {}}},
            "compare.json is not a comparison that this version reads",
        ),
    ],
)
def test_a_damaged_comparison_is_a_line(tmp_path, change, note):
    found = stored(tmp_path, "compare.json", change(json.loads(KEPT.read_text())))
    assert note.removeprefix("name/") in found["note"] and "rows" not in found


def test_the_table_of_a_quickstart(tmp_path):
    """As `quickstart.summarise` writes it, and as it did before it compared at equal compute."""
    kept = json.loads(KEPT.read_text())
    name = kept["table"][0]["method"]
    summary = {key: kept[key] for key in ("table", "metric", "sampler", "extractor_sha256", "seeds", "images")}
    summary |= {"curves": kept["curves"]["step"], "steps": 1000, "teacher_steps": 1000, "block": 2}
    found = stored(tmp_path, "table.json", summary)
    titles = {"vanilla": "vanilla", "structure": "stage 1 only", "self_transcendence": "Self-Transcendence"}
    curves = {
        axis: {titles[name]: curve for name, curve in kept["curves"][axis].items()} for axis in ("step", "tflops")
    }
    assert found["curves"] == {"step": curves["step"], "tflops": {}} and found["outcome"] == ""
    assert found["settings"]["teacher"] == "stage 1 at step 1,000" and found["rows"][0][0] == name
    found = stored(tmp_path, "table.json", summary | {"outcome": "faster", "curves_tflops": kept["curves"]["tflops"]})
    assert found["curves"]["tflops"] == curves["tflops"] and found["outcome"] == "faster"


def measured(folder, name, values, *, tflops=3.0, report=None, **identity):
    run = begun(folder / name)
    report = {"total_tflops": tflops, "student_tflops": 2.0, "total_seconds": 5.0, "stages": []} | (report or {})
    (run / "run.json").write_text(json.dumps(report))
    points = [
        {"step": 10 * i, "seconds": 1.0, "tflops": float(i), "distance": d, "accuracy": None, "probe": None}
        | IDENTITY
        | identity
        for i, d in enumerate(values, start=1)
    ]
    (run / "measured.json").write_text(json.dumps(points))
    return state(run)


def test_runs_that_were_measured_alike_are_one_table(tmp_path):
    states = [measured(tmp_path, f"{name}-seed{k}", [4.0 + k, 2.0 + k]) for name in ("a", "b") for k in (0, 1)]
    states += [measured(tmp_path, "a-seed2", [9.0], images=50), measured(tmp_path, "other", [1.0])]
    (table,) = measured_tables(states)
    results = {
        (s.place.parts[-1][0], int(s.place.parts[-1][-1])): (
            json.loads((s.place.path / "run.json").read_text()),
            s.measured(),
        )
        for s in states[:4]
    }
    expected = rows(results, ("a", "b"))
    assert [row[0] for row in table["rows"]] == ["a", "b"] and expected[0]["distance"]["mean"] == 2.5
    assert (
        dict(zip([each["name"] for each in table["headings"]], table["rows"][0], strict=True))["distance"]
        == "2.50 ± 0.71"
    )
    assert table["curves"]["step"]["a"] == [list(column) for column in mean_curve(results, "a")]
    assert table["settings"]["sampler"] == "steps 12, labels balanced"
    assert measured_tables(states, {Contained(tmp_path.resolve())}) == [], "where a command wrote a table"


def test_a_run_that_is_extended_is_in_the_table_as_it_was_at_its_first_finish(tmp_path):
    """run.json has the compute of 20 steps until the run is finished again; the points of steps 30 and 40 are newer."""
    first = [measured(tmp_path / "a", f"one-seed{k}", [4.0, 2.0]) for k in (0, 1)]
    extended = [
        measured(tmp_path / "b", f"one-seed{k}", [4.0, 2.0, 1.0, 0.5], report={"student_steps": 20}) for k in (0, 1)
    ]
    one, two = (measured_tables(states)[0] for states in (first, extended))
    assert one["rows"] == two["rows"] and one["curves"] == two["curves"]


def test_distances_over_total_compute_count_the_teacher(tmp_path):
    """Total 3, student 2: the teacher took 1, which every point has."""
    one, two = measured(tmp_path, "a", [4.0, 2.0]), measured(tmp_path, "b", [4.0], tflops=None)
    two.found = two.found._replace(id="two")
    found = distances([one, two])
    assert found["step"] == {"id": ([10, 20], [4.0, 2.0]), "two": ([10], [4.0])}
    assert found["tflops"] == {"id": ([2.0, 3.0], [4.0, 2.0])} and found["alike"] and found["metric"] == "distance"
    assert not distances([one, measured(tmp_path, "c", [4.0], images=7)])["alike"]


def test_points_that_are_no_points_are_left_out(tmp_path):
    one = measured(tmp_path, "a", [4.0])
    points = json.loads((one.place.path / "measured.json").read_text())
    wrong = [None, {}, copy.deepcopy(points[0]) | {"distance": None}, points[0] | {"step": "x"}]
    (one.place.path / "measured.json").write_text(json.dumps(points + wrong))
    assert [point["step"] for point in one.measured()] == [10]


def test_points_of_another_way_of_measuring_are_left_out_until_all_are_there(tmp_path):
    state = measured(tmp_path, "a-seed0", [4.0, 2.0])
    file = tmp_path / "a-seed0" / "measured.json"
    old = json.loads(file.read_text())
    file.write_text(json.dumps([old[0] | {"images": 7, "distance": 9.0}, *old]))
    assert [point["distance"] for point in state.measured()] == [4.0, 2.0]
