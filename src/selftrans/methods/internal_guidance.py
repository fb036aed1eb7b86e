"""Internal Guidance (Zhou et al., 2512.24176): a second output after a middle block learns the velocity, too.

    L = L_flow + lambda mean | W LN(h_k) - patchify(v) |²                                   mean over N, T and cells

At sampling, `--early-guidance w` extrapolates from the second output's velocity to the last block's, v_k + w (v - v_k): the
weaker prediction of autoguidance, without a second model or pass. The output is therefore a part of the model
(`Backbone.add_early`), not a head of the guidance: it is averaged with the model, and every weights file of the model has it.

The released code modulates it by time and label, as the last layer; here both reach it through the tokens alone.
Shape legend: N batch, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from selftrans.methods.guidance import Guidance, Report, check_term, token_norm
from selftrans.methods.spec import MethodSpec, section_stage
from selftrans.sections import Section, setting
from selftrans.types import Backbone, Conditions, Draw

if TYPE_CHECKING:
    from selftrans.config import RunConfig


@dataclass(frozen=True)
class Internal(Section):
    """The flow loss of a second output after block model.early_block (None: a third of the depth, 8 at most)."""

    key = "internal_guidance"

    weight: float = setting(0.5, resume="consent")
    """lambda"""

    def check(self) -> None:
        check_term(self, self.weight)


class InternalGuidance(Guidance):
    """The student's second output predicts the velocity. A student without a second output gets one."""

    name = "early"
    trains_early = True

    def __init__(self, student: Backbone, config: Internal) -> None:
        if student.early is None:
            student.add_early(default_block(student.depth))
        super().__init__(config.weight, (student.early_block,))
        self.predict, self.patchify = student.early_cells, student.patchify  # methods: the output stays the student's

    def forward(self, d: Draw, feats: dict[int, Tensor]) -> tuple[Tensor, Report]:
        tokens = feats[self.taps[0]]  # (N, T, D)
        error = (self.predict(tokens).float() - self.patchify(d.v)).square().mean(dim=(0, 1, 2))
        return error, {"feature_norm": token_norm(tokens)}

    def cost(self, n: int) -> dict[str, int]:
        return {"head": n, "teacher": 0}


def default_block(depth: int) -> int:
    """8 of 28, as released; a third of the depth in smaller models."""
    return max(1, min(8, depth // 3))


def _settle(config: RunConfig, conditions: Conditions) -> RunConfig:
    """Set model.early_block, so that weights files say which block the second output reads. ValueError where it is unknown."""
    if config.model.early_block is not None:
        return config
    if not config.model.blocks():
        raise ValueError("the model does not say how many blocks it has; give --model.early-block")
    return config.override({"model.early_block": default_block(config.model.blocks())})


INTERNAL_GUIDANCE = MethodSpec(
    "internal_guidance", "Internal Guidance", section_stage(Internal, InternalGuidance), (Internal,), _settle
)
