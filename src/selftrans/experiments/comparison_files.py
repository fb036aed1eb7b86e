"""The files of a comparison that people open: compare.json, .csv, .png and .html, written unless that would change nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from selftrans.evaluate import plots
from selftrans.experiments import html_report
from selftrans.experiments.comparison import Comparison
from selftrans.experiments.measurement import MEASURED, samples_of, stored_conditions, stored_points
from selftrans.experiments.summary import as_csv
from selftrans.sampling.images import NotFinite
from selftrans.storage import recorded, sha256_file, write_json, write_text
from selftrans.train.data_window import data_of

SHOWN = 32  #: samples on the page, per method
JSON, DRAWN = "compare.json", ("compare.csv", "compare.png", "compare.html")
FILES = "files"  #: entry of compare.json: what the other files were made from, and their sha256


def write(chosen: Comparison, summary: dict[str, Any]) -> dict[str, Any]:
    """Write compare.json, .csv, .png and .html to the directory of the comparison; returns what the first one holds."""
    failed = {(one["method"], one["seed"]) for one in summary["failed"]}
    conditioning = stored_conditions(data_of(chosen.shared.data), dataclasses.replace(chosen.shared.sample, seed=1))
    grids = {}
    for name in chosen.variants:
        job = name, chosen.seeds[0]
        if job not in failed:
            last = chosen.due(job)[-1]
            with contextlib.suppress(NotFinite):  # those that were measured have other noise, and are finite
                grids[name] = samples_of(last, chosen.shared.sample, SHOWN, conditioning)
    captions, figure = conditioning.texts(np.arange(SHOWN)), html_report.convergence(summary)
    plots.save(figure, chosen.out / "compare.png")
    write_text(chosen.out / "compare.csv", as_csv(summary["table"]))
    write_text(chosen.out / "compare.html", html_report.comparison_page(summary, figure, grids, captions))
    summary = summary | {FILES: _files(chosen)}
    write_json(chosen.out / JSON, summary)
    return summary


def unchanged(chosen: Comparison, summary: dict[str, Any]) -> dict[str, Any] | None:
    """What compare.json holds, if it and the other files are there as `write` would write them; else None."""

    def same(held: dict[str, Any]) -> dict[str, Any] | None:
        wanted = summary | {"time": held["time"], FILES: _files(chosen)}  # the time is that of the call that wrote them
        return held if held == json.loads(json.dumps(wanted)) else None

    return recorded(chosen.out / JSON, same, None)


def _files(chosen: Comparison) -> dict[str, str]:
    """sha256 of the files next to compare.json, and a hash of what they show besides its content: samples, by this code."""
    manifest = data_of(chosen.shared.data).manifest
    runs = [chosen.run((name, chosen.seeds[0])) for name in chosen.variants]
    weights = [sorted(point["sha256"] for point in stored_points(Path(run, MEASURED))) for run in runs]
    code = [sha256_file(Path(str(file))) for file in (__file__, html_report.__file__, plots.__file__)]
    made_from = hashlib.sha256(json.dumps([code, weights, manifest.to_json()]).encode()).hexdigest()
    return {"made_from": made_from} | {name: sha256_file(chosen.out / name) for name in DRAWN}
