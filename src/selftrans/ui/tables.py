"""Comparisons for the page: the tables of `compare` and `quickstart`, and tables of runs measured in the same way."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from selftrans.experiments.comparison.summary import AXES, curve, mean_curve, rows
from selftrans.experiments.html_report import HEADINGS, cells, depends_on, failures, legend, marked, settings_text
from selftrans.messages import first_line, printable
from selftrans.methods.registry import BASELINE, titles
from selftrans.plain_json import UNREADABLE
from selftrans.sections import RESERVED_KEYS, RUN_SECTIONS
from selftrans.ui.contained import Contained, JsonFiles, number, plain
from selftrans.ui.found_runs import TABLES, Found
from selftrans.ui.run_state import IDENTITY, RunState

SEEDED = re.compile(r"(.+)-seed(\d{1,9})")
#: what a column of the table depends on, besides what all of them do
COLUMNS = {
    "student steps": "train.steps",
    "seconds": "the machine, and what else it did at the time",
    "total seconds": "the machine; includes the training of the teacher",
    "total TFLOPs": "model, batch and steps of every stage; includes the training of the teacher",
    "distance": "extractor, number of samples, sampler, its steps and guidance, labels, averaged weights",
    "accuracy": "the classifier that is the extractor, and the labels asked for",
    "shallow probe": "the block, t = 0.4, the null condition",
}


def stored_table(found: Found, files: JsonFiles) -> dict[str, Any]:
    """The comparison of a folder as its command wrote it, as json types; a damaged one is a line."""
    base = {"id": found.id, "name": found.name}
    for name in TABLES:
        summary, wrong = files.read(found.place / name)
        if wrong:
            return base | {"note": wrong}
        if summary is not None:
            try:
                return base | {"file": name} | _stored(summary)
            except UNREADABLE as error:
                reason = f"{first_line(error)}; was it written by another version?"
                return base | {"note": f"{name} is not a comparison that this version reads ({reason})"}
    return base | {"note": "the comparison has been removed"}


def _stored(summary: dict[str, Any]) -> dict[str, Any]:
    metric, curves = str(summary["metric"]), summary["curves"]
    table = [{"at_once": 0} | row for row in summary["table"]]  # earlier versions did not write all of this
    if "config" not in summary:
        both = {"step": curves, "tflops": summary.get("curves_tflops", {})}
        outcome = printable(summary.get("outcome", ""), 1000)
        return _shown(table, metric, both, _of_quickstart(summary)) | {"outcome": outcome}
    older = {
        "teachers": [],
        "sections": [key for key in summary["config"] if key not in (*RUN_SECTIONS, *RESERVED_KEYS)],
    }
    shown = _shown(table, metric, {axis: curves[axis] for axis in AXES}, depends_on(older | summary))
    return shown | {"outcome": printable("; ".join(failures(summary)), 1000)}


def _of_quickstart(summary: dict[str, Any]) -> dict[str, str]:
    return {
        "student steps": f"{summary['steps']:,}",
        "teacher": f"stage 1 at step {summary['teacher_steps']:,}",
        "seeds": ", ".join(map(str, summary["seeds"])),
        "samples": f"{summary['images']:,}",
        "sampler": _text(summary["sampler"]),
        "probed block": str(summary["block"]),
        "extractor": f"sha256 {summary['extractor_sha256']}",
    }


def measured_tables(states: Iterable[RunState], stored: Collection[Contained] = ()) -> list[dict[str, Any]]:
    """A table for each folder of runs NAME-seed<k> that were measured in the same way, as json types.

    Folders in `stored` are left out: their command wrote a table.
    """
    groups: dict[tuple[str, str], dict[tuple[str, int], Any]] = {}
    for state in states:
        if Contained(state.place.root, state.place.parts[:-1]) in stored:
            continue
        match = SEEDED.fullmatch(state.place.parts[-1] if state.place.parts else state.place.root.name)
        if not match:
            continue
        report = state.read().report
        # while a run is extended, run.json has the cost of its first finish: later points do not belong to it
        end = number(report.get("student_steps"))
        points = [point for point in state.measured() if end is None or point["step"] <= end]
        if not points or number(report.get("student_tflops")) is None:
            continue
        folder = printable("/".join(state.place.parts[:-1]) or state.place.root.name)
        groups.setdefault((folder, _identity(points[-1])), {})[match[1], int(match[2])] = (report, points)
    tables = []
    for (folder, _), results in sorted(groups.items()):
        if len(results) > 1:
            tables.append({"id": "", "name": folder} | _measured(results))
    return tables


def _measured(results: dict[tuple[str, int], Any]) -> dict[str, Any]:
    try:
        names = tuple(dict.fromkeys(name for name, _ in results))
        compared = {seed for name, seed in results if name == BASELINE} >= {seed for _, seed in results}
        table = rows(results, names, baseline=BASELINE if compared else "")
        curves = {axis: {name: mean_curve(results, name, axis) for name in names} for axis in AXES}
        point = next(iter(results.values()))[1][-1]
        settings = {key: _text(point.get(key)) for key in IDENTITY if key != "metric"}
        return {"file": "measured.json of each run"} | _shown(table, str(point["metric"]), curves, settings)
    except UNREADABLE as error:
        return {"note": f"runs that were measured cannot be put in one table ({first_line(error)})"}


def _shown(table: Any, metric: str, curves: Any, settings: dict[str, str]) -> dict[str, Any]:
    """What the page gets of a comparison; raises where a part of it is not as it should be."""
    names, shown = marked(table), titles(row["method"] for row in table)
    lines = [cells(row, names) for row in table]
    # columns that compare with a baseline are empty where it has no run
    used = [i for i in range(len(HEADINGS)) if any(line[i] for line in lines)]
    drawn = {
        axis: {
            str(shown.get(name, name)): [[float(value) for value in column] for column in of_name]
            for name, of_name in found.items()
        }
        for axis, found in curves.items()
    }
    return plain(
        {
            "metric": metric,
            "headings": [{"name": HEADINGS[i], "depends": COLUMNS.get(HEADINGS[i], "")} for i in used],
            "rows": [[printable(line[i]) for i in used] for line in lines],
            "legend": legend(metric),
            "curves": drawn,
            "settings": {printable(key): printable(value, 2000) for key, value in settings.items()},
        }
    )


def distances(states: Sequence[RunState]) -> dict[str, Any]:
    """Measured distances of runs over steps and over total compute, by id: what is drawn below their pictures."""
    found: dict[str, Any] = {axis: {} for axis in AXES}
    metrics, identities = set(), set()
    for state in states:
        points, report = state.measured(), state.read().report
        if not points:
            continue
        found["step"][state.found.id] = curve((report, points), "step")
        compute = (report.get("total_tflops"), report.get("student_tflops"), *(p.get("tflops") for p in points))
        if all(number(each) is not None for each in compute):
            found["tflops"][state.found.id] = curve((report, points), "tflops")
        metrics.add(str(points[-1].get("metric")))
        identities.add(_identity(points[-1]))
    return found | {"metric": " or ".join(sorted(metrics)), "alike": len(identities) <= 1}


def _identity(point: dict[str, Any]) -> str:
    """What a measured point must share with another to be compared with it; all points of a run do."""
    return json.dumps([point.get(key) for key in IDENTITY], sort_keys=True)


def _text(value: Any) -> str:
    """A setting as text: `steps 12, sampler heun`."""
    return settings_text(value) if isinstance(value, dict) else "-" if value is None else str(value)
