"""Self-Transcendence (Sun et al., arXiv 2601.07773): a diffusion transformer guided by nothing but itself.

    Stage 1. The shallow block of a short run is guided by the structure of the VAE latents:
                 L = L_flow + lambda g(t) mean | W LN(P(h_s)) - patchify(target) |²
    Stage 2. That model, frozen, is the teacher of a new student. Classifier-free guidance is applied to its *features*:
                 f_g = f_u + w (f_c - f_u)        f_c = h_k(z_t, t, y),  f_u = h_k(z_t, t, null)
                 L = L_flow + lambda g(t) mean | P(h_s) - f_g |²

h_s is the student's hidden state after block s, P a small head, g(t) the timestep range (`objective.gate`).
Both stages share the student's z_t and t; the student may see a dropped label, the teacher always sees the true one.
Shape legend: N batch, M samples in the range, T tokens, D width, (C, *S) latent.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from selftrans.methods.guidance import (
    Frozen,
    Guidance,
    Report,
    check_gate,
    check_term,
    check_tokens,
    feature_error,
    gate,
    ineffective_range_mode,
    initialised,
    projector,
    selected,
    token_norm,
)
from selftrans.methods.spec import MethodSpec, PublishedHeads, Stage, TeacherSpec
from selftrans.sections import Section, setting
from selftrans.types import Backbone, Conditions, Draw, take_cond

if TYPE_CHECKING:
    from selftrans.config import RunConfig


@dataclass(frozen=True)
class Stage1(Section):
    """VAE structure guidance of a shallow block."""

    key = "stage1"

    steps: int | None = setting(None, length=True)
    """steps of stage 1; None: half of train.steps"""
    block: int = 2
    """s, the student's guided block (1-based)"""
    target: Literal["velocity", "latent"] = "velocity"
    """what the block predicts: the velocity (released code, the paper's figure) or the clean latent (the paper's words)"""
    weight: float = setting(0.5, resume="consent")
    """lambda"""
    timestep_range: tuple[float, float] | None = (0.4, 0.7)
    """[a, b] in which the term acts; None: everywhere"""
    range_mode: Literal["select", "scale"] = "select"
    """select: samples inside the range; scale: all samples, times the fraction inside (the released code)"""
    head_width: int = 2048
    """hidden width of the head P"""

    def check(self) -> None:
        check_term(self, self.weight, self.head_width)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"stage1.steps must be above zero, not {self.steps}; to skip stage 1 give --teacher")

    def ineffective(self) -> dict[str, str]:
        return ineffective_range_mode(self.timestep_range)


@dataclass(frozen=True)
class Stage2(Section):
    """Self-guided representation: features of the frozen stage-1 model, guided and matched."""

    key = "stage2"

    teacher: str | None = setting(None, resume="free")  # its weights may not change: checkpoints keep their hash
    """a run with a stage 1, or a weights file, in place of this run's own stage 1; `--teacher` sets it"""
    student_block: int | None = None
    """s, the student's guided block (1-based); None: half of its depth"""
    teacher_block: int | None = None
    """k, the teacher's block; None: two thirds of its depth"""
    scale: float = 30.0
    """w, strength of classifier-free guidance on the features; 1 is no guidance"""
    weight: float = setting(0.5, resume="consent")
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

    def check(self) -> None:
        check_term(self, self.weight, self.head_width)
        if not math.isfinite(self.scale):
            raise ValueError(f"stage2.scale must be a number, not {self.scale}")

    def ineffective(self) -> dict[str, str]:
        return ineffective_range_mode(self.timestep_range)


class StructureGuidance(Guidance):
    """Stage 1: the shallow block predicts the target token by token."""

    name = "structure"

    def __init__(self, student: Backbone, config: Stage1) -> None:
        check_gate(config.timestep_range, config.range_mode)
        super().__init__(config.weight, (config.block,))
        self.config, self.patchify = config, student.patchify
        cells = math.prod(student.shape) // student.tokens  # numbers of a latent that one token covers
        projection, norm = (
            projector(student.width, student.width, config.head_width),
            nn.LayerNorm(student.width, elementwise_affine=False, eps=1e-6),
        )
        self.head = initialised(nn.Sequential(projection, norm, nn.Linear(student.width, cells)))  # W LN(P(h))

    def forward(self, d: Draw, feats: dict[int, Tensor]) -> tuple[Tensor, Report]:
        picked = gate(d, self.config.timestep_range, self.config.range_mode)
        hidden = picked.take(feats[self.config.block])  # (M, T, D)
        target = self.patchify(picked.take(d.v if self.config.target == "velocity" else d.z0))  # (M, T, cells)
        error = (self.head(hidden).float() - target).square().mean(dim=(1, 2))  # (M,)
        return picked.mean(error), {"feature_norm": token_norm(hidden), "target_norm": token_norm(target)}

    def cost(self, n: int) -> dict[str, int]:
        return {"head": selected(n, self.config.timestep_range, self.config.range_mode), "teacher": 0}


