"""Timestamps, peak speed, and a description of the machine."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selftrans.device import cpu_cores, load_average

#: sizes of square matrix products; the fastest one defines the machine's peak
SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192, 16384)}


@dataclass(frozen=True)
class Clock:
    """Timestamps. On a GPU they are CUDA events, which are read later, so that taking one does not synchronise."""

    device: torch.device

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two timestamps; on a GPU call `wait` first."""
        return end - start if self.device.type != "cuda" else start.elapsed_time(end) / 1e3


class Peak:
    """Measures the peak speed of the machine with square matrix products in the dtype of the training step."""

    def __init__(self, clock: Clock, dtype: torch.dtype) -> None:
        self.clock = clock
        longest = SIDES[clock.device.type][-1]
        self.a, self.b = torch.randn(2, longest, longest, device=clock.device).to(dtype)

    def measure(self) -> dict[int, float]:
        """Side -> seconds of one product."""
        return {side: self._once(side) for side in SIDES[self.clock.device.type]}

    def _once(self, side: int) -> float:
        a, b = (x.flatten()[: side * side].view(side, side) for x in (self.a, self.b))
        repeats = max(1, (SIDES[self.clock.device.type][-1] // side) ** 2 // 2)
        start = self.clock.now()
        for _ in range(repeats):
            a @ b
        end = self.clock.now()
        self.clock.wait()
        return self.clock.seconds(start, end) / repeats


def describe(device: torch.device, precision: str) -> dict[str, Any]:
    """The machine and the software, for bench.json."""
    return {
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": cpu_name(),
        "cores": cpu_cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": precision,
        "load_before": load_average(),
    }


def cpu_name() -> str:
    """Name of the CPU, as the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
