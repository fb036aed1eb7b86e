"""Linear probes of a guided target, with and without the label that the teacher was given.

f_c and f_g are computed with a condition. With the picture's own label a probe can read it from the condition itself, without
looking at the picture; with a label drawn at random it cannot, and where a probe fitted with own labels is shown features with
another label, its answer says which of the two it reads.
Shape legend: N pictures, D width of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selftrans.evaluate.probes import PROBES, class_guesses


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
