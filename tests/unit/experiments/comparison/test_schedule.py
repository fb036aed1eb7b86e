"""The order in which workers train and measure, against schedules that were made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from selftrans.experiments.comparison.schedule import Job, Schedule, Task

VANILLA, TEACHER, TAUGHT = ("vanilla", 0), ("stage 1", 0), ("both", 0)
STEPS: Mapping[Job, int] = {VANILLA: 15, TEACHER: 10, TAUGHT: 10}
TEACHERS: Mapping[Job, Job | None] = {VANILLA: None, TEACHER: None, TAUGHT: TEACHER}
MEASURING = 1


def simulate(steps: Mapping[Job, int], teachers: Mapping[Job, Job | None], workers: int, points: int) -> list[tuple]:
    """(start, end, job, what) of each task, in the order in which they start; a run has `points` checkpoints."""
    schedule, now, running, done = Schedule(steps, teachers, workers), 0, list[tuple[int, Task]](), list[tuple]()
    while schedule or running:
        while len(running) < workers and (task := schedule.next()):
            end = now + (MEASURING if task.checkpoint else steps[task.job])
            running.append((end, task))
            done.append((now, end, task.job[0], task.checkpoint.name if task.checkpoint else "train"))
        now, task = min(running, key=lambda each: each[0])
        running.remove((now, task))
        if task.checkpoint is None:
            schedule.trained(task.job, [Path(str(k)) for k in range(points)])
    return done


def test_quickstart_on_two_workers_keeps_both_busy_to_the_end() -> None:
    found = simulate(STEPS, TEACHERS, 2, 3)
    assert [each for each in found if each[3] == "train"] == [
        (0, 10, "stage 1", "train"),  # with the run that waits for it: the longest chain
        (0, 15, "vanilla", "train"),
        (10, 20, "both", "train"),
    ]
    assert [each[2:] for each in found if each[3] != "train"] == [
        (name, str(k)) for name in ("stage 1", "vanilla", "both") for k in range(3)
    ]
    assert sum(end - start for start, end, *_ in found) == 44 and max(end for _, end, *_ in found) == 22


def test_runs_are_measured_before_others_are_trained_while_many_are_left() -> None:
    steps: dict[Job, int] = {("a", seed): 10 - seed for seed in range(4)}
    found = simulate(steps, dict.fromkeys(steps), 1, 2)
    assert [each[3] for each in found] == ["train", "0", "1"] * 2 + ["train", "train", *"0101"]


def test_run_with_a_teacher_waits_for_it() -> None:
    schedule = Schedule(STEPS, TEACHERS, 3)
    assert [schedule.next(), schedule.next(), schedule.next()] == [Task(TEACHER), Task(VANILLA), None]
    assert schedule
    schedule.trained(TEACHER, [])
    assert (schedule.next(), schedule.next(), bool(schedule)) == (Task(TAUGHT), None, False)


def test_runs_are_trained_until_checkpoints_can_be_measured() -> None:
    schedule = Schedule({("a", seed): 10 - seed for seed in range(4)}, {("a", seed): None for seed in range(4)}, 1)
    assert schedule.next(measuring=False) == Task(("a", 0))
    schedule.trained(("a", 0), [Path("0")])
    assert schedule.next(measuring=False) == Task(("a", 1))
    assert schedule.next() == Task(("a", 0), Path("0"))
    schedule.trained(("a", 1), [Path("1")])
    assert [schedule.next(measuring=False) for _ in range(3)] == [Task(("a", 2)), Task(("a", 3)), None] and schedule
