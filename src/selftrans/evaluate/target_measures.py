"""Parts of a guided target, batch by batch ⇒ what each block's target consists of, in numbers, and what linear probes read.

f_c and f_g are computed with a condition. With the picture's own label a probe can read it from the condition itself, without
looking at the picture; with a label drawn at random it cannot, and where a probe fitted with own labels is shown features with
another label, its answer says which of the two it reads.
Shape legend: N pictures, n of a batch, M held-out ones, T tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftrans.evaluate.probes import PROBES, class_guesses
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

    def __init__(self, plan: Plan, tokens: int, width: int) -> None:
        self.plan, self.fits, n = plan, Fits(plan.times, plan.design, tokens * width), len(plan.fitted)
        self.errors = {name: torch.zeros(n, 3, dtype=torch.float64) for name in PREDICTORS}  # of held-out pictures
        self.squares = torch.zeros(2, dtype=torch.float64)  # of f_u and of f_c - f_u, summed
        self.norms = torch.zeros(1 + len(plan.scales), dtype=torch.float64)  # of tokens of f_u and f_g, summed
        self.tokens = 0
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
        if not self.fits.weights:
            self.fits.solve()
        for name, errors in self.fits.errors(rows, time, both).items():
            self.errors[name][rows] += errors
        self.squares += both.square().sum(dim=2).sum(dim=1, dtype=torch.float64)
        self.norms += torch.stack([(u + w * d).norm(dim=-1).sum() for w in (0.0, *self.plan.scales)])
        self.tokens += u.shape[0] * u.shape[1]

    def report(self) -> dict[str, Any]:
        """What was measured, as json has it.

        sizes: token_norm, mean Euclidean norm of a token of f_g for each strength ("0" is f_u); rms_ratio, root of the mean
        square of f_c - f_u over that of f_u; spread_ratio, the same after the mean over pictures and times was subtracted.
        shares: for `time`, `condition` and `condition_time` (see `target_share.PREDICTORS`) and each strength, [1 - squared
        error / that of the mean, its standard error], None where the target does not vary; "difference" is f_c - f_u alone,
        the limit of large w. probes: see `probe_all`.
        """
        scales, held = self.plan.scales, ~self.plan.fitted
        base = self.errors["mean"][held]
        strengths = {"0": 0.0} | {f"{w:g}": w for w in scales} | ({DIFFERENCE: None} if scales else {})
        shares = {
            name: {key: share(self.errors[name][held], base, w) for key, w in strengths.items()}
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
        plan, pooled = self.plan, self.pooled
        if plan.labels is None or plan.others is None:
            return {}
        own, drawn = (pooled["own"], pooled["drawn"]) if plan.scales else (None, None)
        return {
            "probes": probe_all(Pooled(pooled["u"], own, drawn, plan.labels, plan.others, plan.fitted), plan.scales)
        }


def sum_target(parts: Iterable[Parts], plan: Plan) -> dict[int, BlockSums]:
    """The sums of each block, in order. One pass over `parts`.

    `parts` has every picture at every timestep; batches of fitted pictures come before those of held-out ones, none has both.
    """
    blocks: dict[int, BlockSums] = {}
    for batch in parts:
        for k, u in batch.u.items():
            if k not in blocks:
                blocks[k] = BlockSums(plan, *u.shape[1:])
            own, drawn = (None if part is None else part[k] for part in (batch.own, batch.drawn))
            blocks[k].take(batch.rows, batch.time, u, own, drawn)
    return dict(sorted(blocks.items()))


def _root(part: float, whole: float) -> float | None:
    return math.sqrt(part / whole) if whole > 0 else None


class Pooled(NamedTuple):
    """Features averaged over tokens at one timestep, with what they were computed with."""

    u: Tensor  #: (N, D) f_u, or the features of an encoder
    own: Tensor | None  #: (N, D) f_c - f_u with the picture's own label
    drawn: Tensor | None  #: (N, D) the same with a label drawn at random
    labels: Tensor  #: (N,) of the pictures
    others: Tensor  #: (N,) the labels drawn
    fitted: Tensor  #: (N,) bool, the pictures that probes are fitted on; they are tested on the rest


def probe_target(pooled: Pooled, scale: float) -> dict[str, dict[str, float | None]]:
    """What probes of f_g = f_u + w (f_c - f_u) say, for each kind of probe. All are accuracies on held-out pictures.

    own: the picture's class, from features computed with its own label (the condition leaks).
    random: the picture's class, from features computed with a label drawn uniformly, in fitting and in testing.
    rest: as `random`, after the mean of the fitted pictures with the same drawn label was subtracted: what the target says of
    the picture besides the code of the label.
    swapped_picture, swapped_condition: the probe of `own`, on held-out features computed with a drawn label that is not the
    picture's: how often it names the picture's class, and how often the label that was given. None where there are none.
    """
    assert pooled.own is not None and pooled.drawn is not None
    fit, test = pooled.fitted, ~pooled.fitted
    own, drawn = pooled.u + scale * pooled.own, pooled.u + scale * pooled.drawn
    rest = _without_means(drawn, pooled.others, fit)
    labels, others = pooled.labels[test], pooled.others[test]
    differ = labels != others
    found: dict[str, dict[str, float | None]] = {}
    for kind in PROBES:
        guesses = class_guesses(own[fit], pooled.labels[fit], torch.cat([own[test], drawn[test]]), kind=kind)
        on_own, on_drawn = guesses.cpu().chunk(2)
        unleaked = class_guesses(drawn[fit], pooled.labels[fit], drawn[test], kind=kind)
        remaining = class_guesses(rest[fit], pooled.labels[fit], rest[test], kind=kind)
        found[kind] = {
            "own": _agreement(on_own, labels),
            "random": _agreement(unleaked, labels),
            "rest": _agreement(remaining, labels),
            "swapped_picture": _agreement(on_drawn[differ], labels[differ]) if differ.any() else None,
            "swapped_condition": _agreement(on_drawn[differ], others[differ]) if differ.any() else None,
        }
    return found


def _without_means(features: Tensor, labels: Tensor, fitted: Tensor) -> Tensor:
    """Features (N, D) minus the mean of the fitted ones with the same label, or of all fitted ones where there are none."""
    rest = features - features[fitted].mean(dim=0)
    for label in torch.unique(labels[fitted]):
        rows = labels == label
        rest[rows] = features[rows] - features[rows & fitted].mean(dim=0)
    return rest


def chance(labels: Tensor, fitted: Tensor) -> float:
    """Accuracy on the held-out pictures of always naming the most frequent class of those that are fitted."""
    most = torch.mode(labels[fitted]).values
    return _agreement(most.expand(int((~fitted).sum())), labels[~fitted])


def probe_all(pooled: Pooled, scales: Sequence[float]) -> dict[str, object]:
    """f_u: accuracy on held-out pictures of each kind of probe of f_u (or of an encoder's features); f_g: `probe_target` for
    each strength, where there is a condition."""
    fit, test, u, labels = pooled.fitted, ~pooled.fitted, pooled.u, pooled.labels
    guesses = {kind: class_guesses(u[fit], labels[fit], u[test], kind=kind) for kind in PROBES}
    found: dict[str, object] = {"f_u": {kind: _agreement(each, labels[test]) for kind, each in guesses.items()}}
    if pooled.own is not None:
        found["f_g"] = {f"{scale:g}": probe_target(pooled, scale) for scale in scales}
    return found


def _agreement(guesses: Tensor, labels: Tensor) -> float:
    return (guesses.cpu() == labels.cpu()).double().mean().item()
