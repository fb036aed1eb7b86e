"""REPA, representation alignment (Yu et al., 2410.06940): a block follows a frozen encoder of the clean picture.

    L = L_flow + lambda mean (1 - cos(P(h_s), y))                       mean over N and T, cos over D

y is the encoder's patch features (published: DINOv2), one for each token of the student, stored with the data or computed
from its pixels; P a small head. The published loss is -cos, which differs by a constant. No timestep range.
Shape legend: N batch, T = grid² tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from selftrans.methods.guidance import Guidance, Report, check_term, feature_error, projector, token_norm
from selftrans.methods.spec import EncoderSpec, MethodSpec, Stage
from selftrans.sections import Section, setting
from selftrans.types import Backbone, Draw

if TYPE_CHECKING:
    from selftrans.config import RunConfig


@dataclass(frozen=True)
class Repa(Section):
    """Alignment with the features of an external encoder."""

    key = "repa"

    encoder: str | None = setting(None, resume="free")  # its weights may not change: checkpoints keep their hash
    """vision model of transformers, hub id or folder, run on pixel data; None: features of `selftrans prepare --features`"""
    block: int | None = None
    """s, the student's block (1-based); None: a third of its depth, 8 at most (8 of 24 and of 28, as published)"""
    weight: float = setting(0.5, resume="consent")
    """lambda"""
    until_step: int | None = None
    """the term ends here, and encoder and head leave the step (HASTE); None: never"""
    head_width: int = 2048
    """hidden width of the head P"""

    def check(self) -> None:
        check_term(self, self.weight, self.head_width)


class Features(Protocol):
    """Where the encoder's features come from."""

    grid: tuple[int, ...]  #: of the features, row by row; T is their product
    width: int  #: D of a feature
    flops: int  #: operations for one picture; 0 when they are stored
    encode: Callable[[Tensor], Tensor] | None  #: pixels to (N, T, D), without a gradient; None: they come in the draw


class RepaGuidance(Guidance):
    """The student's block follows the encoder, which is no part of the module: never optimised, wrapped or saved."""

    name = "repa"

    def __init__(self, student: Backbone, encoder: Features, config: Repa) -> None:
        if tuple(encoder.grid) != tuple(student.grid):
            theirs, ours = ("x".join(map(str, grid)) for grid in (encoder.grid, student.grid))
            remedy = f"prepare the data with --grid {student.grid[0]}, or choose another patch size of the model"
            if len(student.grid) != 2 or student.grid[0] != student.grid[1]:
                remedy = "an encoder's grid is a square, so give data of square pictures, or choose another method"
            raise ValueError(f"the stored features lie on a {theirs} grid, the student's tokens on {ours}; {remedy}")
        block = max(1, min(8, student.depth // 3)) if config.block is None else config.block
        super().__init__(config.weight, (block,), until_step=config.until_step)
        self.block, self.encoder, self.encoder_flops = block, encoder, encoder.flops
        self.reads_features = encoder.encode is None
        self.head = projector(student.width, encoder.width, config.head_width)

    def forward(self, d: Draw, feats: dict[int, Tensor]) -> tuple[Tensor, Report]:
        target = d.features if self.encoder.encode is None else self.encoder.encode(d.z0)  # (N, T, D)
        assert target is not None, "the trainer reads stored features where `reads_features` asks for them"
        term = feature_error(self.head(feats[self.block]).float(), target.float(), "cosine").mean(dim=0)
        return term, {"feature_norm": token_norm(feats[self.block]), "target_norm": token_norm(target)}

    def cost(self, n: int) -> dict[str, int]:
        return {"head": n, "teacher": 0 if self.reads_features else n}


def _stages(config: RunConfig) -> list[Stage]:
    repa = config.section(Repa)

    def guide(student: Backbone, encoder: Features) -> list[Guidance]:
        return [RepaGuidance(student, encoder, repa)]

    return [Stage("repa", config.train.steps, guide, (Repa,), encoder=EncoderSpec(repa.encoder))]


REPA = MethodSpec("repa", "REPA", _stages, (Repa,))
