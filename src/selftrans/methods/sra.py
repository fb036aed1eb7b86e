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
from torch import Tensor, nn

from selftrans.flow import LINEAR, Path, interpolate
from selftrans.methods.objective import Frozen, Report, feature_error, projector, token_norm
from selftrans.types import Backbone, Draw


@dataclass(frozen=True)
class SRA:
    """Alignment with a deeper block of the student's own moving average, at an earlier time."""

    block: int | None = None
    """s, the student's block (1-based); None: 0.3 of its depth (4 of 12 and 8 of 28, as released)"""
    target_block: int | None = None
    """k, the moving average's block; None: 0.7 of its depth (8 of 12 and 20 of 28, as released)"""
    span: float = 0.2
    """the moving average sees time t - u, u uniform on [0, span]"""
    distance: Literal["cosine", "smooth_l1"] = "cosine"
    """cosine: 1 - cos per token, what its authors advise; smooth_l1 (beta 0.05): the paper's, grows with the features"""
    weight: float = 0.5
    """lambda"""
    until_step: int | None = None
    """the term ends here (HASTE); None: never"""
    head_width: int = 2048
    """hidden width of the head P"""


class SRAGuidance(nn.Module):
    """The student's block follows a deeper one of its moving average, which the trainer hands over by `watch`."""

    name: str = "sra"
    taps: tuple[int, ...]
    teacher: Frozen | None = None

    def __init__(self, student: Backbone, config: SRA, path: Path = LINEAR) -> None:
        super().__init__()
        if not 0 <= config.span <= 1:
            raise ValueError(f"sra.span {config.span} must be in [0, 1]")
        self.config, self.path, self.weight, self.until_step = config, path, config.weight, config.until_step
        self.block = max(1, round(0.3 * student.depth)) if config.block is None else config.block
        self.target = max(1, round(0.7 * student.depth)) if config.target_block is None else config.target_block
        self.taps = (self.block,)
        if not 1 <= self.target <= student.depth:
            raise ValueError(f"sra.target_block {self.target} is outside the student's 1..{student.depth}")
        self.head = projector(student.width, student.width, config.head_width)

    def watch(self, average: Backbone) -> None:
        """Take the moving average as teacher: whole, as it is not ours to cut."""
        self.teacher = Frozen(average, self.target, cut=False)

    def forward(self, d: Draw, feats: dict[int, Tensor]) -> tuple[Tensor, Report]:
        if self.teacher is None:
            raise ValueError("SRA follows the student's moving average: hand it over by Objective.watch(average)")
        prediction = self.head(feats[self.block]).float()  # (N, T, D)
        earlier = (d.t - self.config.span * torch.rand_like(d.t)).clamp(min=0)  # (N,)
        zt, _ = interpolate(self.path, d.z0, d.noise, earlier)
        target = self.teacher(zt, earlier, d.dropped)[0].float() + 0.0  # an ordinary tensor of an inference tensor
        if self.config.distance == "cosine":
            term = feature_error(prediction, target, "cosine").mean(dim=0)
        else:
            term = F.smooth_l1_loss(prediction, target, beta=0.05)
        return term, {"feature_norm": token_norm(feats[self.block]), "target_norm": token_norm(target)}

    def cost(self, n: int) -> dict[str, int]:
        return {"head": n, "teacher": n}
