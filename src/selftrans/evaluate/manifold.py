"""Precision and recall: how much of one set of features lies in the manifold of another. Authenticity: whether it copies it.

Shape legend: n, m images, F features.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from selftrans.messages import plural

NEIGHBOURS = 3  #: k of the radii, as published


def precision_recall(
    samples: np.ndarray, reference: np.ndarray, *, neighbours: int = NEIGHBOURS, block: int = 1024
) -> tuple[float, float]:
    """Fraction of samples (n, F) in the reference's manifold, and of the reference (m, F) in that of the samples.

    A manifold is the union of balls around its points; the radius is the distance to the k-th nearest neighbour
    (Kynkäänniemi et al., 1904.06991, eq. 1-2). Distances are computed `block` rows at a time: memory grows as
    block x max(n, m). Raises ValueError unless each set has more than `neighbours` images.
    """
    same_length(samples, reference)
    if min(len(samples), len(reference)) <= neighbours:
        sizes = f"{plural(len(samples), 'sample')} and {plural(len(reference), 'reference image')}"
        raise ValueError(
            f"{sizes} are too few for {plural(neighbours, 'neighbour')}; give more than {neighbours} of each"
        )
    x, y = samples.astype(np.float64), reference.astype(np.float64)
    precision = _covered(x, y, _radii(y, neighbours, block), block)
    recall = _covered(y, x, _radii(x, neighbours, block), block)
    return precision, recall


def authenticity(samples: np.ndarray, reference: np.ndarray, *, block: int = 1024) -> float:
    """Fraction of samples (n, F) that are farther from their nearest reference (m, F) than that one is from its nearest other.

    AuthPct of Alaa et al. (2102.08921) as dgm-eval (2306.04675) computes it, from 0 to 1. Of copies of the reference it is 0,
    of independent images of the same distribution it depends on the dimensions (Gaussians of 2 to 50: about 0.4 to 0.8).
    Raises ValueError for less than two reference images.
    """
    same_length(samples, reference)
    if len(reference) < 2 or not len(samples):
        sizes = f"{plural(len(samples), 'sample')} and {plural(len(reference), 'reference image')}"
        raise ValueError(f"{sizes} are too few for authenticity; give one sample and two reference images at least")
    x, y = samples.astype(np.float64), reference.astype(np.float64)
    apart = _radii(y, 1, block)
    authentic = 0
    for _, distances in _distances(x, y, block):
        nearest = distances.argmin(axis=-1)
        authentic += int((distances.min(axis=-1) > apart[nearest]).sum())
    return authentic / len(x)


def _distances(x: np.ndarray, y: np.ndarray, block: int) -> Iterator[tuple[int, np.ndarray]]:
    """First row and squared distances (block, m) of each block of x (n, F) to all of y (m, F)."""
    norms = (y * y).sum(axis=-1)
    for start in range(0, len(x), block):
        rows = x[start : start + block]
        yield start, np.maximum((rows * rows).sum(axis=-1)[:, None] + norms[None, :] - 2 * rows @ y.T, 0.0)


def _radii(x: np.ndarray, neighbours: int, block: int) -> np.ndarray:
    """Squared distance (n,) of each point to its k-th nearest other point."""
    radii = np.empty(len(x))
    for start, distances in _distances(x, x, block):
        own = np.arange(len(distances))
        distances[own, start + own] = np.inf
        radii[start : start + len(distances)] = np.partition(distances, neighbours - 1, axis=-1)[:, neighbours - 1]
    return radii


def _covered(x: np.ndarray, centres: np.ndarray, radii: np.ndarray, block: int) -> float:
    """Fraction of points x (n, F) within the squared radius `radii` (m,) of one of `centres` (m, F)."""
    return sum(int((d <= radii).any(axis=-1).sum()) for _, d in _distances(x, centres, block)) / len(x)


def same_length(a: np.ndarray, b: np.ndarray) -> None:
    """ValueError unless features (n, F) and (m, F) have one length."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features {a.shape} and {b.shape} cannot be compared; use one extractor for both")
