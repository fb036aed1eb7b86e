"""How the workers of a comparison end: after a stop signal to their parent process, after an error, and with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection

from selftrans.messages import plural
from selftrans.train.interrupted import SAME
from selftrans.train.signals import StopSignal

OF_TERMINAL = {signal.SIGINT, signal.SIGHUP}  #: signals that a terminal sends to all processes of a command
GRACE = 600  #: seconds after which a worker that was asked to end is killed; a large checkpoint is written in less


class Stopped(KeyboardInterrupt):
    """The comparison was asked to stop, and its workers have ended; the text says how to continue."""


class StopRequest(StopSignal):
    """Stop signals to a process with workers: the first asks for an orderly end, the second for one at once, and those after
    it act as they did before. Use as a context manager; outside of the main thread it receives none."""

    def __init__(self) -> None:
        super().__init__()
        self.at_once = False

    def _receive(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._first = number, now
        elif now - self._first > SAME:
            self.at_once = True
            self.__exit__()

    def check(self) -> None:
        """Raises `Stopped` if a signal was received."""
        if self.received is not None:
            raise self.stopped(0)

    def stopped(self, killed: int) -> Stopped:
        """The exception of a comparison whose workers have ended, this many of them by force."""
        how = "runs in training wrote a checkpoint"
        if self.at_once:
            how = "a second signal ended the workers at once, and runs go on from their last checkpoint"
        elif killed:
            how = f"{plural(killed, 'worker')} killed that did not end within {GRACE} s: runs go on from their last checkpoint"
        name = signal.Signals(self.received or signal.SIGINT).name
        return Stopped(f"stopped by {name}; {how}; the same command continues")


def end_workers(pool: ProcessPoolExecutor, stop: StopRequest, meanwhile: Callable[[], object]) -> int:
    """Ask all workers to end, and wait until they have; no other job starts. Returns how many had to be killed.

    They are sent SIGTERM: a run in training writes a checkpoint after its step, a measurement is given up, and an idle worker
    ends. It is sent again and again: the first one only ends the training, and the worker may then wait for a lock that a
    killed one held. Those that are left after GRACE seconds, or when a further signal is received, are killed. `meanwhile`
    is called all the time: it reads what the workers report, without which they would wait, and not end.
    """
    workers, killed = list((pool._processes or {}).values()), set[int | None]()  # `shutdown` forgets them

    def until_ended() -> None:
        last = time.monotonic() + GRACE
        while alive := [worker for worker in workers if worker.is_alive()]:
            meanwhile()
            for worker in alive:
                if stop.at_once or time.monotonic() >= last:
                    killed.add(worker.pid)
                    worker.kill()
                else:
                    worker.terminate()
            connection.wait([worker.sentinel for worker in alive], timeout=0.5)

    ending = threading.Thread(target=until_ended, daemon=True)
    ending.start()
    pool.shutdown(cancel_futures=True)
    ending.join()
    return len(killed)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Around the start of a worker, which inherits it: signals of the terminal wait, in the worker until `ignore_interrupts`.
    Without it, Ctrl-C would end a worker that is still importing with a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OF_TERMINAL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_interrupts() -> None:
    """In a new worker: ignore Ctrl-C and the end of the terminal, which are sent to it, too; its parent ends it. Training
    installs its own handler of SIGINT."""
    for number in OF_TERMINAL:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_TERMINAL)


def end_with_parent() -> None:
    """End this worker when its parent is killed: otherwise it would go on training. Runs can be continued after any end."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
