"""Activation checkpointing by block: which blocks keep their activations, and what those of a block take.

A block that is recomputed stores its inputs alone; its activations are computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def chosen_blocks(wanted: bool | int | tuple[int, ...], depth: int) -> bool | frozenset[int]:
    """`Backbone.recompute` for the setting `train.recompute`: of all blocks, none, the first so many, or those named.

    ValueError for blocks that a model of `depth` blocks does not have.
    """
    if isinstance(wanted, bool):
        return wanted
    if isinstance(wanted, int) and wanted < 0:
        raise ValueError(f"train.recompute {wanted} is no number of blocks; the model has {depth}")
    blocks = tuple(range(1, wanted + 1)) if isinstance(wanted, int) else wanted
    if wrong := [k for k in blocks if not 1 <= k <= depth]:
        raise ValueError(f"train.recompute names block {wrong[0]}, but the model has blocks 1 to {depth}")
    return frozenset(blocks)


def saved_bytes(run: Callable[[], Any], kept: nn.Module) -> int:
    """Bytes that autograd stores for the backward pass of `run()`, without the parameters and buffers of `kept`.

    Each storage counts once, so views of one tensor are one. Compiled code decides by itself what it stores.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*kept.parameters(), *kept.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept_alive = run()  # noqa: F841 - so that no storage is freed, and its place taken by another, while it counts
    return sum(found.values())
