"""Variants trained in worker processes and measured alike: the same data, seeds, sampler and metric; resumable.

Every run is an ordinary run directory `OUT/<method>-seed<k>`. Its checkpoints are the points of its curve; each point is
measured once and kept in the run's `measured.json`. The statistics of the training data are computed once, too, by one worker
while the others train, and kept in `OUT/reference-*.npz`. `schedule.py` has the order in which all this is done.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import threading
import time
import warnings
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, TypeAlias

import torch

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import FILES
from selftrans.config import RunConfig
from selftrans.device import cpu_cores
from selftrans.experiments.measurement import (
    PROBED_BLOCK,
    Curve,
    Measurement,
    Point,
    Progress,
    due_checkpoints,
    interval,
    measure_point,
    measured_steps,
    measuring_cost,
)
from selftrans.experiments.schedule import Job, Schedule, Task
from selftrans.methods.registry import stages
from selftrans.methods.spec import Stage
from selftrans.plugins import trust_named
from selftrans.sections import Section, fields_of
from selftrans.train.log import progress_bar
from selftrans.train.run import train

Result: TypeAlias = tuple[dict[str, Any], list[Point]]  #: run.json, and the measured points
Results: TypeAlias = dict[Job, Result]

GRACE = 600  #: seconds after which a worker that was asked to end is killed; a large checkpoint is written in less


@dataclass(frozen=True)
class Comparison:
    """What is compared, and with what it is measured."""

    shared: RunConfig  #: what all variants share: data, steps, batch, sampler, the probed shallow block
    variants: dict[str, RunConfig]  #: by name; `method` is part of each
    seeds: tuple[int, ...]
    out: Path  #: holds everything
    images: int  #: samples for each distance
    features: str  #: extractor, by name or file
    weights: str | None = None  #: where a named extractor is kept
    block: int = PROBED_BLOCK  #: the shallow block whose features are probed (1-based)
    every: int | None = (
        None  #: steps between measurements, and only at the end beyond the steps of `shared`; None: a fifth
    )

    @property
    def jobs(self) -> list[Job]:
        return [(name, seed) for seed in self.seeds for name in self.variants]

    @property
    def total(self) -> int:
        """Cost of the comparison, in training steps."""
        steps = len(self.seeds) * sum(config.train.steps for config in self.variants.values())
        return steps + self.measurements * measuring_cost(self.shared, self.images)

    @property
    def measurements(self) -> int:
        """Number of measurements of all runs."""
        each = [measured_steps(c.train.steps, self.every, self.dense) for c in self.variants.values()]
        return len(self.seeds) * sum(map(len, each))

    @property
    def dense(self) -> int | None:
        """Last step that is measured at every interval; None: there is none."""
        return self.shared.train.steps if self.every else None

    def run(self, job: Job) -> Path:
        return self.out / f"{job[0]}-seed{job[1]}"

    def teacher(self, job: Job) -> Job | None:
        """The job that can teach this one: a run of the teaching stage alone, with the same settings of it and seed."""
        name, seed = job
        wanted = _own_teacher(self.variants[name])
        if wanted is None:
            return None
        others = {n: c for n, c in self.variants.items() if n != name}
        same = (n for n, c in others.items() if _trains(c, wanted, self.variants[name], self.every))
        return next(((n, seed) for n in same), None)


def _own_teacher(config: RunConfig) -> Stage | None:
    """The stage that a run would train first to teach its last one; None where there is none, or a teacher is given."""
    plan = stages(config)
    wanted = next((s.teacher for s in plan if s.teacher), None)
    return None if wanted is None or wanted.given else next((s for s in plan if s.name == wanted.stage), None)


def _trains(other: RunConfig, wanted: Stage, taught: RunConfig, every: int | None) -> bool:
    """Whether another run consists of this stage alone, and passes a checkpoint of it that is the same bit for bit."""
    plan = stages(other)
    if [stage.name for stage in plan] != [wanted.name] or plan[0].stream != wanted.stream:
        return False
    total = other.train.steps
    held = wanted.steps == total or wanted.steps % (every or interval(total)) == 0 < total - wanted.steps
    same = all(_acting(other.section(kind)) == _acting(taught.section(kind)) for kind in wanted.sections)
    theirs, ours = other.override(plan[0].settings), taught.override(wanted.settings)
    return held and same and (theirs.model, theirs.train) == (ours.model, ours.train)


def _acting(section: Section) -> dict[str, Any]:
    """Settings that a step depends on: all but the lengths of stages."""
    return {name: value for name, value, _, length in fields_of(section) if not length}


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


def compare(comparison: Comparison, *, workers: int | None = None) -> Results:
    """Train and measure every variant with every seed: (name, seed) -> (run.json, measured points, oldest first).

    `workers` processes run at the same time (None: one per core, one on a GPU). Repeating the call continues it. Where one of
    them fails, the others end, too, runs with a checkpoint, and its error is raised; ValueError where one is killed.
    """
    workers, threads = processes(comparison, workers)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait by spinning slow each other down
    with progress_bar(total=comparison.total, unit="step", desc="training and measuring") as bar:
        try:
            done = _in_workers(comparison, workers, threads, bar)
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process was ended from outside, by the system if memory ran out; the same command continues: give it "
                "--workers 1, or a smaller --train.batch-size"
            ) from error
    return {job: done[job] for job in comparison.jobs}


def processes(comparison: Comparison, workers: int | None) -> tuple[int, int]:
    """(processes that run at the same time, threads of each); `workers` None: one per core, one on a GPU."""
    jobs = comparison.jobs
    cores = cpu_cores()
    workers = min(len(jobs), workers or (1 if torch.cuda.is_available() else cores))
    return workers, max(1, cores // workers)


def seconds_trained(run: Path) -> float:
    """Seconds of training steps until the newest checkpoints of a run."""
    newest = [checkpoint.steps(folder)[-1:] for folder in run.glob("*/checkpoints")]
    headers = [checkpoint.read_header(held[0][1] / FILES["ema"]) for held in newest if held]
    return float(sum(header["seconds"] for header in headers))


@dataclass
class Spent:
    """Seconds of this call for one run."""

    steps: float = 0.0  #: training steps
    training: float = 0.0  #: these, models and checkpoints
    measuring: float = 0.0


def _in_workers(comparison: Comparison, workers: int, threads: int, bar: Any) -> Results:
    """Train the runs and measure their checkpoints in worker processes, in the order of a `Schedule`."""
    context = multiprocessing.get_context("spawn")
    steps_done = context.SimpleQueue()
    shared = (comparison, threads, steps_done, warnings.showwarning)
    lengths = {job: comparison.variants[job[0]].train.steps for job in comparison.jobs}
    schedule = Schedule(lengths, {job: comparison.teacher(job) for job in comparison.jobs}, workers)
    spent, curves = dict[Job, Spent](), dict[Job, Curve]()
    with ProcessPoolExecutor(workers, context, _init_worker, shared) as pool:
        reference = pool.submit(_make_reference)
        running: dict[Future[Any], Task | None] = {reference: None}
        try:
            while schedule or running:
                while len(running) < workers and (task := schedule.next(measuring=reference not in running)):
                    running[pool.submit(_run_task, task)] = task
                finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                _pass_on(steps_done, bar)
                for future in finished:
                    ended, found = running.pop(future), future.result()
                    if ended is None:
                        continue  # the reference is there: checkpoints can be measured
                    job, folder = ended
                    if folder is None:
                        due = due_checkpoints(comparison.run(job), comparison.every, comparison.dense)
                        spent[job], curves[job] = found, Curve(comparison.run(job), due)
                        schedule.trained(job, due)
                    else:
                        curves[job].add(folder, found[0])
                        spent[job].measuring += found[1]
        except BaseException as error:
            ask = not isinstance(error, KeyboardInterrupt)  # Ctrl-C reaches the workers itself
            _end(pool, steps_done, bar, ask=ask)
            for future, task in running.items():  # what was measured meanwhile is kept
                if task and task.checkpoint and not future.cancelled() and future.exception() is None:
                    curves[task.job].add(task.checkpoint, future.result()[0])
            raise
    reports = {job: json.loads((comparison.run(job) / "run.json").read_text()) for job in lengths}
    return {job: (reports[job] | {"spent": vars(spent[job])}, curves[job].points) for job in lengths}


def _pass_on(steps_done: Any, bar: Any) -> None:
    """Show the steps that the workers have reported."""
    while not steps_done.empty():
        bar.update(steps_done.get())


def _end(pool: ProcessPoolExecutor, steps_done: Any, bar: Any, *, ask: bool) -> None:
    """Wait until all workers have ended; no other job starts. `ask`: they are sent SIGTERM: a run in training writes a
    checkpoint, a measurement is given up, and an idle worker ends.

    It is sent again and again: the first one only ends the training, and the worker may then wait for a lock that a killed
    one held. Steps are read meanwhile: a worker that cannot report one waits, and would not end.
    """
    workers = list(pool._processes.values())  # `shutdown` forgets them

    def until_ended() -> None:
        last = time.monotonic() + GRACE
        while alive := [worker for worker in workers if worker.is_alive()]:
            _pass_on(steps_done, bar)
            for worker in alive if ask else ():
                worker.terminate() if time.monotonic() < last else worker.kill()
            connection.wait([worker.sentinel for worker in alive], timeout=0.5)

    ending = threading.Thread(target=until_ended, daemon=True)
    ending.start()
    pool.shutdown(cancel_futures=True)
    ending.join()


def _init_worker(comparison: Comparison, threads: int, steps_done: Any, show_warning: Any) -> None:
    """In a new worker: what its jobs share, and how the parent process shows warnings."""
    warnings.showwarning = show_warning
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    for config in comparison.variants.values():  # this process knows nothing of what the parent was allowed to import
        trust_named(config.method, config.model.name)
    _worker.update(comparison=comparison, progress=steps_done.put)


def _end_with_parent() -> None:
    """End this worker when its parent is killed: else it would train on unnoticed. Runs survive an end at any moment."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


