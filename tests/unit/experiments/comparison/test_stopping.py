"""Stop signals to the parent of workers, and how these end: with cheap forked workers; runs in training: see test_compare."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from selftrans.experiments.comparison import stopping
from selftrans.experiments.comparison.stopping import (
    Stopped,
    StopRequest,
    end_workers,
    ignore_interrupts,
    interrupts_held,
)
from tests.support.processes import LONGEST


@pytest.fixture(autouse=True)
def hang_up():
    """The default handling of SIGHUP, whatever started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def handlers() -> list:
    return [signal.getsignal(number) for number in stopping.StopSignal.SIGNALS]


@pytest.mark.parametrize("number", stopping.StopSignal.SIGNALS)
def test_first_signal_asks_to_stop_and_the_second_at_once(number, monkeypatch):
    before = handlers()
    with StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # as `timeout` sends them
        with pytest.raises(Stopped, match=f"^stopped by {number.name}; .* the same command continues$"):
            stop.check()
        assert not stop.at_once
        monkeypatch.setattr(stopping, "SAME", 0.0)
        os.kill(os.getpid(), number)
        assert stop.at_once and handlers() == before, "a third signal acts as it would without this"
        assert "at once" in str(stop.stopped(1))
    assert handlers() == before


def test_line_names_the_time_after_which_workers_were_killed():
    stop = StopRequest()
    stop.received = signal.SIGTERM
    assert "1 worker killed that did not end within 600 s" in str(stop.stopped(1))
    assert "killed" not in str(stop.stopped(0)) and "wrote a checkpoint" in str(stop.stopped(0))


def orderly(folder: Path) -> None:
    """In a worker: end only some time after SIGTERM, as a run does that writes a checkpoint."""

    def receive(number: int, frame: object) -> None:
        time.sleep(0.2)
        (folder / "ended").touch()
        os._exit(0)

    signal.signal(signal.SIGTERM, receive)
    busy(folder)


def stuck(folder: Path) -> None:
    """In a worker: never end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    busy(folder)


def busy(folder: Path) -> None:
    (folder / "works").touch()
    time.sleep(LONGEST)


def until_it_works(folder: Path) -> None:
    end = time.monotonic() + LONGEST
    while not (folder / "works").exists():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(("work", "killed"), [(orderly, 0), (stuck, 1)])
def test_workers_are_asked_to_end_and_killed_when_they_do_not(work, killed, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "GRACE", 0.3 if killed else LONGEST)
    calls: list[int] = []
    with StopRequest() as stop, ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        pool.submit(work, tmp_path)
        until_it_works(tmp_path)
        assert end_workers(pool, stop, lambda: calls.append(1)) == killed
    assert (tmp_path / "ended").exists() == (not killed) and calls


def test_workers_end_at_once_after_a_second_signal(tmp_path):
    with StopRequest() as stop, ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        pool.submit(stuck, tmp_path)
        until_it_works(tmp_path)

        def impatient() -> None:
            stop.at_once = True

        started = time.monotonic()
        assert end_workers(pool, stop, impatient) == 1
        assert time.monotonic() - started < stopping.GRACE / 2


def interrupt(number: int) -> str:
    os.kill(os.getpid(), number)
    return "lives"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signal_of_the_terminal_does_not_end_a_worker_by_itself(number):
    """Ctrl-C in a terminal, and its end, reach all processes; the parent decides."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), initializer=ignore_interrupts) as pool:
        with interrupts_held():
            held = pool.submit(interrupt, number)
            assert number in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert held.result(timeout=LONGEST) == "lives"
