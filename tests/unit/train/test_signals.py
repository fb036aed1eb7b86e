"""Stop signals: a checkpoint within one step, and exit status 75, after which the same command continues."""

import itertools
import os
import signal
import time

import pytest

from selftrans.cli.main import main
from selftrans.methods.objective import Objective
from selftrans.train.interrupted import EXIT_RESUME, SAME
from selftrans.train.run import train
from selftrans.train.signals import StopSignal
from tests.support import toy
from tests.support.processes import LONGEST, start, wait_for_lines
from tests.support.toy import quick  # noqa: F401 - a fixture


@pytest.fixture(autouse=True)
def hang_up():
    """The default handling of SIGHUP, whatever started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_stop_signal_writes_a_checkpoint_within_one_step(tmp_path, monkeypatch, capsys, number):
    expected, handlers = toy.finished(), {n: signal.getsignal(n) for n in StopSignal.SIGNALS}
    forward, calls = Objective.forward, itertools.count(1)

    def signalled(self, batch, step):
        if next(calls) == 5:  # in the middle of step 3: two micro-batches a step
            os.kill(os.getpid(), number)
        return forward(self, batch, step)

    monkeypatch.setattr(Objective, "forward", signalled)
    argv = ["train", "digits", f"--data={toy.digits()}", f"--out={tmp_path}", *toy.flags()]
    assert main(argv) == EXIT_RESUME == 75
    output = capsys.readouterr().err.splitlines()[-1]
    assert output.startswith(f"selftrans: stopped by {signal.Signals(number).name} at step 3; checkpoint written in")
    assert toy.checkpoint(tmp_path, "stage1").name == "step-00000003"
    assert {n: signal.getsignal(n) for n in StopSignal.SIGNALS} == handlers
    assert main(argv) == 0
    assert "[1/2] stage1: continues at step 3 of 4" in capsys.readouterr().out
    toy.assert_same_run(tmp_path, expected)


def test_second_ctrl_c_stops_at_once(tmp_path, monkeypatch, capsys):
    data = toy.digits()

    def interrupted_twice(self, batch, step):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(SAME + 0.05)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Objective, "forward", interrupted_twice)
    assert main(["train", "digits", f"--data={data}", f"--out={tmp_path}", *toy.flags()]) == 130
    assert capsys.readouterr().err.endswith("selftrans: interrupted; the same command continues\n")


def test_signal_that_timeout_sends_twice_counts_once():
    with StopSignal() as stop:
        for _ in range(2):  # `timeout --signal INT`: to its command, and to the group of processes
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        time.sleep(SAME + 0.05)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_run_goes_on_after_its_terminal_where_nohup_says_so():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


LONG = {"method": "vanilla", "log.every": 1, "train.checkpoint_every": 2, "stage1.steps": 1}


def test_process_stops_on_signal_and_holds_its_lock(tmp_path, capsys):
    run, long = tmp_path / "run", LONG | {"train.steps": 1_000_000, "train.checkpoint_every": 1_000_000}
    argv = ["train", "digits", f"--data={toy.digits()}", f"--out={run}", *toy.flags(long)]
    process = start(argv)
    log = run / "vanilla" / "log.jsonl"
    wait_for_lines(process, log, 3)
    assert main(argv) == 1  # while the other process runs
    output = capsys.readouterr().err
    line = f"selftrans: {run} is in use by process {process.pid}; wait for it, or choose another --out"
    assert output.splitlines()[-1] == line
    before = log.read_bytes().count(b"\n")
    process.send_signal(signal.SIGTERM)
    _, output = process.communicate(timeout=LONGEST)
    assert process.returncode == 75
    reached = int(toy.checkpoint(run, "vanilla").name[5:])
    assert f"stopped by SIGTERM at step {reached}; checkpoint written in {run / 'vanilla'}" in output
    assert before <= reached == log.read_bytes().count(b"\n") < 1_000_000
    short = LONG | {"train.steps": reached + 2}
    for out in (run, tmp_path / "uninterrupted"):
        train(toy.toy(short), out, quiet=True)
    toy.assert_same_run(run, tmp_path / "uninterrupted", ("vanilla",))
