"""What a worker process of a comparison does: it trains a run, or measures one checkpoint of a run."""

from __future__ import annotations

import gc
import json
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from selftrans.checkpoints.load import REPORT
from selftrans.experiments.comparison.compared_runs import Comparison, config_of_run, seconds_trained
from selftrans.experiments.comparison.measurement import Measurement, Point, Progress, measure_point
from selftrans.experiments.comparison.schedule import Job, Task
from selftrans.experiments.comparison.stopping import end_with_parent, ignore_interrupts
from selftrans.messages import first_line
from selftrans.plugins import trust_named
from selftrans.sampling.images import NotFinite
from selftrans.train.out_of_memory import is_out_of_memory
from selftrans.train.run import train

#: what one run fails with, while others can go on: training that diverges, samples that are not finite, no memory to train or
#: to measure it
FAILURES = (FloatingPointError, NotFinite, MemoryError, torch.OutOfMemoryError)

_worker: dict[str, Any] = {}  #: of this process, set by `init_worker`


class StepBar:
    """Takes the place of a run's progress bar, and passes its steps on to the bar of the comparison."""

    def __init__(self, progress: Progress, initial: int) -> None:
        self.progress = progress
        progress(initial)

    def update(self, steps: int = 1) -> None:
        self.progress(steps)

    def set_postfix(self, *_: Any, **__: Any) -> None:
        """The comparison's bar shows no losses."""

    def close(self) -> None:
        """The comparison's bar stays open."""


class Outcome(NamedTuple):
    """What a worker has done."""

    seconds: float = 0.0
    steps: float = 0.0  #: of them, those of training steps
    point: Point | None = None  #: of a checkpoint
    failure: str = ""  #: why a run could not be trained, or a checkpoint not be measured; one line


def init_worker(comparison: Comparison, threads: int, steps_done: Any, show_warning: Any) -> None:
    """Before its first task. `steps_done`: the queue for finished steps; `show_warning`: shows a warning as the parent does."""
    warnings.showwarning = show_warning
    ignore_interrupts()
    end_with_parent()
    torch.set_num_threads(threads)
    for config in comparison.variants.values():  # the permission to import code, which the parent got, is not inherited
        trust_named(config.method, config.model.name)
    _worker.update(comparison=comparison, progress=steps_done.put)


def make_reference() -> None:
    """Compute the statistics of the training data, unless the folder of the comparison holds them."""
    _measurement()


def _measurement() -> Measurement:
    """How this worker measures, from its first measurement on."""
    if "measurement" not in _worker:
        comparison: Comparison = _worker["comparison"]
        _worker["measurement"] = Measurement.of(
            comparison.shared,
            comparison.features,
            weights=comparison.weights,
            images=comparison.images,
            block=comparison.block,
            total=comparison.measurements * comparison.images,
            kept=comparison.out,
        )
    return _worker["measurement"]


def run_task(task: Task) -> Outcome:
    """Train a run, or measure one checkpoint. One of FAILURES is an outcome, any other error is raised."""
    try:
        return _trained(task.job) if task.checkpoint is None else _measured(task.job, task.checkpoint)
    except (*FAILURES, RuntimeError) as error:
        if not isinstance(error, FAILURES) and not is_out_of_memory(error):
            raise
        reason = first_line(error, limit=600)
    gc.collect()  # frees the memory of the failed run for the next one, and for other workers on the same GPU
    torch.cuda.empty_cache()
    return Outcome(failure=reason)


def _trained(job: Job) -> Outcome:
    comparison, started = _worker["comparison"], time.perf_counter()
    run = comparison.run(job)
    before = seconds_trained(run)
    train_one(comparison, job, _worker["progress"])
    report = json.loads((run / REPORT).read_text())
    steps = max(0.0, sum(stage["seconds"] for stage in report["stages"]) - before)
    return Outcome(time.perf_counter() - started, steps)


def _measured(job: Job, folder: Path) -> Outcome:
    comparison, started = _worker["comparison"], time.perf_counter()
    point = measure_point(comparison.run(job), folder, _measurement())
    _worker["progress"](comparison.measuring_cost)
    return Outcome(time.perf_counter() - started, point=point)


def train_one(comparison: Comparison, job: Job, progress: Progress) -> Path:
    """Train one variant with one seed, or continue it, with a checkpoint at every point; returns its run directory."""
    run, config = comparison.run(job), config_of_run(comparison, job)
    train(config, run, bar=lambda **options: StepBar(progress, options["initial"]), quiet=True)
    return run
