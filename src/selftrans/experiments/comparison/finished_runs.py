"""The finished runs in the folder of a comparison, and which of their checkpoints are measured as the others are.

They are found from json files alone: no weights are read or hashed, which takes minutes for large models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import FILES, REPORT
from selftrans.data.dataset import Dataset
from selftrans.evaluate.extractors import extractor_sha256
from selftrans.experiments.comparison.compared_runs import Comparison, config_of_run
from selftrans.experiments.comparison.measurement import (
    MEASURED,
    Point,
    identity_of,
    image_shape,
    measured_before,
    stored_conditions,
)
from selftrans.experiments.comparison.schedule import Job
from selftrans.plain_json import UNREADABLE
from selftrans.train.initial_weights import resolve_init
from selftrans.train.preview import with_prompts
from selftrans.train.resume import differences, settings_before, settle
from selftrans.train.run import stages_to_run
from selftrans.train.run_data import data_of, with_window

COSTS = ("student_tflops", "total_tflops", "total_seconds")  #: entries of run.json that tables show; None: unknown


@dataclass(frozen=True)
class FinishedRun:
    """A run that needs no more training."""

    report: dict[str, Any]  #: its run.json
    due: list[Path]  #: its checkpoints that are points of the curve, oldest first
    points: dict[Path, Point]  #: those of them that are measured

    @property
    def measured(self) -> bool:
        return len(self.points) == len(self.due)


def finished_runs(comparison: Comparison) -> dict[Job, FinishedRun]:
    """The runs that need no more training, with the settings and data of the comparison as they are now.

    A run that cannot be read, or differs, is left out: training or measuring it then names what is wrong.
    """
    found = dict[Job, FinishedRun]()
    reported = [job for job in comparison.jobs if (comparison.run(job) / REPORT).is_file()]
    if not reported:
        return found
    with contextlib.suppress(*UNREADABLE):
        dataset = data_of(comparison.shared.data)
        identity = _identity(comparison, dataset)
        for job in reported:
            with contextlib.suppress(*UNREADABLE):
                if held := _trained(comparison, job, dataset, identity):
                    found[job] = held
    return found


def _identity(comparison: Comparison, dataset: Dataset) -> dict[str, Any]:
    """What points must share to be comparable, see `measurement.identity_of`. ValueError where the extractor cannot be used."""
    sha256 = extractor_sha256(comparison.features, weights=comparison.weights, shape=image_shape(dataset.manifest))
    sample = dataclasses.replace(comparison.shared.sample, num=comparison.images)
    return identity_of(sample, dataset, stored_conditions(dataset, sample), sha256, comparison.block)


def all_measured(comparison: Comparison, finished: Mapping[Job, FinishedRun]) -> bool:
    """Whether nothing is left to be trained or measured."""
    return all(job in finished and finished[job].measured for job in comparison.jobs)


def with_samples(comparison: Comparison, finished: Mapping[Job, FinishedRun]) -> dict[Job, FinishedRun]:
    """The runs, without those of the first seed whose last checkpoint is damaged: samples of it are shown."""
    drawn = comparison.seeds[0]
    return {job: run for job, run in finished.items() if job[1] != drawn or not _is_damaged(run.due[-1])}


def _is_damaged(folder: Path) -> bool:
    try:
        checkpoint.read(folder)
    except ValueError:
        return True
    return False


def _trained(comparison: Comparison, job: Job, dataset: Dataset, identity: dict[str, Any]) -> FinishedRun | None:
    """A run, if training it would do nothing: the checks are those at the start of `train`."""
    run = comparison.run(job)
    before = settings_before(run)
    if before is None:
        return None
    config = config_of_run(comparison, job).override({"train.allow_changes": False}).restricted().check()
    config, _ = resolve_init(with_prompts(config, dataset.manifest), before, run)
    config = settle(with_window(config, dataset, before), run, dataset.manifest)
    plan, report = stages_to_run(config), json.loads((run / REPORT).read_text())
    done = [(stage["stage"], stage["steps"]) for stage in report["stages"]]
    if differences(before, config) or done != [(stage.name, stage.steps) for stage in plan]:
        return None
    known = all(report[key] is None or isinstance(report[key], int | float) for key in COSTS)
    due = comparison.due(job)
    last = checkpoint.path_of_step(run / plan[-1].name / "checkpoints", plan[-1].steps)
    if not known or report["student_steps"] != plan[-1].steps or due[-1:] != [last]:
        return None
    points, measured = dict[Path, Point](), measured_before(run / MEASURED, identity)
    for folder in due:
        digest = checkpoint.read_state(folder)["sha256"][FILES["ema"]]
        if not (folder / FILES["ema"]).is_file():
            return None
        if digest in measured:
            points[folder] = measured[digest]
    if last not in points:
        checkpoint.read(last)  # a damaged one is trained again, not measured
    return FinishedRun(report, due, points)