class SelfGuidance(Guidance):
    """Stage 2: the student's block matches the teacher's guided features."""

    name = "self"
    teacher: Frozen

    def __init__(self, student: Backbone, teacher: Frozen, config: Stage2) -> None:
        check_gate(config.timestep_range, config.range_mode)
        check_tokens(student, teacher)
        block = max(1, student.depth // 2) if config.student_block is None else config.student_block
        super().__init__(config.weight, (block,), until_step=config.until_step)
        self.config, self.block, self.teacher = config, block, teacher
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
            return self.teacher(zt, t, true)[0].float()
        f_c, f_u = (f.float() for f in self.teacher(zt, t, true, null))
        return f_u + self.config.scale * (f_c - f_u)

    def cost(self, n: int) -> dict[str, int]:
        m = selected(n, self.config.timestep_range, self.config.range_mode)
        return {"head": m, "teacher": m if self.config.scale == 1 else 2 * m}


def default_teacher_block(depth: int) -> int:
    """Two thirds of the depth: 8 of 12, 16 of 24, 18 of 28, as published."""
    return max(1, depth * 2 // 3)


def _stage1(config: RunConfig, steps: int) -> Stage:
    def guide(student: Backbone, teacher: None) -> Sequence[Guidance]:
        return [StructureGuidance(student, config.section(Stage1))]

    # stream 1: a teacher that shared the student's initial weights would be easier to match than an independent one
    return Stage("stage1", steps, guide, (Stage1,), stream=1)


def _structure(config: RunConfig) -> list[Stage]:
    return [_stage1(config, config.train.steps)]


def _self_transcendence(config: RunConfig) -> list[Stage]:
    stage1, stage2 = config.section(Stage1), config.section(Stage2)

    def guide(student: Backbone, teacher: Frozen) -> Sequence[Guidance]:
        return [SelfGuidance(student, teacher, stage2)]

    steps = max(1, config.train.steps // 2) if stage1.steps is None else stage1.steps
    block = stage2.teacher_block
    teacher = TeacherSpec(
        stage="stage1",
        block=default_teacher_block if block is None else lambda depth: block,
        weights=stage2.teacher_weights,
        given=stage2.teacher,
        option="stage2.teacher",
    )
    return [_stage1(config, steps), Stage("stage2", config.train.steps, guide, (Stage2,), teacher)]


def _settle(config: RunConfig, conditions: Conditions) -> RunConfig:
    """Without conditions f_c = f_u, so guided features are the features: w = 1, at half the cost."""
    stage2 = config.section(Stage2)
    if conditions.kind == "none" and stage2.scale != 1:
        warnings.warn(f"stage2.scale {stage2.scale:g} is ignored: the data have no classes", stacklevel=5)
        config = config.override({"stage2.scale": 1.0})
    return config


def _published_heads(
    named: Mapping[str, Tensor], arguments: Mapping[str, Any], config: RunConfig
) -> PublishedHeads | None:
    """The release's head of stage 1 (`projectors.*`, `projectors_final.linear`), and the settings it was trained with.

    Raises KeyError, TypeError, IndexError or ValueError for options that cannot be used.
    """
    if "projectors_final.linear.weight" not in named or "projectors.0.weight" not in named:
        return None
    if any(name.startswith("projectors_final.adaLN") for name in named):
        return None  # of its MMDiT: modulated by the time, which ours is not
    span, plain = arguments.get("t_range"), config.section(Stage1)
    stage1 = dataclasses.replace(
        plain,
        block=int(arguments.get("encoder_depth", plain.block)),
        weight=float(arguments.get("proj_coeff", plain.weight)),
        timestep_range=(float(span[0]), float(span[1])) if span else None if arguments else plain.timestep_range,
        range_mode="scale",  # what the released code computes
        head_width=named["projectors.0.weight"].shape[0],
    )
    return PublishedHeads((stage1,), PUBLISHED_HEAD, "projectors_final.linear.")


#: the release's head of stage 1 -> ours, by their names in a state dict
PUBLISHED_HEAD = {
    f"{theirs}.{part}": f"guidances.0.head.{ours}.{part}"
    for theirs, ours in {
        "projectors.0": "0.0",
        "projectors.2": "0.2",
        "projectors.4": "0.4",
        "projectors_final.linear": "2",
    }.items()
    for part in ("weight", "bias")
}

#: stage 1 alone, to train.steps
STRUCTURE = MethodSpec("structure", "stage 1 only", _structure, (Stage1,), published_heads=_published_heads)
SELF_TRANSCENDENCE = MethodSpec(
    "self_transcendence", "Self-Transcendence", _self_transcendence, (Stage1, Stage2), _settle
)
