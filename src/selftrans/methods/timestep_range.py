"""The range of t in which a guidance acts: which samples it computes, and the weight of each in the loss.

Shape legend: N batch, M samples that are computed.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from selftrans.flow import Path, Times
from selftrans.types import Draw

RANGE_MODES = ("select", "scale")


class Gate(NamedTuple):
    """Which samples a guidance computes, and the weight of each sample's error in the term."""

    rows: Tensor | None  #: (M,) positions in the batch; None = all, in order
    gain: Tensor  #: (M,) the term is sum(gain * per-sample error)

    def take(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x[self.rows]

    def mean(self, error: Tensor) -> Tensor:
        """Term of a per-sample error (M,)."""
        return (self.gain * error).sum(dim=0)


@dataclass(frozen=True)
class TimestepRange:
    """The range [a, b] and its mode, which give the weight of a sample at time t in the mean over the batch.

    Without a range every sample has the weight 1 / N. `select`: 1 / N if a <= t <= b, else 0, and only the samples inside are
    computed. `scale`: (fraction of the batch inside [a, b]) / N for every sample, which is what the authors' released code
    computes (a mask of shape (N, 1, 1, 1) times a loss of shape (N,)).
    ValueError unless the range is increasing within [0, 1] and the mode is known.
    """

    span: tuple[float, float] | None  #: [a, b], closed; None: no range
    mode: str  #: one of `RANGE_MODES`
    #: of the times, on average, in the range, where a draw does not say it; None: b - a, as of uniform times
    share: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in RANGE_MODES:
            raise ValueError(f"range_mode '{self.mode}' is unknown; choose one of {', '.join(RANGE_MODES)}")
        if self.span is not None and not 0 <= self.span[0] < self.span[1] <= 1:
            raise ValueError(f"timestep_range {self.span} must be two increasing numbers in [0, 1], or None")

    def under(self, times: Times, path: Path) -> TimestepRange:
        """The same range where times are drawn in this way."""
        return self if self.span is None else dataclasses.replace(self, share=times.share(self.span, path))

    @property
    def selects(self) -> bool:
        """Whether only the samples inside the range are computed."""
        return self.span is not None and self.mode == "select"

    def counts(self, t: Tensor) -> Tensor:
        """(N,) bool: the samples at times t (N,) that contribute to the term."""
        return self._inside(t) if self.selects else torch.ones_like(t, dtype=torch.bool)

    def computed(self, n: int) -> int:
        """How many samples of a batch of n are computed.

        With `select` it is ceil(n share), at least one: as many as can lie in [a, b] of systematic times. Of independent times
        about as many lie inside. Where n share is a whole number, one more systematic time lies inside only if two times are
        exactly a and b, about once in millions of steps; that sample is then left out.
        """
        return self._most(n, self.share) if self.selects else n

    def _most(self, n: int, share: float | None) -> int:
        """The samples inside, of n whose times have this share in the range."""
        assert self.span is not None
        a, b = self.span
        return min(n, max(1, math.ceil(n * (b - a if share is None else share) - 1e-6)))

    def gate(self, d: Draw) -> Gate:
        """The samples of a draw that are computed, and their weights."""
        n = d.t.shape[0]
        if self.span is None:
            return Gate(None, torch.full_like(d.t, 1 / n))
        inside = self._inside(d.t)
        if self.mode == "scale":
            return Gate(None, (inside.float().mean(dim=0) / n).expand(n))
        # systematic times: a static shape, no host synchronisation; at most one row is padding, and its gain is zero.
        # Others: at least one row, so that heads always take part in the backward pass of every process
        share = self.share if d.share is None else d.share(self.span)
        m = self._most(n, share) if d.even else max(1, int(inside.sum(dim=0)))
        rows = torch.argsort(inside.int(), dim=0, descending=True, stable=True)[:m]
        return Gate(rows, inside[rows].float() / n)

    def _inside(self, t: Tensor) -> Tensor:
        assert self.span is not None
        a, b = self.span
        return (a <= t) & (t <= b)


EVERYWHERE = TimestepRange(None, "select")
