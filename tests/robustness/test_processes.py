"""Runs of several processes when one is asked to stop, freezes or is killed: the others end in finite time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from selftrans.checkpoints import format as checkpoint
from selftrans.cli.main import main
from selftrans.train.run import train
from tests.support import toy
from tests.support.processes import Forked, Rank, alive, children, free_port, ranks, torchrun, until
from tests.support.toy import quick  # noqa: F401 - a fixture

VANILLA = {"method": "vanilla", "train.steps": 100_000, "train.checkpoint_every": 5, "log.every": 1}


def argv(out: Path, dotted: dict[str, object] | None = None) -> list[str]:
    return ["train", "digits", f"--data={toy.digits()}", f"--out={out}", *toy.flags(VANILLA | (dotted or {}))]


def reached(out: Path, stage: str = "vanilla") -> int:
    """Step of the newest valid checkpoint, 0 without one."""
    found = checkpoint.newest(out / stage / "checkpoints") if (out / stage).exists() else None
    return found.step if found else 0


@pytest.mark.slow
def test_signal_freeze_and_kill_without_a_launcher(tmp_path):
    """Under `srun` or started by hand, no launcher ends the other processes."""
    out = tmp_path / "run"
    with ranks(argv(out), tmp_path / "signal") as pair:
        until(lambda: reached(out) >= 5, pair[0])
        pair[1].send_signal(signal.SIGUSR1)
        assert [process.ends() for process in pair] == [75, 75]
    first = reached(out)
    assert "stopped by SIGUSR1 at step" in pair[1].lines()[-1]
    assert f"stopped by another process at step {first}" in pair[0].lines()[-1]

    with ranks(argv(out, {"train.timeout": 15}), tmp_path / "freeze") as pair:
        until(lambda: reached(out) >= first + 5, pair[0])
        pair[1].send_signal(signal.SIGSTOP)
        started = time.monotonic()
        assert pair[0].ends() == 1
        assert time.monotonic() - started > 10, "it ended before the timeout"
    assert "process 0 of 2 ends, because another one has ended or did not answer in time" in pair[0].lines()[-1]
    second = reached(out)

    with ranks(argv(out), tmp_path / "kill") as pair:
        until(lambda: reached(out) >= second + 5, pair[0])
        pair[0].kill()  # rank 0 holds the store through which the processes communicate
        assert pair[1].ends() == 1
    assert "process 1 of 2 ends, because another one has ended" in pair[1].lines()[-1]
    assert "Traceback" not in pair[1].output.read_text()

    last = reached(out)
    train(toy.toy(VANILLA | {"train.steps": last + 2}), out, quiet=True)
    assert reached(out) == last + 2 and last > second > first
    assert [line["step"] for line in toy.log(out, "vanilla")] == list(range(1, last + 3))


@pytest.mark.slow
def test_torchrun_ends_after_a_kill_and_the_same_command_continues(tmp_path):
    out = tmp_path / "run"
    with torchrun(argv(out), tmp_path / "killed.txt") as launcher:
        until(lambda: reached(out) >= 5, launcher)
        workers = children(launcher.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        assert launcher.ends() == 1
        assert not [pid for pid in workers if alive(pid)]
    first = reached(out)
    with torchrun(argv(out), tmp_path / "again.txt") as launcher:
        until(lambda: reached(out) >= first + 5, launcher)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.ends() == 1  # torchrun's own status: it forwards the signal but not the 75
    assert len([line for line in launcher.lines() if "stopped by SIGTERM at step" in line]) == 2
    assert reached(out) > first + 5


@pytest.mark.slow
def test_wait_for_a_missing_process_ends_after_the_timeout(tmp_path):
    command = argv(tmp_path / "run", {"train.timeout": 3})
    alone = Forked(["selftrans", *command], tmp_path / "output.txt", rank=0, world=2, port=free_port())
    try:
        assert alone.ends() == 1
    finally:
        alone.group(signal.SIGKILL)
        alone.wait()
    assert "process 0 of 2 ends, because another one has ended or did not answer in time" in alone.lines()[-1]
    assert "Traceback" not in alone.output.read_text() and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sampling_by_two_processes_writes_the_same_bytes(tmp_path):
    """12 images make full batches with one and with two processes, so that all matrix products have the same shape.

    The two are fresh interpreters, as under `srun`; those of the other tests are forked from one that has imported torch.
    """
    command = ["sample", str(toy.finished()), "--steps=3", "--batch-size=3"]
    assert main([*command, "--num=12", f"--out={tmp_path / 'alone'}"]) == 0
    with ranks([*command, "--num=12", f"--out={tmp_path / 'shared'}"], tmp_path / "output", kind=Rank) as pair:
        assert [process.ends() for process in pair] == [0, 0]
    alone, shared = (toy.tree(tmp_path / name) for name in ("alone", "shared"))
    assert len(alone) == 14 and shared == alone
    assert sum("img" in process.output.read_text() for process in pair) == 1, "one progress bar for both"


def test_timeout_is_finite_and_a_setting(tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "run")
    assert main(["train", "digits", "--out", out, *toy.flags(), "--train.timeout=0"]) == 1
    assert "train.timeout must be above zero, not 0" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["train", "digits", "--out", out, *toy.flags()]) == 1
    assert "set --train.shard True" in capsys.readouterr().err
