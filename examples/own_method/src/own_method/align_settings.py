"""The settings of the method: `--align.*` on the command line, the object `align` in config.json."""

from __future__ import annotations

from dataclasses import dataclass

from selftrans.methods.guidance import check_term
from selftrans.sections import Section, setting


@dataclass(frozen=True)
class Align(Section):
    """Training on coarse data, then alignment of a new model with the result."""

    key = "align"

    steps: int | None = setting(None, length=True)
    """steps of the stage warmup; None: half of train.steps"""
    teacher: str | None = setting(None, resume="free")  # the path may change; the weights may not, their hash is stored
    """a run with a stage warmup, or a weights file, that replaces this run's stage warmup; `--teacher` sets it"""
    block: int | None = None
    """the student's guided block (1-based), in both stages; None: a third of its depth"""
    teacher_block: int | None = None
    """the teacher's block; None: two thirds of its depth"""
    weight: float = setting(0.5, resume="consent")
    """factor of the guidance term"""
    smooth: int = 2
    """warmup: how many neighbours on each side a value is averaged with"""
    cleaner: float = 0.2
    """align: the teacher's input has less noise than the student's by this difference of t"""
    head_width: int = 256
    """align: hidden width of the head"""

    def check(self) -> None:
        check_term(self, self.weight, self.head_width)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"align.steps must be above zero, not {self.steps}; to skip the warm-up give --teacher")
        if self.smooth < 0 or not 0 <= self.cleaner <= 1:
            raise ValueError(f"align.smooth {self.smooth} must be from 0, align.cleaner {self.cleaner} in [0, 1]")

    def student_block(self, depth: int) -> int:
        return max(1, depth // 3) if self.block is None else self.block

    def deeper_block(self, depth: int) -> int:
        return max(1, depth * 2 // 3) if self.teacher_block is None else self.teacher_block
