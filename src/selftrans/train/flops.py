"""Number of floating-point operations of a training step."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from selftrans.messages import first_line
from selftrans.methods.objective import Objective
from selftrans.types import Backbone, Cond, map_cond

M = TypeVar("M", bound=nn.Module)


def forward_flops(backbone: Backbone, cond: Cond, taps: tuple[int, ...] = (), *, stop: bool = False) -> int:
    """Operations (2 per multiply-add) of one sample through a backbone in eval mode; `cond` holds one condition."""
    return _count_forward(on_meta(backbone).eval(), cond, taps, stop=stop)


def on_meta(module: M) -> M:
    """A copy on the meta device, in float32: the reduced weights of a teacher would need autocast. No weight is copied for it,
    since a model that is sharded later may fit the device hardly more than once."""
    tensors: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    for p in module.parameters():
        tensors[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    return copy.deepcopy(module, tensors).to(device="meta", dtype=torch.float32)


def _count_forward(meta: Backbone, cond: Cond, taps: tuple[int, ...] = (), *, stop: bool = False) -> int:
    z = torch.empty(1, *meta.shape, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        meta(z, torch.empty(1, device="meta"), map_cond(lambda x: x.to("meta"), cond), taps=taps, stop=stop)
    return counter.get_total_flops()


def training_flops(backbone: Backbone, cond: Cond) -> int:
    """Operations of one sample forward and backward through a student; `cond` holds one condition.

    The model is in train mode, so tokens that it skips in training are not counted; neither is recomputation for the backward
    pass. The backward pass counts twice the forward pass; with frozen weights, which need no gradient, it is run and counted.
    """
    meta = on_meta(backbone).train()
    meta.recompute = False
    if all(p.requires_grad for p in backbone.parameters()):
        return 3 * _count_forward(meta, cond)
    z = torch.empty(1, *backbone.shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        v = meta(z, torch.empty(1, device="meta"), map_cond(lambda x: x.to("meta"), cond)).v
        assert v is not None
        v.sum().backward()
    return counter.get_total_flops()


def head_flops(head: nn.Module, tokens: int, width: int) -> int:
    """Operations of a head, or of each head in a list, on the features (1, tokens, width) of one sample."""
    heads = head if isinstance(head, nn.ModuleList) else [head]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for each in heads:
            on_meta(each)(torch.empty(1, tokens, width, device="meta"))
    return counter.get_total_flops()


def step_flops(objective: Objective, cond: Cond, batch_size: int) -> dict[int | None, int]:
    """Operations of one step of `batch_size` samples: {None: without guidance, i: those that guidance i adds}.

    A backward pass counts twice its forward pass (see `training_flops`); a teacher has none. `cond` holds one condition.
    """
    student = objective.student
    total: dict[int | None, int] = {None: batch_size * training_flops(student, cond)}
    for i, guidance in enumerate(objective.guidances):
        cost, teacher = guidance.cost(batch_size), guidance.teacher
        head = student.early if guidance.trains_early else guidance.head
        per_head = _per_head(guidance.name, head, student) if head is not None else 0
        per_teacher = guidance.encoder_flops
        if teacher is not None:
            per_teacher = forward_flops(teacher.model, cond, (teacher.block,), stop=True)
        total[i] = 3 * cost["head"] * per_head + cost["teacher"] * per_teacher
    return total


def _per_head(name: str, head: nn.Module, student: Backbone) -> int:
    """`head_flops` of a guidance's head. ValueError where it does not take the student's tokens alone."""
    try:
        return head_flops(head, student.tokens, student.width)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the head of the guidance {name} cannot be called on tokens (N, {student.tokens}, {student.width}) of one block "
            f"({first_line(error)}); its operations are counted so: give layers of other inputs another name than head"
        ) from error


def stage_flops(objective: Objective, cond: Cond, batch_size: int, steps: int) -> int:
    """Operations of a whole stage."""
    ends = [guidance.until_step for guidance in objective.guidances]
    return flops_until(steps, step_flops(objective, cond, batch_size), ends)


def flops_until(step: int, each: Mapping[int | None, int], ends: Sequence[int | None], begun: int = 0) -> int:
    """Operations of the steps from `begun` to `step`, those of a guidance until it ends.

    each: of one step, as `step_flops` returns them. ends: the first step at which each guidance no longer acts; None: never.
    """
    last = {None: step} | {i: step if end is None else min(step, end) for i, end in enumerate(ends)}
    return sum(each[part] * max(0, last[part] - begun) for part in last)
