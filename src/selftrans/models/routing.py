"""Token routing in training: a random part of each sample's tokens skips the middle blocks (TREAD, 2501.04765, section 3).

Routed tokens leave before block `first` and return unchanged after block `last`. The blocks between compute only the other
tokens, also in attention. The routed tokens are drawn anew at every step and for every sample; sampling routes none.
Shape legend: N batch, T tokens, K tokens that are kept, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Route(NamedTuple):
    """Which blocks (1-based, both included) are skipped, by which share of the tokens."""

    share: float
    first: int
    last: int

    def kept(self, tokens: int) -> int:
        """K of T tokens."""
        return tokens - round(self.share * tokens)

    def draw(self, n: int, tokens: int, device: torch.device) -> Tensor:
        """(N, K) int64, increasing: a random choice for each sample, from torch's default generator of the device."""
        return torch.rand(n, tokens, device=device).argsort(dim=1)[:, : self.kept(tokens)].sort(dim=1).values


def chosen_route(share: float, blocks: tuple[int, int] | None, depth: int) -> Route | None:
    """The route of a model with so many blocks; None without routed tokens.

    blocks None: as published, all tokens pass the first two and the last four blocks (12 blocks: 3 to 8; 28: 3 to 24); with
    less than eight blocks the first and the last. ValueError where these are not blocks of the model, or there are none.
    """
    if not 0 <= share < 1:
        raise ValueError(f"model.route {share} must be from 0 to below 1: the share of tokens that skip blocks")
    if not share:
        return None
    first, last = blocks or ((3, depth - 4) if depth >= 8 else (2, depth - 1))
    if not 1 <= first <= last <= depth:
        remedy = "give model.route_blocks" if blocks is None else f"give two increasing blocks within 1..{depth}"
        raise ValueError(f"model.route needs blocks to skip, not {first} to {last} of {depth}; {remedy}")
    return Route(share, first, last)


class Routed:
    """The routing of one forward pass. Call `before` and `after` around every block."""

    def __init__(self, route: Route, tokens: Tensor) -> None:
        n, t, _ = tokens.shape
        if not route.kept(t):
            raise ValueError(f"model.route {route.share} leaves none of {t} tokens; choose a smaller share")
        self.route, self.kept = route, route.draw(n, t, tokens.device)
        self.left: Tensor | None = None  #: (N, T, D) before block `first`, while some are away

    @property
    def away(self) -> bool:
        """Whether some tokens are away, so that blocks compute only the kept ones."""
        return self.left is not None

    def before(self, k: int, tokens: Tensor) -> Tensor:
        """The tokens that block k computes."""
        if k == self.route.first:
            self.left = tokens
            return tokens.gather(1, self._index(tokens))
        return tokens

    def after(self, k: int, tokens: Tensor) -> Tensor:
        """The tokens that block k + 1 is given: all of them after block `last`."""
        if k == self.route.last:
            tokens, self.left = self.every(tokens), None
        return tokens

    def every(self, tokens: Tensor) -> Tensor:
        """All tokens (N, T, D): `tokens` that the blocks compute, and those that are away unchanged, with their gradient."""
        return tokens if self.left is None else self.left.to(tokens.dtype).scatter(1, self._index(tokens), tokens)

    def _index(self, tokens: Tensor) -> Tensor:
        return self.kept[:, :, None].expand(-1, -1, tokens.shape[-1])
