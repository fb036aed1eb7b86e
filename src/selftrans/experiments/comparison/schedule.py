"""In which order workers train runs and measure checkpoints: no worker waits while there is something to do.

A run that teaches others is trained first, then the longest. Finished runs are measured, checkpoint by checkpoint, before
further ones are trained. When no more runs are left than there are workers, these are trained first, and then all workers
measure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

Job: TypeAlias = tuple[str, int]  #: name of a variant, seed


class Task(NamedTuple):
    """What one worker does: train a run, or measure one of its checkpoints."""

    job: Job
    checkpoint: Path | None = None  #: the one that is measured; None: the run is trained


class Schedule:
    """The tasks that are left.

    Args:
        steps: the length of each run. teachers: the run that teaches it, or None; it is trained after that one.
        workers: tasks that are done at the same time.
    """

    def __init__(self, steps: Mapping[Job, int], teachers: Mapping[Job, Job | None], workers: int) -> None:
        chain = dict(steps)  # steps of a run and of the longest one that waits for it
        for job, teacher in teachers.items():
            if teacher is not None:
                chain[teacher] = max(chain[teacher], steps[teacher] + steps[job])
        self._teachers, self._trained, self._workers = dict(teachers), set[Job](), workers
        self._untrained = sorted(steps, key=lambda job: -chain[job])
        self._unmeasured = deque[Task]()

    def __bool__(self) -> bool:
        """Whether tasks are left that `next` has not returned."""
        return bool(self._untrained or self._unmeasured)

    def next(self, *, measuring: bool = True) -> Task | None:
        """The next task; None if nothing can be done before a running task has ended.

        `measuring`: whether checkpoints can be measured already.
        """
        if measuring and self._unmeasured and len(self._untrained) > self._workers:
            return self._unmeasured.popleft()
        job = next((job for job in self._untrained if self._teachers[job] in {None, *self._trained}), None)
        if job is not None:
            self._untrained.remove(job)
            return Task(job)
        return self._unmeasured.popleft() if measuring and self._unmeasured else None

    def trained(self, job: Job, checkpoints: Iterable[Path]) -> None:
        """A run is complete: the runs that it teaches can be trained, and these of its checkpoints measured."""
        self._trained.add(job)
        self._unmeasured.extend(Task(job, checkpoint) for checkpoint in checkpoints)
