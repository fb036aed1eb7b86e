"""The settings of the two stages of Self-Transcendence. Defaults are the published values; options beyond the paper are off.

Shape legend: T tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from selftrans.methods.guidance import check_term
from selftrans.sections import Section, setting

#: settings of `Stage2` on the teacher that stage 1 trains -> settings of the run that they replace in stage 1
TEACHER_SETTINGS = {"teacher_width": "model.width", "teacher_depth": "model.depth", "teacher_lr": "train.lr"}
NO_RANGE = "without a timestep_range every sample counts"


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
        return {} if self.timestep_range else {"range_mode": NO_RANGE}


@dataclass(frozen=True)
class Stage2(Section):
    """Self-guided representation: features of the frozen stage-1 model, guided and matched."""

    key = "stage2"

    teacher: str | None = setting(None, resume="free")  # its weights may not change: checkpoints keep their hash
    """a run with a stage 1, or a weights file, in place of this run's own stage 1; `--teacher` sets it"""
    teacher_width: int | None = None
    """model.width of the teacher that stage 1 trains; None: the student's. A smaller teacher costs less (docs/guidance.md)"""
    teacher_depth: int | None = None
    """model.depth of the teacher that stage 1 trains; None: the student's"""
    teacher_lr: float | None = setting(None, resume="consent")
    """train.lr of stage 1, for a teacher of another size; None: the student's"""
    student_block: int | None = None
    """s, the student's guided block (1-based); None: half of its depth"""
    teacher_block: int | None = None
    """k, the teacher's block; None: two thirds of its depth"""
    student_blocks: tuple[int, ...] | None = None
    """several guided blocks of the student in place of student_block, each with a head; the term is their mean"""
    teacher_blocks: tuple[int, ...] | None = None
    """the teacher's block for each of student_blocks, in their order; None: teacher_block for all"""
    scale: float = 30.0
    """w, strength of classifier-free guidance on the features; 1 is no guidance"""
    weight: float = setting(0.5, resume="consent")
    """lambda"""
    timestep_range: tuple[float, float] | None = (0.4, 0.7)
    """[a, b] in which the term acts; None: everywhere"""
    data_std: float = 1.0
    """standard deviation of the latents: timestep_range is meant for 1, and otherwise moves to the times of the same
    signal-to-noise ratio. Of data that are not standardised: for 0.75 (digits in [-1, 1]) [0.4, 0.7] becomes [0.33, 0.64]"""
    range_mode: Literal["select", "scale"] = "select"
    """select: samples inside the range; scale: all samples, times the fraction inside (the released code)"""
    until_step: int | None = 100_000
    """the term ends here, and teacher and head leave the step; None: never"""
    target_norm: Literal["none", "layer", "cosine", "spatial"] = "none"
    """none: squared error (paper); layer: on LayerNorm(f_g); cosine: 1 - cos per token; spatial: squared error on f_g with each
    channel normalised over the tokens of a sample (iREPA), which weakens what all tokens of a sample have in common"""
    spatial_gamma: float = 0.6
    """of target_norm spatial: the share of the mean over tokens that is subtracted (iREPA's code: 0.6); 1: all of it"""
    head: Literal["mlp", "conv"] = "mlp"
    """mlp: P, per token (paper); conv: one convolution of 3 tokens along each dimension of the grid (iREPA)"""
    null_rows: float = 0.0
    """fraction of the guided samples for which the student gets the null condition, so that it cannot predict the label's part
    of the target from the label; in the flow loss they are unconditional samples, too"""
    label_part: Literal["keep", "remove", "decay"] = "keep"
    """the part of the target that depends on the label alone, its mean per label and token: keep (paper); remove, by running
    means; decay: the share that is kept falls linearly from 1 to 0 at until_step. Needs labels, and 4 (classes + 1) x tokens x
    width bytes for the means"""
    fade: float = 0.0
    """last fraction of the steps before until_step in which lambda falls linearly to zero; 0: the term ends at once"""
    teacher_weights: Literal["raw", "ema"] = "raw"
    """which weights of the stage-1 run teach"""
    head_width: int = 2048
    """hidden width of the head P"""

    def check(self) -> None:
        check_term(self, self.weight, self.head_width)
        for name in ("scale", "spatial_gamma"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"stage2.{name} must be a number, not {getattr(self, name)}")
        if not 0 < self.data_std < math.inf:
            raise ValueError(f"stage2.data_std is a standard deviation, above zero, not {self.data_std}")
        for name in TEACHER_SETTINGS:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"stage2.{name} must be above zero, not {value}")
        if self.student_blocks is not None and min(self.student_blocks, default=0) < 1:
            raise ValueError(
                f"stage2.student_blocks {self.student_blocks} must be blocks from 1; give one at least, or None"
            )
        if self.teacher_blocks is not None and len(self.teacher_blocks) != len(self.student_blocks or ()):
            raise ValueError(
                f"stage2.teacher_blocks {self.teacher_blocks} must be as many as stage2.student_blocks {self.student_blocks}"
            )
        if min(self.teacher_blocks or (1,)) < 1:
            raise ValueError(f"stage2.teacher_blocks {self.teacher_blocks} must be blocks from 1")
        if not 0 <= self.null_rows <= 1:
            raise ValueError(f"stage2.null_rows is a fraction of the guided samples, in [0, 1], not {self.null_rows}")
        if not 0 <= self.fade <= 1:
            raise ValueError(f"stage2.fade is a fraction of the steps before until_step, in [0, 1], not {self.fade}")
        if self.until_step is None and (self.fade or self.label_part == "decay"):
            raise ValueError("stage2.fade and stage2.label_part decay need the end of the term; give stage2.until_step")

    def ineffective(self) -> dict[str, str]:
        wide = {"head_width": "stage2.head conv has no hidden layer"} if self.head == "conv" else {}
        shared = {} if self.target_norm == "spatial" else {"spatial_gamma": "stage2.target_norm is not spatial"}
        single = {
            name: f"stage2.{name}s takes its place"
            for name, given in (("student_block", self.student_blocks), ("teacher_block", self.teacher_blocks))
            if given
        }
        other = "stage2.teacher is given, and no teacher is trained"
        trained = dict.fromkeys(TEACHER_SETTINGS, other) if self.teacher else {}
        everywhere = {} if self.timestep_range else dict.fromkeys(("range_mode", "data_std"), NO_RANGE)
        return everywhere | wide | shared | single | trained
