"""Activation checkpointing by block: which blocks keep their activations.

A block that is recomputed stores its inputs alone; its activations are computed again in the backward pass.
"""

from __future__ import annotations


def chosen_blocks(wanted: bool | int | tuple[int, ...], depth: int) -> bool | frozenset[int]:
    """The value of `Backbone.recompute` for the setting `train.recompute`: all blocks, none, the first n, or a list of blocks.

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
