"""Self-Transcendence (Sun et al., arXiv 2601.07773): a diffusion transformer guided by nothing but itself.

    Stage 1. The shallow block of a short run is guided by the structure of the VAE latents:
                 L = L_flow + lambda g(t) mean | W LN(P(h_s)) - patchify(target) |²
    Stage 2. That model, frozen, is the teacher of a new student. Classifier-free guidance is applied to its *features*:
                 f_g = f_u + w (f_c - f_u)        f_c = h_k(z_t, t, y),  f_u = h_k(z_t, t, null)
                 L = L_flow + lambda g(t) mean | P(h_s) - f_g |²

h_s is the student's hidden state after block s, P a small head, g(t) the timestep range (`objective.gate`).
Both stages share the student's z_t and t; the student may see a dropped label, the teacher always sees the true one.
Shape legend: N batch, M samples in the range, T tokens, D width, (C, H, W) latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from selftrans.methods.objective import (
    Frozen,
    Report,
    check_gate,
    check_tokens,
    feature_error,
    gate,
    projector,
    selected,
    token_norm,
)
from selftrans.types import Backbone, Draw, take_cond


@dataclass(frozen=True)
class Stage1:
    """VAE structure guidance of a shallow block."""

    steps: int | None = None
    """steps of stage 1; None: half of train.steps"""
    block: int = 2
    """s, the student's guided block (1-based)"""
    target: Literal["velocity", "latent"] = "velocity"
    """what the block predicts: the velocity (released code, the paper's figure) or the clean latent (the paper's words)"""
    weight: float = 0.5
    """lambda"""
    timestep_range: tuple[float, float] | None = (0.4, 0.7)
    """[a, b] in which the term acts; None: everywhere"""
    range_mode: Literal["select", "scale"] = "select"
    """select: samples inside the range; scale: all samples, times the fraction inside (the released code)"""
    head_width: int = 2048
    """hidden width of the head P"""


@dataclass(frozen=True)
class Stage2:
    """Self-guided representation: features of the frozen stage-1 model, guided and matched."""

    teacher: str | None = None
    """a run with a stage 1, or a weights file, in place of this run's own stage 1; `--teacher` sets it"""
    student_block: int | None = None
    """s, the student's guided block (1-based); None: half of its depth"""
    teacher_block: int | None = None
    """k, the teacher's block; None: two thirds of its depth"""
    scale: float = 30.0
    """w, strength of classifier-free guidance on the features; 1 is no guidance"""
    weight: float = 0.5
    """lambda"""
    timestep_range: tuple[float, float] | None = (0.4, 0.7)
    """[a, b] in which the term acts; None: everywhere"""
    range_mode: Literal["select", "scale"] = "select"
    """select: samples inside the range; scale: all samples, times the fraction inside (the released code)"""
    until_step: int | None = 100_000
    """the term ends here, and teacher and head leave the step; None: never"""
    target_norm: Literal["none", "layer", "cosine"] = "none"
    """none: squared error (paper); layer: on LayerNorm(f_g); cosine: 1 - cos per token"""
    teacher_weights: Literal["raw", "ema"] = "raw"
    """which weights of the stage-1 run teach"""
    head_width: int = 2048
    """hidden width of the head P"""


def patchify(x: Tensor, patch: int) -> Tensor:
    """(N, C, H, W) -> (N, T, C patch²), row by row."""
    return F.unfold(x, kernel_size=patch, stride=patch).transpose(1, 2)


class StructureGuidance(nn.Module):
    """Stage 1: the shallow block predicts the target patch by patch."""

    name: str = "structure"
    taps: tuple[int, ...]
    until_step: int | None = None

    def __init__(self, student: Backbone, config: Stage1) -> None:
        super().__init__()
        check_gate(config.timestep_range, config.range_mode)
        self.config, self.weight, self.taps, self.patch = config, config.weight, (config.block,), student.patch
        self.head = nn.Sequential(  # W LN(P(h))
            projector(student.width, student.width, config.head_width),
            nn.LayerNorm(student.width, elementwise_affine=False, eps=1e-6),
            nn.Linear(student.width, student.shape[0] * student.patch**2),
        )

    def forward(self, d: Draw, feats: dict[int, Tensor]) -> tuple[Tensor, Report]:
        picked = gate(d, self.config.timestep_range, self.config.range_mode)
        hidden = picked.take(feats[self.config.block])  # (M, T, D)
        target = patchify(picked.take(d.v if self.config.target == "velocity" else d.z0), self.patch)  # (M, T, C p²)
        error = (self.head(hidden).float() - target).square().mean(dim=(1, 2))  # (M,)
        return picked.mean(error), {"feature_norm": token_norm(hidden), "target_norm": token_norm(target)}

    def cost(self, n: int) -> dict[str, int]:
        return {"head": selected(n, self.config.timestep_range, self.config.range_mode), "teacher": 0}


class SelfGuidance(nn.Module):
    """Stage 2: the student's block matches the teacher's guided features."""

    name: str = "self"
    taps: tuple[int, ...]

    def __init__(self, student: Backbone, teacher: Frozen, config: Stage2) -> None:
        super().__init__()
        check_gate(config.timestep_range, config.range_mode)
        check_tokens(student, teacher)
        self.config, self.weight, self.until_step = config, config.weight, config.until_step
        self.block = max(1, student.depth // 2) if config.student_block is None else config.student_block
        self.taps, self.teacher = (self.block,), teacher
        self.head = projector(student.width, teacher.width, config.head_width)

    def forward(self, d: Draw, feats: dict[int, Tensor]) -> tuple[Tensor, Report]:
        picked = gate(d, self.config.timestep_range, self.config.range_mode)
        hidden = picked.take(feats[self.block])  # (M, T, D)
        target = self.guided_features(d, picked.rows)  # (M, T, D of the teacher)
        error = feature_error(self.head(hidden).float(), target, self.config.target_norm)  # (M,)
        return picked.mean(error), {"feature_norm": token_norm(hidden), "target_norm": token_norm(target)}

    def guided_features(self, d: Draw, rows: Tensor | None = None) -> Tensor:
        """f_g = f_u + w (f_c - f_u) for the given rows of the draw, (M, T, D) in float32, never with a gradient."""
        zt, t, true, null = d.zt, d.t, d.cond, d.null
        if rows is not None:
            zt, t, true, null = zt[rows], t[rows], take_cond(true, rows), take_cond(null, rows)
        if self.config.scale == 1:  # f_g = f_c: the unconditional half would be multiplied by zero
            return self.teacher(zt, t, true)[0].float() + 0.0  # the sum makes an ordinary tensor of an inference tensor
        f_c, f_u = (f.float() for f in self.teacher(zt, t, true, null))
        return f_u + self.config.scale * (f_c - f_u)

    def cost(self, n: int) -> dict[str, int]:
        m = selected(n, self.config.timestep_range, self.config.range_mode)
        return {"head": m, "teacher": m if self.config.scale == 1 else 2 * m}


def default_teacher_block(depth: int) -> int:
    """Two thirds of the depth: 8 of 12, 16 of 24, 18 of 28, as published."""
    return max(1, depth * 2 // 3)