_worker: dict[str, Any] = {}  #: of this process, set by `_init_worker`


def _make_reference() -> None:
    """In a worker: compute the statistics of the training data, unless the folder of the comparison holds them."""
    _measurement()


def _measurement() -> Measurement:
    """In a worker: how it measures, from its first measurement on."""
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
    measurement: Measurement = _worker["measurement"]
    return measurement


def _run_task(task: Task) -> Spent | tuple[Point, float]:
    """In a worker: train a run, or measure one checkpoint: (point, seconds)."""
    comparison, progress, started = _worker["comparison"], _worker["progress"], time.perf_counter()
    run = comparison.run(task.job)
    if task.checkpoint is None:
        before = seconds_trained(run)
        train_one(comparison, task.job, progress)
        report = json.loads((run / "run.json").read_text())
        steps = max(0.0, sum(stage["seconds"] for stage in report["stages"]) - before)
        return Spent(steps, time.perf_counter() - started)
    point = measure_point(run, task.checkpoint, _measurement())
    progress(measuring_cost(comparison.shared, comparison.images))
    return point, time.perf_counter() - started


def train_one(comparison: Comparison, job: Job, progress: Progress) -> Path:
    """Train one variant with one seed, or continue it, with a checkpoint at every point; returns its run directory."""
    config, run, teacher = comparison.variants[job[0]], comparison.run(job), comparison.teacher(job)
    every = comparison.every or interval(config.train.steps)
    settings = dataclasses.replace(config.train, seed=job[1], checkpoint_every=every, keep=0, preview_every=0)
    config = dataclasses.replace(config, train=settings)
    if teacher is not None:
        wanted, taught = _own_teacher(config), next(s.teacher for s in stages(config) if s.teacher)
        assert wanted is not None
        held = dict(checkpoint.steps(comparison.run(teacher) / wanted.name / "checkpoints"))
        if wanted.steps in held:  # not in a run that was first made shorter, with checkpoints elsewhere
            config = config.override({taught.option: str(held[wanted.steps])})
    train(config, run, bar=lambda **options: StepBar(progress, options["initial"]), quiet=True)
    return run
