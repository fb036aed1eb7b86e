"""The processes of a run: accelerate's engine, memory settings, and the error when another process has ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, gather_object
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from selftrans.config import RunConfig, Train

#: messages of gloo, NCCL and torch's store about a process that does not answer
GONE = re.compile(
    r"gloo|nccl|tcpstore|connection (was )?(closed|reset|refused)|broken pipe|timed out|timeout", re.IGNORECASE
)

#: variables by which `accelerate launch` chooses an engine that would wrap the model itself -> its name
ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
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


def distributed(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A module whose gradients are averaged over the processes of the run (DDP); of a single process the module itself."""
    if accelerator.num_processes == 1:
        return module
    # gradients lie in the buckets that DDP sends, which would take as much memory again
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


def accelerator_of(config: RunConfig, out: Path) -> Accelerator:
    """accelerate's engine at this precision. ValueError where the machine cannot compute in it."""
    mixed = "no" if config.train.precision == "fp32" else config.train.precision
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        AcceleratorState._reset_state()  # an earlier run of this process had another precision
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("train.precision fp16 needs a GPU; use bf16 or fp32 here")
    if config.train.precision == "fp16" and config.train.shard:
        raise ValueError("train.shard does not go with train.precision fp16; use bf16 or fp32")
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # without a GPU, launched processes form a group only with this
        mixed_precision=mixed,
        project_dir=str(out),
        # else ACCELERATE_GRADIENT_ACCUMULATION_STEPS would divide the loss once more
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[process_group_options(config.train)],
    )


def process_group_options(config: Train) -> InitProcessGroupKwargs:
    """The time that a process waits for the others. ValueError where accelerate is configured for an engine of `ENGINES`."""
    for variable, engine in ENGINES.items():
        if os.environ.get(variable, "").lower() == "true":
            raise ValueError(
                f"accelerate is configured to use {engine}; remove that from its options or configuration file, and set "
                "--train.shard True"
            )
    return InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout))


def check_same(what: str, value: str) -> None:
    """ValueError in every process unless all of them have the same value. Every process must call it.

    `what` has this value, in the message: files that each machine may read from a copy of its own.
    """
    found = gather_object([value])
    other = next((rank for rank, each in enumerate(found) if each != found[0]), None)
    if other is not None:
        raise ValueError(
            f"process {other} of {len(found)} reads other {what} than process 0: give all of them the same files, or equal "
            "copies"
        )


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
