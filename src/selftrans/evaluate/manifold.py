"""Precision and recall: how much of one set of features lies in the manifold of another. Authenticity: whether it copies it.

Shape legend: n, m images, F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

NEIGHBOURS = 3  #: k of the radii, as published


class Manifolds(NamedTuple):
    """What the distances between samples and a reference say, each from 0 to 1; None where there are too few images for it.

    precision, recall: the fraction of samples in the reference's manifold, and of the reference in that of the samples. A
    manifold is the union of balls around its points; the radius is the distance to the k-th nearest neighbour
    (Kynkäänniemi et al., 1904.06991, eq. 1-2).
    authenticity: the fraction of samples that are farther from their nearest reference than that one is from its nearest
    other: AuthPct of Alaa et al. (2102.08921) as dgm-eval (2306.04675) computes it. Of copies of the reference it is 0, of
    independent images of the same distribution it depends on the dimensions (Gaussians of 2 to 50: about 0.4 to 0.8).
    """

    precision: float | None
    recall: float | None
    authenticity: float | None


def manifolds(
    samples: np.ndarray, reference: np.ndarray, *, neighbours: int = NEIGHBOURS, block: int = 1024
) -> Manifolds:
    """Precision, recall and authenticity of samples (n, F) to a reference (m, F).

    Precision and recall need more than `neighbours` images of each, authenticity one sample and two reference images.
    Distances are computed once, `block` rows at a time: memory grows as block x max(n, m). ValueError for features of two
    lengths.
    """
    same_length(samples, reference)
    x, y = samples.astype(np.float64), reference.astype(np.float64)
    if not len(x) or len(y) < 2:
        return Manifolds(None, None, None)
    enough = min(len(x), len(y)) > neighbours
    nearest, radii = _radii(y, (1, neighbours if enough else 1), block)
    own = _radii(x, (neighbours,), block)[0] if enough else np.zeros(len(x))
    inside, authentic, covered = 0, 0, np.zeros(len(y), dtype=bool)
    for start, distances in _distances(x, y, block):
        inside += int((distances <= radii).any(axis=-1).sum())
        covered |= (distances <= own[start : start + len(distances), None]).any(axis=0)
        authentic += int((distances.min(axis=-1) > nearest[distances.argmin(axis=-1)]).sum())
    found = Manifolds(inside / len(x), int(covered.sum()) / len(y), authentic / len(x))
    return found if enough else Manifolds(None, None, found.authenticity)


def _distances(x: np.ndarray, y: np.ndarray, block: int) -> Iterator[tuple[int, np.ndarray]]:
    """First row and squared distances (block, m) of each block of x (n, F) to all of y (m, F)."""
    norms = (y * y).sum(axis=-1)
    for start in range(0, len(x), block):
        rows = x[start : start + block]
        yield start, np.maximum((rows * rows).sum(axis=-1)[:, None] + norms[None, :] - 2 * rows @ y.T, 0.0)


def _radii(x: np.ndarray, neighbours: Sequence[int], block: int) -> np.ndarray:
    """Squared distance (K, n) of each point (n, F) to its k-th nearest other point, for each k of `neighbours` (K,)."""
    radii, ranks = np.empty((len(neighbours), len(x))), np.array(neighbours) - 1
    for start, distances in _distances(x, x, block):
        own = np.arange(len(distances))
        distances[own, start + own] = np.inf
        radii[:, start : start + len(distances)] = np.partition(distances, ranks, axis=-1)[:, ranks].T
    return radii


def same_length(a: np.ndarray, b: np.ndarray) -> None:
    """ValueError unless features (n, F) and (m, F) have one length."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features {a.shape} and {b.shape} cannot be compared; use one extractor for both")
