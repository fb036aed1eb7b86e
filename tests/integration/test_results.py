"""The rows of tables in docs/results/ are runs, or differences of runs, in the json of docs/figures/."""

import json
import re
import statistics
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [page for page in sorted((DOCS / "results").glob("*.md")) if page.stem != "fine-tuning"]  # which has no json
SEEDS = ("0", "1", "01", "012", "345", "012345")  #: those that a row may have
STUDENT = {1: 0.0, 2: 12.7062, 3: 4.3027, 6: 2.5706}  #: of 97.5 %, by number of seeds
CELL = re.compile(r"(?:at [\d,]+: )?([+-]?[\d,]+(?:\.\d+)?) ± ([\d.]+)")


def leaves(node, path=()):
    """Every number of a json with its path; points of a curve go by their step."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        point = isinstance(node, list) and isinstance(value, dict) and "step" in value
        yield from leaves(value, (*path, str(value["step"] if point else key)))
    if isinstance(node, int | float):
        yield path, node


def runs_of(found):
    """Path before the seed -> path after it -> values by seed; curves without a seed are those of seed 0."""
    runs = defaultdict(lambda: defaultdict(dict))
    for path, value in leaves(found):
        at = next((i for i, key in enumerate(path) if key.isdigit()), len(path) - 1)
        seed, rest = (path[at], path[at + 1 :]) if len(path[at]) == 1 else ("0", path[at:])
        runs[path[:at]][rest][seed] = value
    return runs


def summaries(node):
    """(mean, deviation) of every point and measure of a method, in files that hold no single seeds."""
    if isinstance(node, dict) and {"table", "curves"} <= node.keys():
        for row in node["table"]:
            curve = node["curves"].get("step", node["curves"])[row["method"]]
            ends = [(each["mean"], each["std"]) for each in row.values() if isinstance(each, dict)]
            yield [*zip(*curve[1:], strict=True), *ends]
    for each in node.values() if isinstance(node, dict) else ():
        yield from summaries(each)


@cache
def known():
    """What a row may have: (mean, deviation) of a run; (mean, 95 % interval) of its differences to vanilla of the same file."""
    rows, differences = [], []
    for file in sorted((DOCS / "figures").glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        rows += summaries(found)
        runs = runs_of(found)
        baselines = [run for path, run in runs.items() if "vanilla" in str(path)]
        for run in runs.values():
            for seeds in SEEDS:
                rows.append([spread([v[s] for s in seeds]) for v in run.values() if set(seeds) <= v.keys()])
                interval = STUDENT[len(seeds)] / len(seeds) ** 0.5
                for base in baselines:
                    both = [(run[k], base[k]) for k in run if set(seeds) <= run[k].keys() & base.get(k, {}).keys()]
                    spreads = [spread([a[s] - b[s] for s in seeds]) for a, b in both]
                    differences.append([(mean, interval * deviation) for mean, deviation in spreads])
    return rows, differences


def spread(values):
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def same(text, value):
    """Whether the text is the value, rounded; the files hold rounded values, too."""
    return abs(float(text.replace(",", "")) - value) < 0.52 * 0.1 ** len(text.partition(".")[2])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_rows_of_tables_are_runs_of_the_json(page):
    wrong, steps = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = line.strip("| ").split(" | ")
        steps = line.startswith("|") and (steps or any(re.fullmatch(r"at step [\d,]+", cell) for cell in cells))
        measured = steps and "interpolated" not in line
        numbers = [match.groups() for match in map(CELL.fullmatch, cells) if match and measured]
        for signed, runs in zip((False, True), known(), strict=True):
            row = [(mean, deviation) for mean, deviation in numbers if (mean[0] in "+-") == signed]
            if row and not any(all(any(same(m, x) and same(d, y) for x, y in run) for m, d in row) for run in runs):
                wrong.append(line)
    assert wrong == []
