"""Dispersive loss (Wang & He, 2506.09027): the features of different samples are pushed apart; there is no target at all.

    L = L_flow + lambda log mean_ij exp(-|h_i - h_j|² / tau)              mean over all N² pairs of the batch, i = j as well

h_i is all of sample i's features after block s, and |.|² the mean of squares over its tokens and channels, as in the
released code: the sum would leave exp(-|.|² / tau) at zero for every pair. Only the samples of one micro-batch of a process
are compared. The defaults are the paper's; the released code has lambda 0.25 and tau 1, on the last block.
Shape legend: N batch, T tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from selftrans.methods.guidance import Guidance, Report, check_term, token_norm
from selftrans.methods.spec import MethodSpec, section_stage
from selftrans.sections import Section, setting
from selftrans.types import Backbone, Draw


@dataclass(frozen=True)
class Dispersive(Section):
    """Repulsion between the samples of a batch, on one block (the InfoNCE form with squared distances)."""

    key = "dispersive"

    block: int | None = None
    """s (1-based); None: a quarter of the depth, as published"""
    temperature: float = 0.5
    """tau"""
    weight: float = setting(0.5, resume="consent")
    """lambda"""
    until_step: int | None = None
    """the term ends here (HASTE); None: never"""

    def check(self) -> None:
        check_term(self, self.weight)
        if not self.temperature > 0:
            raise ValueError(f"dispersive.temperature must be above zero, not {self.temperature}")


class DispersiveGuidance(Guidance):
    """The dispersive loss on the features of one block of the student."""

    name = "dispersive"

    def __init__(self, student: Backbone, config: Dispersive) -> None:
        config.check()
        block = max(1, student.depth // 4) if config.block is None else config.block
        super().__init__(config.weight, (block,), until_step=config.until_step)
        self.block, self.temperature = block, config.temperature

    def forward(self, d: Draw, feats: dict[int, Tensor]) -> tuple[Tensor, Report]:
        hidden = feats[self.block].float().flatten(start_dim=1)  # (N, T D)
        n, size = hidden.shape
        pairs = -squared_distances(hidden) / (size * self.temperature)  # (N, N)
        term = torch.logsumexp(pairs.flatten(), dim=0) - 2 * math.log(n)
        return term, {"feature_norm": token_norm(feats[self.block])}


def squared_distances(x: Tensor) -> Tensor:
    """|x_i - x_j|² (N, N) of the rows of x (N, K), zero on the diagonal, from one product in float32.

    `torch.pdist` would need N² K floats in its backward pass on a GPU. The rows are centred first: what all of them have in
    common would otherwise cancel in the difference of large numbers, and float32 would lose the distances.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float() - x.float().mean(dim=0)
        product = x @ x.T
    squares = product.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2 * product).clamp_min(0)
    return distances * (1 - torch.eye(len(x), device=x.device))


DISPERSIVE = MethodSpec("dispersive", "Dispersive", section_stage(Dispersive, DispersiveGuidance), (Dispersive,))
