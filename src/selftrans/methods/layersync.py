"""LayerSync (Haghighi et al., 2510.12581): a shallow block follows a deeper one of the same forward pass.

    L = L_flow + lambda mean (1 - cos(h_s, stop_gradient(h_k)))                             mean over N and T, cos over D

No head, no teacher, no second pass. The published loss is -cos, which differs by a constant.
Shape legend: N batch, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from selftrans.methods.guidance import Guidance, Report, check_term, feature_error, token_norm
from selftrans.methods.spec import MethodSpec, section_stage
from selftrans.sections import Section, setting
from selftrans.types import Backbone, Draw


@dataclass(frozen=True)
class LayerSync(Section):
    """Alignment of a shallow block with a deeper one of the same pass."""

    key = "layersync"

    block: int | None = None
    """s, the block that follows (1-based); None: 0.3 of the depth (8 of 28, as released)"""
    target_block: int | None = None
    """k, the deeper block it follows; None: four sevenths of the depth (16 of 28, as released)"""
    weight: float = setting(0.2, resume="consent")
    """lambda"""
    until_step: int | None = None
    """the term ends here (HASTE); None: never"""

    def check(self) -> None:
        check_term(self, self.weight)


class LayerSyncGuidance(Guidance):
    """A shallow block of the student follows a deeper one, which gets no gradient from it."""

    name = "layersync"

    def __init__(self, student: Backbone, config: LayerSync) -> None:
        block = max(1, round(0.3 * student.depth)) if config.block is None else config.block
        target = max(1, round(student.depth * 4 / 7)) if config.target_block is None else config.target_block
        if block >= target:
            raise ValueError(f"layersync.block {block} must be below layersync.target_block {target}")
        super().__init__(config.weight, (block, target), until_step=config.until_step)
        self.block, self.target = block, target

    def forward(self, d: Draw, feats: dict[int, Tensor]) -> tuple[Tensor, Report]:
        shallow, deep = feats[self.block].float(), feats[self.target].detach().float()  # (N, T, D)
        term = feature_error(shallow, deep, "cosine").mean(dim=0)
        return term, {"feature_norm": token_norm(shallow), "target_norm": token_norm(deep)}


LAYERSYNC = MethodSpec("layersync", "LayerSync", section_stage(LayerSync, LayerSyncGuidance), (LayerSync,))
