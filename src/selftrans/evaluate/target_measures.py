"""Parts of a guided target, batch by batch ⇒ what each block's target consists of, in numbers.

Shape legend: N pictures, n of a batch, M held-out ones, T tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftrans.evaluate.target_probes import Pooled, probe_all
from selftrans.evaluate.target_share import PREDICTORS, Design, Fits, share

DIFFERENCE = "difference"  #: among the strengths of f_g: f_c - f_u alone, the limit of large w


class Parts(NamedTuple):
    """Features of some pictures at one timestep, each block -> (n, T, D), float32 on the CPU."""

    rows: Tensor  #: (n,) which pictures
    time: int  #: index of the timestep; pictures are probed at the first
    u: dict[int, Tensor]  #: f_u, or the features of an encoder
    own: dict[int, Tensor] | None  #: f_c - f_u with the picture's own condition; None: there is no condition
    drawn: dict[int, Tensor] | None = None  #: the same with a label drawn at random, at the first timestep


@dataclass(frozen=True)
class Plan:
    """What is measured on which pictures."""

    fitted: Tensor  #: (N,) bool: pictures that tables and probes are fitted on; the others are held out
    times: int  #: number of timesteps
    scales: tuple[float, ...]  #: w, without 0; empty: there is no condition
    design: Design | None  #: what the condition's table or regression is fitted on; None: there is none
    labels: Tensor | None = None  #: (N,) for the probes; None: no probes
    others: Tensor | None = None  #: (N,) labels drawn at random


class BlockSums:
    """Sums over the pictures for one block; `report` turns them into numbers, and fits the probes, which takes time."""

    def __init__(self, plan: Plan, width: int) -> None:
        self.plan, self.fits, self.solved = plan, Fits(plan.times, plan.design), False
        held, n = int((~plan.fitted).sum()), len(plan.fitted)
        self.errors = {name: torch.zeros(held, 3, dtype=torch.float64) for name in PREDICTORS}
        self.squares = torch.zeros(2, dtype=torch.float64)  # of f_u and of f_c - f_u, summed
        self.norms = torch.zeros(1 + len(plan.scales), dtype=torch.float64)  # of tokens of f_u and f_g, summed
        self.tokens = 0
        self.place = torch.cumsum(~plan.fitted, dim=0) - 1  # index of a held-out picture among the held-out ones
        self.pooled = {name: torch.zeros(n, width) for name in ("u", "own", "drawn")}

    def take(self, rows: Tensor, time: int, u: Tensor, own: Tensor | None, drawn: Tensor | None) -> None:
        """Features (n, T, D) of pictures that are all fitted or all held out; held-out ones follow the fitted ones."""
        d = torch.zeros_like(u) if own is None else own
        both = torch.stack([u, d]).flatten(start_dim=2)  # (2, n, T D)
        if time == 0:
            for name, part in (("u", u), ("own", d), ("drawn", drawn)):
                if part is not None:
                    self.pooled[name][rows] = part.mean(dim=1)
        if self.plan.fitted[rows[0]]:
            self.fits.add(rows, time, both)
            return
        if not self.solved:
            self.fits.solve()
            self.solved = True
        for name, errors in self.fits.errors(rows, time, both).items():
            self.errors[name][self.place[rows]] += errors
        self.squares += both.square().sum(dim=2).sum(dim=1, dtype=torch.float64)
        self.norms += torch.stack([(u + w * d).norm(dim=-1).sum() for w in (0.0, *self.plan.scales)])
        self.tokens += u.shape[0] * u.shape[1]

    def report(self) -> dict[str, Any]:
        """What was measured, as json has it.

        sizes: token_norm, mean Euclidean norm of a token of f_g for each strength ("0" is f_u); rms_ratio, root of the mean
        square of f_c - f_u over that of f_u; spread_ratio, the same after the mean over pictures and times was subtracted.
        shares: for `time`, `condition` and `condition_time` (see `target_share.PREDICTORS`) and each strength, [1 - squared
        error / that of the mean, its standard error], None where the target does not vary; "difference" is f_c - f_u alone,
        the limit of large w. probes: see `target_probes`.
        """
        scales = self.plan.scales
        base = self.errors["mean"]
        strengths = {"0": 0.0} | {f"{w:g}": w for w in scales} | ({DIFFERENCE: None} if scales else {})
        shares = {
            name: {key: share(self.errors[name], base, w) for key, w in strengths.items()}
            for name in PREDICTORS[1:]
            if name in self.fits.weights
        }
        square, spread = (x.tolist() for x in (self.squares, base.sum(dim=0)))
        norms = (self.norms / max(1, self.tokens)).tolist()
        sizes: dict[str, Any] = {"token_norm": dict(zip(strengths, norms, strict=False))}
        if scales:
            sizes["rms_ratio"] = _root(square[1], square[0])
            sizes["spread_ratio"] = _root(spread[2], spread[0])
        return {"sizes": sizes, "shares": shares} | self._probes()

    def _probes(self) -> dict[str, Any]:
        plan = self.plan
        if plan.labels is None or plan.others is None:
            return {}
        conditional = bool(plan.scales)
        own, drawn = (self.pooled[name] if conditional else None for name in ("own", "drawn"))
        pooled = Pooled(self.pooled["u"], own, drawn, plan.labels, plan.others, plan.fitted)
        return {"probes": probe_all(pooled, plan.scales)}


def sum_target(parts: Iterable[Parts], plan: Plan) -> dict[int, BlockSums]:
    """The sums of each block, in order. One pass over `parts`.

    `parts` has every picture at every timestep; batches of fitted pictures come before those of held-out ones, none has both.
    ValueError where a part has no pictures.
    """
    if not plan.fitted.any() or plan.fitted.all():
        raise ValueError("tables need pictures to be fitted on and others that are held out; give more pictures")
    blocks: dict[int, BlockSums] = {}
    for batch in parts:
        for k, u in batch.u.items():
            if k not in blocks:
                blocks[k] = BlockSums(plan, u.shape[-1])
            own, drawn = (None if part is None else part[k] for part in (batch.own, batch.drawn))
            blocks[k].take(batch.rows, batch.time, u, own, drawn)
    return dict(sorted(blocks.items()))


def _root(part: float, whole: float) -> float | None:
    return math.sqrt(part / whole) if whole > 0 else None
