"""The guidance of each stage. Shape legend: N batch, T tokens, D width, (C, *S) latent, L its last axis."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from own_method.align_settings import Align
from selftrans.flow import Path, interpolate
from selftrans.methods.guidance import Frozen, Guidance, Report, check_tokens, feature_error, initialised, projector
from selftrans.types import Backbone, Draw


def smooth(z0: Tensor, cells: int) -> Tensor:
    """Latents (N, C, *S), each value averaged with `cells` neighbours on both sides along the last axis."""
    rows = z0.flatten(1, -2)  # (N, C * ..., L)
    return F.avg_pool1d(rows, 2 * cells + 1, stride=1, padding=cells, count_include_pad=False).view_as(z0)


class Coarse(Guidance):
    """Stage `warmup`: the block predicts the smoothed data, token by token."""

    name = "coarse"

    def __init__(self, student: Backbone, config: Align) -> None:
        super().__init__(config.weight, (config.student_block(student.depth),))
        self.patchify, self.cells = student.patchify, config.smooth
        self.head = initialised(nn.Sequential(nn.Linear(student.width, math.prod(student.shape) // student.tokens)))

    def forward(self, d: Draw, feats: dict[int, Tensor]) -> tuple[Tensor, Report]:
        prediction = self.head(feats[self.taps[0]]).float()  # (N, T, C * cells of a token)
        return F.mse_loss(prediction, self.patchify(smooth(d.z0, self.cells))), {}


class Follow(Guidance):
    """Stage `align`: the student's block is aligned with a deeper block of the teacher, whose input has less noise."""

    name = "follow"
    teacher: Frozen

    def __init__(self, student: Backbone, teacher: Frozen, config: Align, path: Path) -> None:
        check_tokens(student, teacher)
        super().__init__(config.weight, (config.student_block(student.depth),))
        self.teacher, self.path, self.cleaner = teacher, path, config.cleaner
        self.head = projector(student.width, teacher.width, config.head_width)

    def forward(self, d: Draw, feats: dict[int, Tensor]) -> tuple[Tensor, Report]:
        t = (d.t - self.cleaner).clamp(min=0)  # (N,)
        zt, _ = interpolate(self.path, d.z0, d.noise, t)
        target = self.teacher(zt, t, d.cond)[0].float()
        return feature_error(self.head(feats[self.taps[0]]).float(), target, "cosine").mean(dim=0), {}

    def cost(self, n: int) -> dict[str, int]:
        return {"head": n, "teacher": n}
