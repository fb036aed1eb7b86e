"""SIGKILL at random instants, above all while a checkpoint is being written: the same command continues, and the finished
run equals an undisturbed one."""

from __future__ import annotations

import collections
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

#: overrides of runs through stage 1 and stage 2, whose guidance ends on the way
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
WRITING, STEP, PICTURE, BETWEEN, STARTING, ELSEWHERE = (
    "while a checkpoint was written",
    "in a step",
    "while a picture was made",
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
    """Checkpoints that are being written, or were when their process died."""
    return {path.name for path in run.glob("*/checkpoints/.step-*")}


def half_made(run: Path) -> set[str]:
    """Pictures that are being made, or were when their process died, and have ended a process at most once."""
    return {f"{path.parts[-3]}/{path.name}" for path in run.glob("*/previews/.*.tries") if path.stat().st_size < 2}


# ---- where to kill


def a_checkpoint(run: Path) -> object:
    return max(unfinished(run), default=None)


def a_step(run: Path) -> object:
    stage = run / ("stage2" if logged(run / "stage2") else "stage1")
    count = logged(stage)
    return (stage.name, count) if count > max(steps_of(stage), default=0) else None


def a_picture(run: Path) -> object:
    try:
        return max(half_made(run), default=None)
    except FileNotFoundError:  # made since
        return None


def the_end_of_stage_1(run: Path) -> object:
    return True if steps_of(run / "stage1")[-1:] == [LONG["stage1.steps"]] and not logged(run / "stage2") else None


def any_time(run: Path) -> object:
    return True


#: place -> the event to wait for, and the seconds within which the kill follows it
AIMS: dict[str, tuple[Callable[[Path], object], float]] = {
    WRITING: (a_checkpoint, 0.012),
    STEP: (a_step, 0.004),
    PICTURE: (a_picture, 0.012),
    BETWEEN: (the_end_of_stage_1, 0.15),
    ELSEWHERE: (any_time, 1.5),
}
#: place -> kills wanted there, in each run
WANTED = collections.Counter({WRITING: 9, STEP: 4, BETWEEN: 2, ELSEWHERE: 1})


def kill(child: Any, run: Path, aim: Callable[[Path], object], within: float, rng: random.Random) -> bool:
    """Kill the process after one of the next events; false when it finished before."""
    seen, left = {aim(run)} if aim is a_checkpoint else set(), rng.randrange(4) if within < 0.1 else 0
    while child.poll() is None:
        occasion = aim(run)
        if occasion is not None and occasion not in seen:
            seen.add(occasion)
            left -= 1
            if left < 0:
                time.sleep(rng.uniform(0, within))
                child.kill()
                return child.wait() == -signal.SIGKILL
        time.sleep(0.0002)
    return False


def place(run: Path, pid: int, said: str) -> str:
    """Where a process was killed, by the files that it left."""
    if any(f".{pid}-" in name for name in unfinished(run)):
        return WRITING
    if "[1/2] stage1" not in said:
        return STARTING
    if half_made(run):
        return PICTURE
    stage = run / ("stage2" if logged(run / "stage2") else "stage1")
    if stage.name == "stage1" and steps_of(stage)[-1:] == [LONG["stage1.steps"]]:
        return BETWEEN
    return STEP if logged(stage) > max(steps_of(stage), default=0) else ELSEWHERE


def kill_and_restart(
    start: Callable[[Path], Any],
    run: Path,
    whole: Path,
    rng: random.Random,
    kills: int = 18,
    wanted: collections.Counter[str] = WANTED,
) -> collections.Counter[str]:
    """Kill processes of a run until `kills` have died, so many where `wanted`, then let one come to its end.

    Returns the places. A run that ends before is compared with the undisturbed one too, and begun anew.
    """
    places: collections.Counter[str] = collections.Counter()
    for life in range(5 * kills):
        said = run.with_name(f"{run.name}-{life}.txt")
        child, missing = start(said), wanted - places
        aim, within = AIMS[rng.choices(list(missing), list(missing.values()))[0] if missing else ELSEWHERE]
        if (missing or places.total() < kills) and kill(child, run, aim, within, rng):
            places[place(run, child.pid, said.read_text())] += 1
            continue
        assert child.wait() == 0, said.read_text()
        assert_undisturbed(run, whole)
        if not missing and places.total() >= kills:
            return places
        shutil.rmtree(run)
    raise AssertionError(f"{places} after {5 * kills} lives")


@pytest.mark.timeout(500)
def test_training_killed_fifty_times(forks: Forks, tmp_path: Path) -> None:
    """Weights, averages, optimiser, heads and log lines are bit for bit those of a run that nobody disturbed."""
    rng, places = random.Random(1), collections.Counter[str]()
    for name, dotted in RUNS.items():
        whole, run = tmp_path / f"{name}, whole", tmp_path / name
        assert forks.start(train(whole, dotted), tmp_path / "whole.txt").wait() == 0
        wanted = WANTED | collections.Counter({PICTURE: 3} if "train.preview_every" in dotted else {})
        places += kill_and_restart(functools.partial(forks.start, train(run, dotted)), run, whole, rng, 18, wanted)
    print(dict(places))
    assert places.total() >= 50 and places[WRITING] >= 15


def assert_undisturbed(run: Path, whole: Path) -> None:
    toy.assert_same_run(run, whole)
    for stage, steps in (("stage1", LONG["stage1.steps"]), ("stage2", LONG["train.steps"])):
        assert [line["step"] for line in toy.log(run, stage)] == list(range(1, steps + 1))  # none doubled, none missing
        assert steps_of(run / stage) == steps_of(whole / stage)
        assert toy.tree(run / stage / "previews") == toy.tree(whole / stage / "previews")
    assert [path.name for path in run.rglob(".*")] == [".lock"]
    reports = [json.loads((path / "run.json").read_text()) for path in (run, whole)]
    for report in reports:
        del report["total_seconds"]
        assert all(stage.pop("seconds") > 0 for stage in report["stages"])
    assert reports[0] == reports[1]


@pytest.mark.timeout(200)
def test_fresh_interpreters_killed(forks: Forks, tmp_path: Path) -> None:
    """The same of `python -m selftrans`, which a person types: no fork, nothing imported before."""

    def start(said: Path) -> subprocess.Popen:
        with said.open("w") as file:
            return subprocess.Popen([sys.executable, "-u", "-m", "selftrans", *argv], stdout=file, stderr=file)

    whole, run = tmp_path / "whole", tmp_path / "run"
    assert forks.start(train(whole, {}), tmp_path / "whole.txt").wait() == 0
    argv = train(run, {})
    assert kill_and_restart(start, run, whole, random.Random(3), 3, collections.Counter({WRITING: 1})).total() == 3


# ---- preparing and sampling


def kill_while_writing(
    forks: Forks, argv: list[str], out: Path, unfinished: str, kills: int, rng: random.Random
) -> tuple[int, int]:
    """Kill a command `kills` times while it fills the folder `out`, then let it end; kills, and how many left a temporary."""
    said, deaths, torn = out.with_name("said.txt"), 0, 0
    while deaths < kills:
        child, before = forks.start(argv, said), set(os.listdir(out)) if out.exists() else set()
        wanted = rng.randrange(1, 8)  # new files before the kill
        while child.poll() is None:
            if out.exists() and len(set(os.listdir(out)) - before) >= wanted:
                time.sleep(rng.uniform(0, 0.004))
                child.kill()
                break
            time.sleep(0.0002)
        assert child.wait() == -signal.SIGKILL, f"it ended after {deaths} deaths: {said.read_text()}"
        deaths += 1
        torn += any(out.glob(unfinished))
    assert forks.start(argv, said).wait() == 0, said.read_text()
    return deaths, torn


@pytest.mark.timeout(100)
def test_prepare_killed(forks: Forks, tmp_path: Path) -> None:
    pictures = class_folders(tmp_path / "pictures", 120)
    argv = ["prepare", str(pictures), "--shard-size=2", "--batch-size=2", "--out"]
    assert forks.start([*argv, str(tmp_path / "whole")], tmp_path / "said.txt").wait() == 0
    out = tmp_path / "out"
    deaths, torn = kill_while_writing(forks, [*argv, str(out)], out, ".tmp-*", 10, random.Random(4))
    assert deaths == 10 and torn >= 2
    assert toy.tree(out) == toy.tree(tmp_path / "whole")


@pytest.mark.timeout(100)
def test_sample_killed(forks: Forks, tmp_path: Path) -> None:
    assert forks.start(train(tmp_path / "run", {}), tmp_path / "said.txt").wait() == 0
    argv = ["sample", str(tmp_path / "run"), "--num=90", "--steps=2", "--batch-size=3", "--out"]
    assert forks.start([*argv, str(tmp_path / "whole")], tmp_path / "said.txt").wait() == 0
    out = tmp_path / "out"
    deaths, _ = kill_while_writing(forks, [*argv, str(out)], out, ".*.tmp", 10, random.Random(5))
    assert deaths == 10
    assert toy.tree(out) == toy.tree(tmp_path / "whole")
