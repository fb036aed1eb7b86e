"""What a training process sets for itself, how long processes wait for each other, and how they end when one is gone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from datetime import timedelta

from accelerate.utils import InitProcessGroupKwargs

from selftrans.config import Train

#: how gloo, NCCL and torch's store speak of a process that they wait for in vain
GONE = re.compile(
    r"gloo|nccl|tcpstore|connection (was )?(closed|reset|refused)|broken pipe|timed out|timeout", re.IGNORECASE
)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  #: of glibc's malloc.h


def keep_memory() -> bool:
    """Let this process keep the memory that a step frees, for the next step; for training on a CPU.

    As it is, glibc gives large blocks back to the system and gets them anew, page by page: a tenth of a step of SiT-S/2.
    True where it has been done (glibc), False elsewhere, where nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    # 32 MiB is the most that is allowed: larger blocks still come from the system, one by one
    return bool(mallopt(M_MMAP_THRESHOLD, 32 << 20) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def patience(config: Train) -> InitProcessGroupKwargs:
    """A finite time to wait for other processes. ValueError where they were launched in a way that would not work."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ValueError(
            "accelerate is configured to use FSDP by itself; take that out of its options or configuration file, and say "
            "--train.shard True"
        )
    return InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Where a process fails because it waits for another in vain: ConnectionError, in one line."""
    try:
        yield
    except RuntimeError as error:
        rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        if world == 1 or not GONE.search(str(error)):
            raise
        raise ConnectionError(
            f"process {rank} of {world} ends, because another one is gone or did not "
            f"answer in time ({str(error).splitlines()[0][:200]}); the same command continues from the last checkpoint"
        ) from error
