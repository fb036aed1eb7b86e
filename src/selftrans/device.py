"""The default device of a process, its memory, CPU cores and how busy they are, and the number of processes."""

from __future__ import annotations

import os

import torch


def default_device() -> torch.device:
    """The GPU of this process (by LOCAL_RANK, as accelerate and torchrun set it), or the CPU when torch finds no GPU.

    A process that sees fewer GPUs than its machine runs processes, as where Slurm binds one to each, takes one that it sees.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def cpu_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def world_size() -> int:
    """How many processes share the work of a command, as their launcher says (WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", 1))


def load_average() -> float | None:
    """Mean number of runnable processes over the last minute, this one included; None where the system does not tell it."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def memory_total(device: torch.device) -> int | None:
    """Bytes of memory of a GPU, or of the machine where that can be asked."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
