"""What a run says: a progress bar on the screen, one json line per report on disk, TensorBoard beside it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from selftrans.storage import atomic_write


class Window:
    """Means of the reported values since the last line, summed on the device: read only when a line is written."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}  #: sum and count, float64

    def add(self, report: dict[str, Tensor], sound: Tensor | None = None) -> None:
        """Take in the values of one step, unless `sound`, a 0-d boolean on their device, says that it does not count."""
        for name, value in report.items():
            value = value.detach().double() if value.device.type != "mps" else value.detach().float()
            one = torch.ones_like(value)
            if sound is not None:
                value, one = (torch.where(sound, x, 0) for x in (value, one))
            total, count = self._sums.get(name, (0, 0))
            self._sums[name] = total + value, count + one

    def means(self) -> dict[str, Tensor]:
        """By name, 0-d; NaN where nothing counted."""
        return {name: total / count for name, (total, count) in self._sums.items()}

    def clear(self) -> None:
        self._sums = {}

    def state(self, accelerator: Accelerator | None = None) -> dict[str, Any]:
        """What a checkpoint keeps: with several processes, which must all call it, the mean over them."""
        sums = self._sums if accelerator is None else accelerator.reduce(self._sums, reduction="mean")
        return {name: [total.item(), count.item()] for name, (total, count) in sums.items()}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        kind = torch.float64 if device.type != "mps" else torch.float32
        self._sums = {
            name: (torch.tensor(total, dtype=kind, device=device), torch.tensor(count, dtype=kind, device=device))
            for name, (total, count) in state.items()
        }


class Journal:
    """log.jsonl: one line per report. After a resume it holds exactly the lines up to the resumed step."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        with atomic_write(path) as file:
            file.write("".join(line + "\n" for line in lines if _step(line) <= resume_step).encode())
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - kept open for the run
        self._waiting = b""

    def write(self, line: dict[str, Any]) -> None:
        """Append a line. What a full disk does not take is kept, and written later."""
        self._waiting += json.dumps(line).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Write what waits, if the disk takes it."""
        try:
            while self._waiting:  # unbuffered, so that what was written is known to the byte
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            warnings.warn(f"{len(self._waiting)} bytes of log.jsonl wait for room: {error}", stacklevel=2)

    def sync(self) -> None:
        """Write what waits, and wait until the disk holds it: a checkpoint counts on the lines before it."""
        self.flush()
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()


def _step(line: str) -> float:
    """Step of a line; infinite for a line that a killed process left half written, so that it is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All lines of a log.jsonl; [] where there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class _Lines:
    """Where no terminal is: each state of a bar becomes a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(**options: Any) -> Any:
    """A tqdm bar: live on a terminal, one line every 15 seconds elsewhere."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(dynamic_ncols=True, mininterval=0.2, **options)
    return tqdm(file=_Lines(), ncols=0, mininterval=15, **options)


def short(values: dict[str, float]) -> dict[str, str]:
    """Values as the bar shows them."""
    return {name: f"{value:.3g}" for name, value in values.items()}
