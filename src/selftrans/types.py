"""The types that flow through selftrans, and the shape legend used in every file.

Shape legend: N batch, T tokens, D width, (C, H, W) latent, k block (1-based), M moments channels.
States of the data, in order: pixels ⇒ moments ⇒ latents (`Batch`) ⇒ `Draw` ⇒ `Output` ⇒ loss.
t = 0 is data and t = 1 is noise everywhere (said once, in `flow.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

#: A condition: a label tensor (N,), or named tensors that all start with N (text tokens, mask, pooled vector).
#: Objective, guidance, trainer and sampler never look inside; they use the four functions below.
Cond: TypeAlias = Tensor | dict[str, Tensor]


class Batch(NamedTuple):
    """What a training step is given."""

    z0: Tensor  #: (N, C, H, W) latents, scaled to about unit variance
    cond: Cond  #: true condition of each sample
    features: Tensor | None = None  #: (N, T, D) of an external encoder, stored with the data, if a guidance reads them


class Draw(NamedTuple):
    """Everything random in one step, drawn once and shared by the flow loss and every guidance."""

    z0: Tensor  #: (N, C, H, W) data
    noise: Tensor  #: (N, C, H, W) standard normal
    t: Tensor  #: (N,) in [0, 1]; 0 is data, 1 is noise
    zt: Tensor  #: (N, C, H, W) point on the path
    v: Tensor  #: (N, C, H, W) velocity d zt / dt, the target of the flow loss
    cond: Cond  #: true condition, for the teacher
    null: Cond  #: null condition of the same shape, for the teacher's other half
    dropped: Cond  #: condition with some samples replaced by the null one, for the student
    even: bool = False  #: t is systematic (one per stratum), so a range holds a bounded number of samples
    features: Tensor | None = None  #: as in the batch


class Output(NamedTuple):
    """What a backbone returns."""

    v: Tensor | None  #: (N, C, H, W) velocity; None when stopped early
    feats: dict[int, Tensor]  #: 1-based block -> (N, T, D) hidden image tokens after that block


@runtime_checkable
class Backbone(Protocol):
    """What the methods, the trainer and the samplers ask of a diffusion transformer."""

    depth: int  #: number of blocks
    width: int  #: D, channels of a token
    patch: int  #: side of a token's square of latent pixels
    shape: tuple[int, int, int]  #: (C, H, W) of a latent

    def __call__(self, x: Tensor, t: Tensor, cond: Cond, *, taps: tuple[int, ...] = (), stop: bool = False) -> Output:
        """Velocity at (x, t) under `cond`, with the features after each block of `taps`.

        With `stop=True` computation ends when the last tap is served, and `Output.v` is None.
        """
        ...

    def null(self, cond: Cond) -> Cond:
        """The unconditional condition, in the shape of `cond`."""
        ...


def map_cond(fn: Callable[..., Tensor], *conds: Cond) -> Cond:
    """Apply `fn` to each tensor of one or more conditions of the same structure."""
    first = conds[0]
    if isinstance(first, dict):
        return {name: fn(*(c[name] for c in conds)) for name in first}  # type: ignore[index]
    return fn(*conds)


def cat_cond(*conds: Cond) -> Cond:
    """Concatenate conditions along the batch."""
    return map_cond(lambda *xs: torch.cat(xs, dim=0), *conds)


def take_cond(cond: Cond, rows: Tensor) -> Cond:
    """Rows (M,) of a condition."""
    return map_cond(lambda x: x[rows], cond)


def where_cond(mask: Tensor, yes: Cond, no: Cond) -> Cond:
    """`yes` where mask (N,) is true, `no` elsewhere."""
    return map_cond(lambda a, b: torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b), yes, no)
