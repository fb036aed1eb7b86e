"""Stop signals: SIGTERM, SIGUSR1, Ctrl-C or a closed terminal ends a run after a checkpoint, with status 75: run it again."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator

from selftrans.train.interrupted import SAME, Interrupted, handle


class StopSignal:
    """Records a stop signal until the current step is done. Use as a context manager around training."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: int | None = None
        self._first = 0.0  #: time of the first signal, in seconds of `time.monotonic`
        self._before: dict[int, Any] = {}
        self._pending: tuple[torch.Tensor, Any] | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = handle(self._receive, self.SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.received is None:
            self._first = now
        elif number == signal.SIGINT and now - self._first > SAME:
            raise KeyboardInterrupt  # a second Ctrl-C stops at once
        self.received = number

    def asked(self, accelerator: Accelerator) -> bool:
        """True in every process, at the same step, as soon as one of them has received a signal.

        On GPUs the answer is that of the previous call, whose reduction has finished, so the host does not wait.
        """
        if accelerator.num_processes == 1:
            return self.received is not None
        flag = torch.full((), float(self.received is not None), device=accelerator.device)
        flag = accelerator.reduce(flag, reduction="sum")
        if flag.device.type != "cuda":
            return bool(flag > 0)
        received, done = torch.empty((), pin_memory=True), torch.cuda.Event()
        received.copy_(flag, non_blocking=True)
        done.record()
        before, self._pending = self._pending, (received, done)
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0] > 0)

    def interrupted(self, step: int, folder: Path) -> Interrupted:
        """The exception that ends a run whose checkpoint of `step` is written in `folder`."""
        name = signal.Signals(self.received).name if self.received else "another process"
        return Interrupted(
            f"stopped by {name} at step {step}; checkpoint written in {folder}; the same command continues"
        )
