"""SRA, self-representation alignment (Jiang et al., 2505.02831): the student follows its own moving average.

    L = L_flow + lambda mean D(P(h_s(z_t, t, y)), h_k'(z_t', t', y))        t' = max(0, t - u),  u uniform on [0, span]

h' is the moving average (EMA) of the student: a deeper block, of the same picture under the same noise, at an earlier time.
Both see the same, perhaps dropped, condition. Shape legend: N batch, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from selftrans.flow import LINEAR, PATHS, Path, interpolate
from selftrans.methods.guidance import Frozen, Guidance, Report, check_term, feature_error, projector, token_norm
from selftrans.methods.spec import MethodSpec, single_stage
from selftrans.sections import Section, checked, setting
from selftrans.types import Backbone, Draw


@dataclass(frozen=True)
class SRA(Section):
    """Alignment with a deeper block of the student's own moving average, at an earlier time."""

    key = "sra"

    block: int | None = None
    """s, the student's block (1-based); None: 0.3 of its depth (4 of 12 and 8 of 28, as released)"""
    target_block: int | None = None
    """k, the moving average's block; None: 0.7 of its depth (8 of 12 and 20 of 28, as released)"""
    span: float = 0.2
    """the moving average sees time t - u, u uniform on [0, span]"""
    distance: Literal["cosine", "smooth_l1"] = "cosine"
    """cosine: 1 - cos per token, what its authors advise; smooth_l1 (beta 0.05): the paper's, grows with the features"""
    weight: float = setting(0.5, resume="consent")
    """lambda"""
    until_step: int | None = None
    """the term ends here (HASTE); None: never"""
    head_width: int = 2048
    """hidden width of the head P"""

    def check(self) -> None:
        check_term(self, self.weight, self.head_width)
        if not 0 <= self.span <= 1:
            raise ValueError(f"sra.span {self.span} must be in [0, 1]")


class SRAGuidance(Guidance):
    """A block of the student follows a deeper block of its moving average, which `watch` receives."""

    name = "sra"

    def __init__(self, student: Backbone, config: SRA, path: Path = LINEAR) -> None:
        config = checked(config, SRA)
        block = max(1, round(0.3 * student.depth)) if config.block is None else config.block
        target = max(1, round(0.7 * student.depth)) if config.target_block is None else config.target_block
        if not 1 <= target <= student.depth:
            raise ValueError(f"sra.target_block {target} is outside the student's 1..{student.depth}")
        super().__init__(config.weight, (block,), until_step=config.until_step)
        self.config, self.path, self.block, self.target = config, path, block, target
        self.head = projector(student.width, student.width, config.head_width)

    def watch(self, average: Backbone) -> None:
        """Take the moving average as teacher. It is not truncated, because it is sampled, too."""
        self.teacher = Frozen.live(average, self.target)

    def forward(self, d: Draw, feats: dict[int, Tensor]) -> tuple[Tensor, Report]:
        if self.teacher is None:
            raise ValueError("SRA follows the student's moving average: hand it over by Objective.watch(average)")
        prediction = self.head(feats[self.block]).float()  # (N, T, D)
        earlier = (d.t - self.config.span * torch.rand_like(d.t)).clamp(min=0)  # (N,)
        zt, _ = interpolate(self.path, d.z0, d.noise, earlier)
        target = self.teacher(zt, earlier, d.dropped)[0].float()
        if self.config.distance == "cosine":
            term = feature_error(prediction, target, "cosine").mean(dim=0)
        else:
            term = F.smooth_l1_loss(prediction, target, beta=0.05)
        return term, {"feature_norm": token_norm(feats[self.block]), "target_norm": token_norm(target)}

    def cost(self, n: int) -> dict[str, int]:
        return {"head": n, "teacher": n}


SRA_METHOD = MethodSpec(
    "sra",
    "SRA",
    single_stage(SRA, lambda student, run: SRAGuidance(student, run.section(SRA), PATHS[run.train.path])),
    (SRA,),
)
