"""Variants trained in worker processes and measured alike: the same data, seeds, sampler and metric; resumable.

This is the parent process; `worker.py` has what a worker does, and `schedule.py` in which order.

Every run is an ordinary run directory `OUT/<method>-seed<k>`. Its checkpoints are the points of its curve; each point is
measured once and kept in the run's `measured.json`. The statistics of the training data are computed once, too, by one worker
while the others train, and kept in `OUT/reference-*.npz`.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from selftrans.checkpoints.load import REPORT
from selftrans.device import cpu_cores, load_average
from selftrans.experiments.comparison.compared_runs import Comparison
from selftrans.experiments.comparison.finished_runs import FinishedRun, all_measured, finished_runs
from selftrans.experiments.comparison.measurement import Point, PointsFile, check_alike
from selftrans.experiments.comparison.schedule import Job, Schedule, Task
from selftrans.experiments.comparison.stopping import StopRequest, end_workers, interrupts_held
from selftrans.experiments.comparison.worker import Outcome, init_worker, make_reference, run_task
from selftrans.progress import progress_bar
from selftrans.train.capture_rules import NotCaptured

Result: TypeAlias = tuple[dict[str, Any], list[Point]]  #: run.json, and the measured points
Results: TypeAlias = dict[Job, Result]


def train_and_measure(
    comparison: Comparison,
    *,
    workers: int | None = None,
    finished: Mapping[Job, FinishedRun] | None = None,
    failed: dict[Job, str] | None = None,
    load: float | None = None,
) -> Results:
    """Train and measure every variant with every seed: (name, seed) -> (run.json, measured points, oldest first).

    Repeating the call continues it.

    Args:
        workers: processes that run at the same time; None: one per core, one on a GPU.
        finished: the runs that need no more training; None: they are looked for.
        failed: gets the reason of each run that ends with one of `worker.FAILURES`; it is left out of the result, and others
            go on. None: such a run ends the call with a ValueError.
        load: `load_average` before the command did any work of its own; None: the one now.
    At any other error the other processes end, too, runs with a checkpoint, and it is raised, but for a run that continues
    without CUDA graphs: then all start anew. ValueError where a process is killed. A stop signal (SIGINT, SIGTERM, SIGUSR1) to
    this process is passed on, and `Stopped` raised when all have ended; a second one ends them at once.
    """
    workers, threads = processes(comparison, workers)
    load = load_average() if load is None else load
    # threads that wait by spinning are faster, unless they have to share the cores
    if workers > 1 or (load or 0) > 0.5:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    finished = finished_runs(comparison) if finished is None else finished
    shown = {"total": comparison.total, "disable": all_measured(comparison, finished), "unit": "step"}
    with progress_bar(desc="training and measuring", **shown) as bar:
        try:
            return _in_workers(comparison, workers, threads, bar, finished, failed)
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process was ended from outside, by the system if memory ran out; the same command continues: give it "
                "--workers 1, or a smaller --train.batch-size"
            ) from error
        except NotCaptured as error:
            if not error.reason:
                raise
            reason = error.reason
    warnings.warn(f"all workers start anew, and one run goes on without graphs: {reason}", stacklevel=2)
    if failed is not None:
        failed.clear()  # these runs are tried again, as where the command is repeated
    return train_and_measure(comparison, workers=workers, failed=failed, load=load)


def processes(comparison: Comparison, workers: int | None) -> tuple[int, int]:
    """(processes that run at the same time, threads of each, at most OMP_NUM_THREADS); `workers` None: one per core, one on a
    GPU."""
    jobs = comparison.jobs
    cores = cpu_cores()
    workers = min(len(jobs), workers or (1 if torch.cuda.is_available() else cores))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return workers, max(1, min(cores // workers, int(asked) if asked.isdecimal() else cores))


def check_counts(seeds: Sequence[int], images: int, workers: int | None) -> None:
    """ValueError for no seeds, or such as cannot be used, fewer than two images, and less than one process (None: default)."""
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or images < 2:
        raise ValueError("give seeds that differ from each other, from 0 on, and at least two images")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers} should be 1 or more; leave it out for one process per core")


@dataclass
class Work:
    """The runs of a comparison: the remaining tasks, and the results so far."""

    comparison: Comparison
    schedule: Schedule
    failed: dict[Job, str] | None  #: see `train_and_measure`
    #: seconds that this call spent on each run: of training `steps`; `training`, with models and checkpoints; `measuring`
    spent: dict[Job, dict[str, float]]
    measured: dict[Job, PointsFile]

    def note(self, task: Task, found: Outcome) -> None:
        """Record the result of a task. ValueError for a failure where `failed` is None."""
        job, folder = task
        if found.failure:
            self._fail(task, found.failure)
        elif folder and found.point:
            self.measured[job].add(folder, found.point)
            self.spent[job]["measuring"] += found.seconds
        else:
            due = self.comparison.due(job)
            self.spent[job] = {"steps": found.steps, "training": found.seconds, "measuring": 0.0}
            self.measured[job] = PointsFile(self.comparison.run(job), due)
            self.schedule.trained(job, due)

    def _fail(self, task: Task, reason: str) -> None:
        if self.failed is None:
            raise ValueError(reason)
        if task.checkpoint is None:
            # runs that it was to teach take the checkpoint of it that they need, or train their own teacher
            self.schedule.trained(task.job, [])
        if task.job not in self.failed:
            self.failed[task.job] = reason.replace(f"{self.comparison.out}{os.sep}", "")
            name, seed = task.job
            warnings.warn(f"{name}, seed {seed}, failed, and the others go on: {self.failed[task.job]}", stacklevel=2)


def _in_workers(
    comparison: Comparison,
    workers: int,
    threads: int,
    bar: Any,
    finished: Mapping[Job, FinishedRun],
    failed: dict[Job, str] | None,
) -> Results:
    """Train the runs and measure their checkpoints in worker processes, in the order of a `Schedule`."""
    lengths = {job: comparison.steps(job) for job in comparison.jobs if job not in finished}
    teachers = {job: teacher if (teacher := comparison.teacher(job)) in lengths else None for job in lengths}
    schedule = Schedule(lengths, teachers, workers)
    work = Work(comparison, schedule, failed, {}, {})
    for job, run in finished.items():
        work.spent[job] = dict.fromkeys(("steps", "training", "measuring"), 0.0)
        work.measured[job] = PointsFile(comparison.run(job), run.due, run.points)
        schedule.trained(job, [folder for folder in run.due if folder not in run.points])
        bar.update(comparison.steps(job) + len(run.points) * comparison.measuring_cost)
    if schedule:
        _run_tasks(work, workers, threads, bar)
    check_alike((point for held in work.measured.values() for point in held.points), comparison.features)
    jobs = [job for job in comparison.jobs if job not in (failed or {})]
    reports = {job: json.loads((comparison.run(job) / REPORT).read_text()) for job in jobs}
    return {job: (reports[job] | {"spent": work.spent[job]}, work.measured[job].points) for job in jobs}


def _run_tasks(work: Work, workers: int, threads: int, bar: Any) -> None:
    """Run the remaining tasks in worker processes. Raises `Stopped` after a stop signal, when all workers have ended."""
    context, schedule = multiprocessing.get_context("spawn"), work.schedule
    with interrupts_held():  # it starts the process that removes what workers share, which must outlive them
        steps_done = context.SimpleQueue()
    shared = (work.comparison, threads, steps_done, warnings.showwarning)
    with StopRequest() as stop, ProcessPoolExecutor(workers, context, init_worker, shared) as pool:
        with interrupts_held():
            reference = pool.submit(make_reference)
        running: dict[Future[Any], Task | None] = {reference: None}
        if workers == 1:  # nothing is trained meanwhile, and large data take minutes
            bar.set_postfix_str("first: measuring the training data")
        try:
            while schedule or running:
                stop.check()
                while len(running) < workers and (task := schedule.next(measuring=reference not in running)):
                    with interrupts_held():
                        running[pool.submit(run_task, task)] = task
                finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                _update_bar(steps_done, bar)
                for future in finished:
                    ended, found = running.pop(future), future.result()
                    if ended is not None:
                        work.note(ended, found)
                    else:  # the training data are measured, so checkpoints can be
                        bar.set_postfix_str("")
            stop.check()
        except BaseException:
            if stop.received is not None:
                bar.set_postfix_str("stopping after the current step; a further signal stops at once")
            killed = end_workers(pool, stop, lambda: _update_bar(steps_done, bar))
            for future, task in running.items():  # what was measured meanwhile is kept
                if task and task.checkpoint and not future.cancelled() and future.exception() is None:
                    with contextlib.suppress(ValueError):  # a full disk, perhaps; what ended the comparison is raised
                        work.note(task, future.result())
            if stop.received is not None:
                raise stop.stopped(killed) from None
            raise


def _update_bar(steps_done: Any, bar: Any) -> None:
    """Show the steps that the workers have reported."""
    while not steps_done.empty():
        bar.update(steps_done.get())
