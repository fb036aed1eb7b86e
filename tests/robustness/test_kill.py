"""SIGKILL at random instants, most of them while a checkpoint is being written: the same command continues, and the
finished run equals an uninterrupted one."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import toy
from tests.support.forks import Forks
from tests.support.pictures import class_folders

pytestmark = pytest.mark.slow

#: overrides of runs of stage 1 and stage 2, whose guidance ends before the last step
RUNS: dict[str, dict[str, Any]] = {
    "accumulation and warm-up": {"train.checkpoint_every": 2},
    "bf16 and a single checkpoint": {"train.checkpoint_every": 2, "train.precision": "bf16", "train.keep": 1},
    "other options": {
        "train.checkpoint_every": 3,
        "train.accumulate": 1,
        "train.times": "lognormal",
        "train.path": "cosine",
        "train.preview_every": 4,
        "stage2.range_mode": "scale",
        "stage2.teacher_weights": "ema",
    },
}
LONG = {"stage1.steps": 14, "train.steps": 30, "stage2.until_step": 17, "log.every": 1}
FIRST_LINE = "[1/2] stage1"
WRITING, STEP, PREVIEW, BETWEEN, STARTING, ELSEWHERE = (
    "while a checkpoint was written",
    "in a step",
    "while a preview was made",
    "between the stages",
    "while starting",
    "elsewhere",
)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    server = Forks()
    yield server
    server.close()


def train(out: Path, dotted: dict[str, Any]) -> list[str]:
    return ["train", "digits", f"--data={toy.digits()}", f"--out={out}", *toy.flags(LONG | dotted)]


def steps_of(stage: Path) -> list[int]:
    """Steps of the checkpoints, valid or not."""
    try:
        return sorted(int(name[5:]) for name in os.listdir(stage / "checkpoints") if name.startswith("step-"))
    except FileNotFoundError:
        return []


def logged(stage: Path) -> int:
    """Lines in the log of a stage."""
    try:
        return (stage / "log.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def unfinished(run: Path) -> set[str]:
    """Checkpoints that are being written, or were when their process was killed."""
    return {path.name for path in run.glob("*/checkpoints/.step-*")}


def unfinished_previews(run: Path) -> set[str]:
    """Previews that are being made, or were when their process was killed, and have ended a process at most once."""
    return {f"{path.parts[-3]}/{path.name}" for path in run.glob("*/previews/.*.tries") if path.stat().st_size < 2}


# ---- where to kill


def a_checkpoint(run: Path) -> object:
    return max(unfinished(run), default=None)


def a_step(run: Path) -> object:
    stage = run / ("stage2" if logged(run / "stage2") else "stage1")
    count = logged(stage)
    return (stage.name, count) if count > max(steps_of(stage), default=0) else None


def a_preview(run: Path) -> object:
    try:
        return max(unfinished_previews(run), default=None)
    except FileNotFoundError:  # finished meanwhile
        return None


def the_end_of_stage_1(run: Path) -> object:
    return True if steps_of(run / "stage1")[-1:] == [LONG["stage1.steps"]] and not logged(run / "stage2") else None


def any_time(run: Path) -> object:
    return True


#: place -> the event to wait for, and the seconds within which the kill follows it
AIMS: dict[str, tuple[Callable[[Path], object], float]] = {
    WRITING: (a_checkpoint, 0.012),
    STEP: (a_step, 0.004),
    PREVIEW: (a_preview, 0.012),
    BETWEEN: (the_end_of_stage_1, 0.05),
    ELSEWHERE: (any_time, 1.5),
}
#: place -> number of kills required there, in each run; the others are at any time
REQUIRED = collections.Counter({WRITING: 6, STEP: 3, BETWEEN: 1})
KILLS = 12  #: in each run


def started(output: Path) -> bool:
    """Whether a process has announced its first stage: files from before say nothing about where it is."""
    try:
        return FIRST_LINE in output.read_text()
    except FileNotFoundError:
        return False


def frozen(child: Any) -> bool:
    """Stop the process, so that it stays where it is; False if it has ended."""
    child.send_signal(signal.SIGSTOP)
    while child.poll() is None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt":
                return True
        time.sleep(0.0002)
    return False


def kill(child: Any, run: Path, output: Path, aim: str, rng: random.Random) -> str | None:
    """Kill the process at a random instant after one of the next events, and return the place; None if it finished before.

    The process is stopped first, and continues unless it is where the kill is aimed at: how fast the machine is and how busy
    does not matter.
    """
    event, within = AIMS[aim]
    while aim != ELSEWHERE and child.poll() is None and not started(output):
        time.sleep(0.0002)
    seen, left = {event(run)} if aim == WRITING else set(), rng.randrange(4) if aim in (WRITING, STEP, PREVIEW) else 0
    while child.poll() is None:
        now = event(run)
        if now is not None and now not in seen:
            seen.add(now)
            left -= 1
            if left < 0:
                time.sleep(rng.uniform(0, within))
                if frozen(child):
                    at = place(run, child.pid, output.read_text())
                    if aim in (ELSEWHERE, at):
                        child.kill()
                        return at if child.wait() == -signal.SIGKILL else None
                    child.send_signal(signal.SIGCONT)
                    seen.discard(now)
        time.sleep(0.0002)
    return None


def place(run: Path, pid: int, output: str) -> str:
    """Where a process was killed, from the files that it left."""
    if any(f"-{pid}-" in name for name in unfinished(run)):
        return WRITING
    if FIRST_LINE not in output:
        return STARTING
    if unfinished_previews(run):
        return PREVIEW
    stage = run / ("stage2" if logged(run / "stage2") else "stage1")
    if stage.name == "stage1" and steps_of(stage)[-1:] == [LONG["stage1.steps"]]:
        return BETWEEN
    return STEP if logged(stage) > max(steps_of(stage), default=0) else ELSEWHERE


def kill_and_restart(
    start: Callable[[Path], Any],
    run: Path,
    uninterrupted: Path,
    rng: random.Random,
    kills: int = KILLS,
    required: collections.Counter[str] = REQUIRED,
) -> collections.Counter[str]:
    """Kill processes of a run until `kills` were killed, with the counts `required` per place, then let one finish.

    Returns the places of the kills. A run that finishes earlier is compared with the uninterrupted one as well, and started
    again.
    """
    places: collections.Counter[str] = collections.Counter()
    for attempt in range(5 * kills):
        output = run.with_name(f"{run.name}-{attempt}.txt")
        child, missing = start(output), required - places
        aim = rng.choices(list(missing), list(missing.values()))[0] if missing else ELSEWHERE
        if (missing or places.total() < kills) and (at := kill(child, run, output, aim, rng)):
            places[at] += 1
            continue
        assert child.wait() == 0, output.read_text()
        assert_equals_uninterrupted(run, uninterrupted)
        if not missing and places.total() >= kills:
            return places
        shutil.rmtree(run)
    raise AssertionError(f"{places} after {5 * kills} processes")


def test_training_killed_at_random_times(forks: Forks, tmp_path: Path) -> None:
    """Weights, EMA, optimiser, heads and log lines equal those of an uninterrupted run bit for bit."""
    rng, places = random.Random(1), collections.Counter[str]()
    for name, dotted in RUNS.items():
        uninterrupted, run = tmp_path / f"{name}, uninterrupted", tmp_path / name
        assert forks.start(train(uninterrupted, dotted), tmp_path / "uninterrupted.txt").wait() == 0
        required = REQUIRED | collections.Counter({PREVIEW: 2} if "train.preview_every" in dotted else {})
        start = functools.partial(forks.start, train(run, dotted))
        places += kill_and_restart(start, run, uninterrupted, rng, required=required)
    print(dict(places))
    assert places.total() >= KILLS * len(RUNS) and places[WRITING] >= 18


def assert_equals_uninterrupted(run: Path, uninterrupted: Path) -> None:
    toy.assert_same_run(run, uninterrupted)
    for stage, steps in (("stage1", LONG["stage1.steps"]), ("stage2", LONG["train.steps"])):
        assert [line["step"] for line in toy.log(run, stage)] == list(
            range(1, steps + 1)
        )  # no line twice, none missing
        assert steps_of(run / stage) == steps_of(uninterrupted / stage)
        assert toy.tree(run / stage / "previews") == toy.tree(uninterrupted / stage / "previews")
    assert [path.name for path in run.rglob(".*")] == [".lock"]
    reports = [json.loads((path / "run.json").read_text()) for path in (run, uninterrupted)]
    for report in reports:
        del report["total_seconds"]
        assert all(stage.pop("seconds") > 0 for stage in report["stages"])
    assert reports[0] == reports[1]


def test_fresh_interpreters_killed(forks: Forks, tmp_path: Path) -> None:
    """The same for `python -m selftrans`: no fork, nothing imported before."""

    def start(output: Path) -> subprocess.Popen:
        with output.open("w") as file:
            return subprocess.Popen([sys.executable, "-u", "-m", "selftrans", *argv], stdout=file, stderr=file)

    uninterrupted, run = tmp_path / "uninterrupted", tmp_path / "run"
    assert forks.start(train(uninterrupted, {}), tmp_path / "uninterrupted.txt").wait() == 0
    argv = train(run, {})
    required = collections.Counter({WRITING: 1})
    assert kill_and_restart(start, run, uninterrupted, random.Random(3), 1, required).total() == 1


# ---- preparing and sampling


def kill_while_writing(forks: Forks, argv: list[str], out: Path, kills: int, torn: int, rng: random.Random) -> None:
    """Kill a command `kills` times while it fills the folder `out`, then let it finish.

    The first `torn` kills leave a temporary file. If it finishes earlier, it is started again on an empty folder.
    """
    output, killed = out.with_name("output.txt"), 0
    for _ in range(5 * kills):
        child, before = forks.start(argv, output), set(os.listdir(out)) if out.exists() else set()
        required = rng.randrange(1, 8)  # new files before the kill
        while child.poll() is None and killed < kills:
            if out.exists() and len(set(os.listdir(out)) - before) >= required:
                time.sleep(rng.uniform(0, 0.004))
                if frozen(child):
                    if killed >= torn or any(out.glob(".*.tmp")):
                        child.kill()
                        break
                    child.send_signal(signal.SIGCONT)
            time.sleep(0.0002)
        if child.wait() == -signal.SIGKILL:
            killed += 1
            continue
        assert child.returncode == 0, output.read_text()
        if killed == kills:
            return
        shutil.rmtree(out)
    raise AssertionError(f"{killed} of {kills} kills in {5 * kills} processes")


def test_prepare_killed(forks: Forks, tmp_path: Path) -> None:
    pictures = class_folders(tmp_path / "pictures", 120)
    argv = ["prepare", str(pictures), "--shard-size=2", "--batch-size=2", "--out"]
    assert forks.start([*argv, str(tmp_path / "uninterrupted")], tmp_path / "output.txt").wait() == 0
    out = tmp_path / "out"
    kill_while_writing(forks, [*argv, str(out)], out, 6, 3, random.Random(4))
    assert toy.tree(out) == toy.tree(tmp_path / "uninterrupted")


def test_sample_killed(forks: Forks, tmp_path: Path) -> None:
    assert forks.start(train(tmp_path / "run", {}), tmp_path / "output.txt").wait() == 0
    argv = ["sample", str(tmp_path / "run"), "--num=90", "--steps=2", "--batch-size=3", "--out"]
    assert forks.start([*argv, str(tmp_path / "uninterrupted")], tmp_path / "output.txt").wait() == 0
    out = tmp_path / "out"
    kill_while_writing(forks, [*argv, str(out)], out, 6, 0, random.Random(5))
    assert toy.tree(out) == toy.tree(tmp_path / "uninterrupted")
