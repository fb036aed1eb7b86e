"""Runs for the tests of the local page: folders with the files of a run, written by hand, and the shared toy runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from starlette.testclient import TestClient

from selftrans.config import to_json
from selftrans.evaluate.plots import save
from selftrans.ui.contained import Contained, JsonFiles
from selftrans.ui.found_runs import Found, search
from selftrans.ui.run_state import RunState
from selftrans.ui.server import Page, application
from tests.support import toy


def line(step: int, **values: Any) -> dict[str, Any]:
    """A line of a log: a second for each step."""
    return {"stage": "s", "step": step, "loss": 2.0, "flow": 1.0, "seconds": float(step)} | values


def write_log(file: Path, lines: Sequence[Any]) -> Path:
    """A log.jsonl of these lines; text is written as it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in lines))
    return file


def begun(folder: Path, dotted: dict[str, Any] | None = None) -> Path:
    """A run that has been started: its settings (both stages of toy size), the order of its stages, no step yet."""
    folder.mkdir(parents=True)
    config = toy.override(toy.recipe("digits"), toy.TOY | (dotted or {})).restricted()
    (folder / "config.json").write_text(to_json(config))
    (folder / "run.json").write_text(json.dumps({"method": config.method, "order": ["stage1", "stage2"]}))
    return folder


def preview(run: Path, step: int, stage: str = "stage2", side: int = 40) -> None:
    """A preview: a grey picture, darker for later steps."""
    file = run / stage / "previews" / f"step-{step:08d}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    save(np.full((side, side, 1), max(0, 200 - 10 * step), dtype=np.uint8), file)


def state(run: Path) -> RunState:
    """The state of a run by itself."""
    return RunState(Found("id", run.name, Contained(run.parent.resolve(), (run.name,))), JsonFiles())


def ids(*roots: Path) -> dict[str, str]:
    """name -> id of the runs in these folders."""
    return {run.name: key for key, run in search([root.resolve() for root in roots]).runs.items()}


def client(*roots: Path, **options: Any) -> TestClient:
    """A browser without a window on the page of these folders."""
    return TestClient(application(Page(roots), **options), base_url="http://localhost")
