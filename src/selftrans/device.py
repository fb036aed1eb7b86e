"""The default device of a process, and its CPU cores."""

from __future__ import annotations

import os

import torch


def default_device() -> torch.device:
    """The GPU of this process (by LOCAL_RANK, as accelerate and torchrun set it), or the CPU when torch finds no GPU."""
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


def cpu_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
