"""LayerSync (Haghighi et al., 2510.12581): a shallow block follows a deeper one of the same forward pass.

    L = L_flow + lambda mean (1 - cos(h_s, stop_gradient(h_k)))                             mean over N and T, cos over D

No head, no teacher, no second pass. The published loss is -cos, the same but for a constant.
Shape legend: N batch, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from selftrans.methods.objective import Report, feature_error, token_norm
from selftrans.types import Backbone, Draw


@dataclass(frozen=True)
class LayerSync:
    """Alignment of a shallow block with a deeper one of the same pass."""

    block: int | None = None
    """s, the block that follows (1-based); None: 0.3 of the depth (8 of 28, as released)"""
    target_block: int | None = None
    """k, the deeper block it follows; None: four sevenths of the depth (16 of 28, as released)"""
    weight: float = 0.2
    """lambda"""
    until_step: int | None = None
    """the term ends here (HASTE); None: never"""


class LayerSyncGuidance(nn.Module):
    """A shallow block of the student follows a deeper one, which gets no gradient from it."""

    name: str = "layersync"
    taps: tuple[int, ...]

    def __init__(self, student: Backbone, config: LayerSync) -> None:
        super().__init__()
        self.weight, self.until_step = config.weight, config.until_step
        self.block = max(1, round(0.3 * student.depth)) if config.block is None else config.block
        self.target = max(1, round(student.depth * 4 / 7)) if config.target_block is None else config.target_block
        self.taps = (self.block, self.target)
        if self.block >= self.target:
            raise ValueError(f"layersync.block {self.block} must be below layersync.target_block {self.target}")

    def forward(self, d: Draw, feats: dict[int, Tensor]) -> tuple[Tensor, Report]:
        shallow, deep = feats[self.block].float(), feats[self.target].detach().float()  # (N, T, D)
        term = feature_error(shallow, deep, "cosine").mean(dim=0)
        return term, {"feature_norm": token_norm(shallow), "target_norm": token_norm(deep)}

    def cost(self, n: int) -> dict[str, int]:
        return {"head": 0, "teacher": 0}
