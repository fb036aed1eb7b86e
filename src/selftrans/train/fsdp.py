"""FSDP2: weights, gradients, moments and the average sharded over the processes (torch's `fully_shard`).

accelerate sets up the process group; the sharding is torch's own, which works on CPUs, too, and is tested there.
Checkpoints hold full tensors, so they do not depend on the number of processes, nor on whether the run is sharded.
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


def shard_models(*models: Objective | Backbone, device: torch.device, processes: int) -> None:
    """Shard each model in place over all processes: every block, every guidance's heads, and then what remains.

    Blocks are gathered one at a time in the forward and in the backward pass. Every process must call it.
    """
    mesh = init_device_mesh(device.type, (processes,))
    for model in models:
        parts = [*model.student.sharded(), *model.guidances] if isinstance(model, Objective) else model.sharded()
        for part in parts:
            if any(True for _ in part.parameters()):
                fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)


def release(model: nn.Module) -> None:
    """Free the memory of modules that were removed from a sharded model: torch keeps a list of all that it has sharded.

    No public function of torch 2.13 shortens it. With a version of torch that keeps it elsewhere the memory stays in use.
    """
    if isinstance(model, FSDPModule):
        with contextlib.suppress(AttributeError):
            staying = [part._get_fsdp_state() for part in model.modules() if isinstance(part, FSDPModule)]
            states = model._get_fsdp_state()._state_ctx.all_states
            states[:] = [state for state in states if state in staying]
            gc.collect()  # the states refer to each other


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; a tensor that is not sharded is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor. Every process must call it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Drop gathered weights, so that the next pass gathers them anew. A model that is not sharded stays as it is.

    FSDP2 drops the weights outside of the blocks only after a backward pass. A model without backward passes, such as the
    average, would keep the weights that its first pass gathered.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def any_rank(flag: Tensor, tensors: list[Tensor]) -> Tensor:
    """Whether a 0-d boolean is true in any process, where `tensors` are sharded; else `flag`. Every process must call it."""
    if not any(isinstance(tensor, DTensor) for tensor in tensors):
        return flag
    count = flag.float()
    dist.all_reduce(count)
    return count > 0


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A full tensor on the device of `like`, and sharded as `like` is. Every process must call it."""
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def exchange(wrapped: Any, accelerator: Accelerator, last: bool) -> contextlib.AbstractContextManager[object]:
    """Context of a micro-batch: processes exchange gradients only after the `last` micro-batch of a step."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
        last = True
    return contextlib.nullcontext() if last else accelerator.no_sync(wrapped)


def gather_model(model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """In the first process a copy with full tensors of a sharded model, in eval mode, which it can run alone. Every process
    must call it; in the others, and for a model that is not sharded, it returns the model itself.

    `build` makes an empty model of the same architecture.
    """
    if not isinstance(model, FSDPModule):
        return model
    state = {name: _gather_to_first(tensor) for name, tensor in model.state_dict().items()}
    if dist.get_rank():
        return model
    copy = build().to(next(model.parameters()).device)
    copy.load_state_dict(state)
    return copy.requires_grad_(False).eval()


def gather_checkpoint(
    objective: nn.Module, average: nn.Module, optimizer: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """All tensors of a checkpoint by file, in full, for the first process to write. Every process must call it.

    Sharded tensors are gathered one at a time, and kept by the first process alone, in host memory.
    """
    state = objective.state_dict()
    held = {
        "student": {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")},
        "ema": dict(average.state_dict()),
        "heads": {k: v for k, v in state.items() if not k.startswith("student.")},
        "optimizer": optimizer,
    }
    return {file: {name: _gather_to_first(tensor) for name, tensor in named.items()} for file, named in held.items()}


def _gather_to_first(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    full = gather_full_tensor(tensor.detach())
    return full.cpu() if dist.get_rank() == 0 else full.new_empty(0)


def load(model: nn.Module, state: dict[str, Tensor]) -> None:
    """`load_state_dict` with full tensors, sharded where the model is. RuntimeError where the names do not agree."""
    mine: dict[str, Any] = model.state_dict()
    model.load_state_dict({k: shard_like(v, mine[k]) if k in mine else v for k, v in state.items()}, strict=True)
