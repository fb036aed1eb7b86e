"""FSDP2: weights, gradients, moments and the average split over the processes (torch's `fully_shard`).

accelerate makes the processes find each other; the splitting is torch's own, which works on CPUs, too, and so is tested
there. Checkpoints hold whole tensors: who reads or wrote them, and with how many processes, leaves no trace.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from selftrans.methods.objective import Objective
from selftrans.types import Backbone


def split(*models: Objective | Backbone, device: torch.device, processes: int) -> None:
    """Split each model in place over all processes: every block by itself, every guidance's heads, and what remains.

    Blocks are gathered one at a time in the forward and in the backward pass. Every process must call it.
    """
    mesh = init_device_mesh(device.type, (processes,))
    for model in models:
        parts = [*model.student.repeated(), *model.guidances] if isinstance(model, Objective) else model.repeated()
        for part in parts:
            if any(True for _ in part.parameters()):
                fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)


def release(model: nn.Module) -> None:
    """Let modules that have left a split model leave the memory as well: torch keeps a list of all that it has split."""
    if isinstance(model, FSDPModule):
        staying = [part._get_fsdp_state() for part in model.modules() if isinstance(part, FSDPModule)]
        states = model._get_fsdp_state()._state_ctx.all_states
        states[:] = [state for state in states if state in staying]
        gc.collect()  # they refer to each other


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; a tensor that is not split is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together again. Every process must call it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def anywhere(flag: Tensor, tensors: list[Tensor]) -> Tensor:
    """Whether a 0-d boolean is true in any of the processes that hold a part of the tensors. Every process must call it."""
    if not any(isinstance(tensor, DTensor) for tensor in tensors):
        return flag
    count = flag.float()
    dist.all_reduce(count)
    return count > 0


def alike(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of another, and split as that one is. Every process must call it."""
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def exchange(wrapped: Any, accelerator: Accelerator, last: bool) -> contextlib.AbstractContextManager[object]:
    """Around a micro-batch: gradients are exchanged after the last one alone."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
        last = True
    return contextlib.nullcontext() if last else accelerator.no_sync(wrapped)


def gathered(model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """A split model, in eval mode, as one process can run it; one that is not split as it is. Every process must call it."""
    if not isinstance(model, FSDPModule):
        return model
    state = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    copy = build().to(next(iter(state.values())).device)
    copy.load_state_dict(state)
    return copy.requires_grad_(False).eval()


def everything(objective: nn.Module, average: nn.Module, optimizer: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """All tensors of a checkpoint by file, whole, for the first process to write. Every process must call it.

    What was split is put together one tensor at a time, and kept in the first process alone, in its host's memory.
    """
    state = objective.state_dict()
    held = {
        "student": {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")},
        "ema": dict(average.state_dict()),
        "heads": {k: v for k, v in state.items() if not k.startswith("student.")},
        "optimizer": optimizer,
    }
    return {file: {name: _kept(tensor) for name, tensor in named.items()} for file, named in held.items()}


def _kept(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    together = whole(tensor.detach())
    return together.cpu() if dist.get_rank() == 0 else together.new_empty(0)


def load(model: nn.Module, state: dict[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors, each name in its place. RuntimeError for names that do not agree."""
    mine: dict[str, Any] = model.state_dict()
    model.load_state_dict({k: alike(v, mine[k]) if k in mine else v for k, v in state.items()}, strict=True)
