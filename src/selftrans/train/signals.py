"""Stopping well: a notice (SIGTERM, SIGUSR1, Ctrl-C) becomes a checkpoint and an exit code that says "resume me"."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from selftrans.storage import no_link
from selftrans.train.interrupted import Interrupted


class Stop:
    """Remembers a signal until the step is done. Use as a context manager around training."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._heard: tuple[torch.Tensor, Any] | None = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.received = number

    def asked(self, accelerator: Accelerator) -> bool:
        """True in every process, at the same step, as soon as one of them has been notified.

        On GPUs the answer is that of the call before: its exchange is over by now, and the host waits for no kernel.
        """
        if accelerator.num_processes == 1:
            return self.received is not None
        flag = torch.full((), float(self.received is not None), device=accelerator.device)
        flag = accelerator.reduce(flag, reduction="sum")
        if flag.device.type != "cuda":
            return bool(flag > 0)
        heard, done = torch.empty((), pin_memory=True), torch.cuda.Event()
        heard.copy_(flag, non_blocking=True)
        done.record()
        before, self._heard = self._heard, (heard, done)
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0] > 0)

    def interrupted(self, step: int, room: Path) -> Interrupted:
        name = signal.Signals(self.received).name if self.received else "another process"
        return Interrupted(
            f"stopped by {name} at step {step}; checkpoint written in {room}; the same command continues"
        )


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """Keep a second process out of a run directory. ValueError when it is taken; a dead process leaves no lock behind."""
    run.mkdir(parents=True, exist_ok=True)
    try:
        lock_file = open(run / ".lock", "a+", opener=no_link)  # noqa: SIM115 - held for the whole block below
    except OSError as error:
        raise ValueError(
            f"{run / '.lock'} cannot be opened ({error.strerror}); remove it, or choose another --out"
        ) from error
    with lock_file as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ValueError(
                f"{run} is in use by process {file.read().strip() or '?'}; wait for it, or choose another --out"
            ) from error
        except OSError as error:  # a file system without locks
            warnings.warn(
                f"{run} cannot be locked ({error.strerror}): see to it that no second process uses it", stacklevel=2
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
