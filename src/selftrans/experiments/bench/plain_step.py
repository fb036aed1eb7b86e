"""A plain training step like that of published research code, with which `selftrans bench` compares the package.

It computes the same loss (a test compares loss and gradients). Like that code, it runs the teacher in float32 outside
autocast on the full batch, with and without labels; masks errors outside the timestep range after computing them; is
eager; uses torch's default AdamW; updates the moving average tensor by tensor, head included; and reads three values on
the host in each step. Omitted in its favour: moving raw images to the GPU, running the teacher past its block or after
guidance has ended. Shape legend: N batch, T tokens, D width, (C, H, W) latent.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from selftrans.config import RunConfig
from selftrans.flow import LINEAR, draw
from selftrans.methods.guidance import projector
from selftrans.methods.self_transcendence import Stage2, default_teacher_block
from selftrans.types import Batch, Conditions, Draw


def plain_losses(
    student: Any,
    head: nn.Module | None,
    teacher: Any,
    d: Draw,
    config: Stage2,
    amp: AbstractContextManager[object],
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, flow loss, guidance term), each 0-d; the guidance term is 0 without a teacher.

    The blocks of student and teacher are the defaults: at half and two thirds of the depth.
    """
    s, k = student.depth // 2, default_teacher_block(student.depth)
    assert config.timestep_range is not None
    with amp:
        out = student(d.zt, d.t, d.dropped, taps=(s,))
        guess = head(out.feats[s]) if head is not None else None  # (N, T, D)
    flow = (out.v.float() - d.v).square().flatten(start_dim=1).mean(dim=1)  # (N,)
    if teacher is None:
        return flow.mean(), flow.mean(), torch.zeros_like(flow.mean())
    assert guess is not None
    with torch.no_grad():
        f_c = teacher(d.zt, d.t, d.cond, taps=(k,), stop=True).feats[k]  # (N, T, D)
        f_u = teacher(d.zt, d.t, d.null, taps=(k,), stop=True).feats[k]
        target = f_u + config.scale * (f_c - f_u)
    error = (guess.float() - target).square().mean(dim=(1, 2))  # (N,)
    inside = (config.timestep_range[0] <= d.t) & (d.t <= config.timestep_range[1])
    term = (error * inside.float()).mean()
    return flow.mean() + config.weight * term, flow.mean(), term


class PlainStep:
    """A complete plain training step, in three parts: stage 2 with a random teacher if `guided`, else vanilla."""

    def __init__(
        self, config: RunConfig, shape: tuple[int, ...], conditions: Conditions, device: torch.device, *, guided: bool
    ) -> None:
        self.config, self.stage2, self.device = config, config.section(Stage2), device
        self.student = config.build_model(shape, conditions)
        width = self.student.width
        self.head = projector(width, width, self.stage2.head_width) if guided else None
        self.model = nn.ModuleList([self.student] if self.head is None else [self.student, self.head]).to(device)
        self.teacher = config.build_model(shape, conditions).to(device).requires_grad_(False).eval() if guided else None
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        train = config.train
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=train.lr, betas=train.betas, weight_decay=train.weight_decay
        )

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        reduced = self.config.train.precision != "fp32"
        amp = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=reduced)
        d = draw(batch, self.student.null(batch.cond), path=LINEAR, times="uniform", drop=self.config.train.drop)
        with _tf32():
            return plain_losses(self.student, self.head, self.teacher, d, self.stage2, amp)

    def backward(self, loss: Tensor) -> None:
        with _tf32():
            loss.backward()

    def update(self, losses: tuple[Tensor, Tensor, Tensor]) -> list[float]:
        """Clip, optimise, update the moving average; returns the values that are logged at every step."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        update_ema(self.ema, self.model, self.config.train.ema)
        return [losses[0].item(), losses[2].item(), norm.item()]


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """`a <- d a + (1 - d) p`, tensor by tensor."""
    parameters = dict(model.named_parameters())
    for name, average in ema.named_parameters():
        average.mul_(decay).add_(parameters[name].data, alpha=1 - decay)


@contextmanager
def _tf32() -> Iterator[None]:
    """Allow TensorFloat-32 for float32 products, as research code usually does; no effect on a CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
