"""The compute of a training step: what is compiled, and how many floating-point operations it takes."""

from __future__ import annotations

import copy
import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from selftrans.methods.objective import Objective
from selftrans.models.compiling import compile_model
from selftrans.types import Backbone, Cond

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


def compile_blocks(objective: Objective, teacher: Any) -> None:
    """`torch.compile` each block of the student and of its teacher in place, for as long as they live.

    All blocks of a model share one compilation. Shapes are fixed, so that what meets them is: the student's batch, and
    as many samples as a guidance selects. Independent times select another number at each step, so there the teacher's
    batch is left open.
    """
    compile_model(objective.student)
    if teacher is not None:
        compile_model(teacher.model, dynamic=False if objective.times == "systematic" else None)


def forward_flops(backbone: Backbone, cond: Cond, taps: tuple[int, ...] = (), *, stop: bool = False) -> int:
    """Operations (2 per multiply-add) of one image through a backbone; `cond` holds one condition."""
    assert isinstance(backbone, nn.Module)
    meta = copy.deepcopy(backbone).to("meta")  # shapes are enough: nothing is computed, no memory is held
    z = torch.empty(1, *backbone.shape, device="meta")
    label = cond.to("meta") if isinstance(cond, Tensor) else {name: x.to("meta") for name, x in cond.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        meta(z, torch.empty(1, device="meta"), label, taps=taps, stop=stop)
    return counter.get_total_flops()


def step_flops(objective: Objective, cond: Cond, batch_size: int) -> dict[int | None, int]:
    """Operations of one step of `batch_size` images with each guidance: {None: without any, i: what guidance i adds}.

    A backward pass counts twice its forward pass; a teacher has no backward pass. `cond` holds one condition.
    """
    student: Backbone = objective.student
    tokens = (student.shape[1] // student.patch) ** 2
    total: dict[int | None, int] = {None: 3 * batch_size * forward_flops(student, cond)}
    for i, guidance in enumerate(objective.guidances):
        cost = guidance.cost(batch_size)
        head, teacher = getattr(guidance, "head", None), getattr(guidance, "teacher", None)
        linears = [m for m in head.modules() if isinstance(m, nn.Linear)] if head is not None else []
        per_head = sum(2 * tokens * m.in_features * m.out_features for m in linears)
        per_teacher = getattr(getattr(guidance, "encoder", None), "flops", 0)
        if teacher is not None:
            per_teacher = forward_flops(teacher.model, cond, (teacher.block,), stop=True)
        total[i] = 3 * cost["head"] * per_head + cost["teacher"] * per_teacher
    return total
