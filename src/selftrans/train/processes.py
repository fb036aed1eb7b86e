"""Memory of a training process, the timeout between processes, and the error when another process has ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from selftrans.config import Train

#: messages of gloo, NCCL and torch's store about a process that does not answer
GONE = re.compile(
    r"gloo|nccl|tcpstore|connection (was )?(closed|reset|refused)|broken pipe|timed out|timeout", re.IGNORECASE
)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  #: of glibc's malloc.h


def keep_memory() -> bool:
    """Let this process keep the memory that a step frees, for the next step; for training on a CPU.

    By default glibc returns large blocks to the system and requests them again page by page: a tenth of a step of SiT-S/2.
    Returns True with glibc; False elsewhere, where nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    # 32 MiB is the maximum: larger blocks still come from the system
    return bool(mallopt(M_MMAP_THRESHOLD, 32 << 20) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def free_prepared(accelerator: Accelerator) -> None:
    """Free the memory of all that the accelerator has prepared, and of the device; for the next stage.

    accelerate's `free_memory` runs the garbage collector before it forgets its models. A prepared model refers to itself, so
    weights, and gradients that lie in the memory of a graph, would stay until Python collects garbage by itself.
    """
    accelerator._models.clear()
    accelerator._optimizers.clear()
    accelerator.free_memory()


def process_group_options(config: Train) -> InitProcessGroupKwargs:
    """The time that a process waits for the others. ValueError where accelerate would wrap the model in its own FSDP."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ValueError(
            "accelerate is configured to use FSDP; remove that from its options or configuration file, and set "
            "--train.shard True"
        )
    return InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout))


@contextlib.contextmanager
def reporting_lost_processes() -> Iterator[None]:
    """Turn an error of waiting for another process into a ConnectionError of one line."""
    try:
        yield
    except RuntimeError as error:
        rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        if world == 1 or not GONE.search(str(error)):
            raise
        raise ConnectionError(
            f"process {rank} of {world} ends, because another one has ended or did not "
            f"answer in time ({str(error).splitlines()[0][:200]}); the same command continues from the last checkpoint"
        ) from error
