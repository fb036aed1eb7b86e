"""Dispersive loss (Wang & He, 2506.09027): the features of different samples are pushed apart; there is no target at all.

    L = L_flow + lambda log mean_ij exp(-|h_i - h_j|² / tau)              mean over all N² pairs of the batch, i = j as well

h_i is all of sample i's features after block s, and |.|² the mean of squares over its tokens and channels, as in the
released code: the sum would leave exp(-|.|² / tau) at zero for every pair. Each process compares its own samples.
The defaults are the paper's; the released code has lambda 0.25 and tau 1, on the last block.
Shape legend: N batch, T tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selftrans.methods.objective import Report, token_norm
from selftrans.types import Backbone, Draw


@dataclass(frozen=True)
class Dispersive:
    """Repulsion between the samples of a batch, on one block (the InfoNCE form with squared distances)."""

    block: int | None = None
    """s (1-based); None: a quarter of the depth, as published"""
    temperature: float = 0.5
    """tau"""
    weight: float = 0.5
    """lambda"""
    until_step: int | None = None
    """the term ends here (HASTE); None: never"""


class DispersiveGuidance(nn.Module):
    """One block of the student keeps the samples of a batch apart."""

    name: str = "dispersive"
    taps: tuple[int, ...]

    def __init__(self, student: Backbone, config: Dispersive) -> None:
        super().__init__()
        if not config.temperature > 0:
            raise ValueError(f"dispersive.temperature must be above zero, not {config.temperature}")
        self.temperature, self.weight, self.until_step = config.temperature, config.weight, config.until_step
        self.block = max(1, student.depth // 4) if config.block is None else config.block
        self.taps = (self.block,)

    def forward(self, d: Draw, feats: dict[int, Tensor]) -> tuple[Tensor, Report]:
        hidden = feats[self.block].float().flatten(start_dim=1)  # (N, T D)
        n, size = hidden.shape
        pairs = -squared_distances(hidden) / (size * self.temperature)  # (N, N)
        term = torch.logsumexp(pairs.flatten(), dim=0) - 2 * math.log(n)
        return term, {"feature_norm": token_norm(feats[self.block])}

    def cost(self, n: int) -> dict[str, int]:
        return {"head": 0, "teacher": 0}


def squared_distances(x: Tensor) -> Tensor:
    """|x_i - x_j|² (N, N) of the rows of x (N, K), zero on the diagonal, from one product in float32.

    `torch.pdist` would need N² K floats in its backward pass on a GPU. Centred rows keep the digits that count.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float() - x.float().mean(dim=0)
        product = x @ x.T
    squares = product.diagonal()
    apart = (squares[:, None] + squares[None, :] - 2 * product).clamp_min(0)
    return apart * (1 - torch.eye(len(x), device=x.device))
