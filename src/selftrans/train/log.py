"""Logging of a run: log.jsonl with one json object per line, running means."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from selftrans.storage import atomic_write


class RunningMeans:
    """Means of the reported values since the last line, summed on the device: the host waits only when they are read."""

    def __init__(self) -> None:
        #: sum and count, float64: tensors, or numbers that the host has read
        self._sums: dict[str, tuple[Any, Any]] = {}

    def add(self, report: dict[str, Tensor], finite: Tensor | None = None) -> None:
        """Add the 0-d values of one step, unless `finite`, a 0-d boolean on their device, is false."""
        for name, value in report.items():
            value = value.detach().double() if value.device.type != "mps" else value.detach().float()
            one = torch.ones_like(value)
            if finite is not None:
                value, one = (torch.where(finite, x, 0) for x in (value, one))
            total, count = self._sums.get(name, (0, 0))
            self._sums[name] = total + value, count + one

    def add_numbers(self, report: dict[str, float], finite: bool) -> None:
        """Add values that the host has read; from now on the sums are numbers on the host. Waits for the device once."""
        for name, value in report.items():
            total, count = (float(x) for x in self._sums.get(name, (0.0, 0.0)))
            self._sums[name] = (total + value, count + 1.0) if finite else (total, count)

    def means(self) -> dict[str, Tensor]:
        """By name, 0-d; NaN where no step counted."""
        return {name: total / count for name, (total, count) in self._tensors().items()}

    def clear(self) -> None:
        self._sums = {}

    def _tensors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums and counts, as tensors also where they are kept as numbers."""
        return {
            name: (torch.as_tensor(total, dtype=torch.float64), torch.as_tensor(count, dtype=torch.float64))
            if isinstance(total, float)
            else (total, count)
            for name, (total, count) in self._sums.items()
        }

    def state(self, accelerator: Accelerator | None = None) -> dict[str, Any]:
        """Sums and counts for a checkpoint. With several processes, which must all call it, their mean over the processes."""
        sums = self._tensors()
        if accelerator is not None:
            sums = accelerator.reduce(sums, reduction="mean")
        return {name: [total.item(), count.item()] for name, (total, count) in sums.items()}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        kind = torch.float64 if device.type != "mps" else torch.float32
        self._sums = {
            name: (torch.tensor(total, dtype=kind, device=device), torch.tensor(count, dtype=kind, device=device))
            for name, (total, count) in state.items()
        }


class JsonlLog:
    """log.jsonl: one line per report. After a resume it holds exactly the lines up to the resumed step.

    Raises ValueError where the file cannot be written at the start. Later a full disk only causes a warning: see `write`.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        with atomic_write(path) as file:
            file.write("".join(line + "\n" for line in lines if _step(line) <= resume_step).encode())
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - kept open for the run
        self._pending = b""

    def write(self, line: dict[str, Any]) -> None:
        """Append a line. On a full disk it is kept in memory and written later."""
        self._pending += json.dumps(line).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Write the pending lines; on a full disk as many bytes as fit, with a warning."""
        try:
            while self._pending:  # unbuffered, so that the number of bytes written is known
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            warnings.warn(f"{len(self._pending)} bytes of log.jsonl are not on the disk yet: {error}", stacklevel=2)

    def sync(self) -> None:
        """Write the pending lines and wait until they are on the disk, so that a checkpoint never has steps without lines."""
        self.flush()
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()


def _step(line: str) -> float:
    """Step of a line; infinite for a damaged line, such as the last one of a killed process, so that it is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")


def read_log(path: Path) -> list[dict[str, Any]]:
    """All lines of a log.jsonl; [] where the file does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def format_values(values: dict[str, float]) -> dict[str, str]:
    """Values as the progress bar shows them, to three significant figures."""
    return {name: f"{value:.3g}" for name, value in values.items()}
