"""Precision, recall and authenticity by hand; test_metrics compares the first two with torch-fidelity."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from selftrans.evaluate.manifold import authenticity, precision_recall


def test_precision_and_recall_of_points_on_a_line() -> None:
    # With k = 1 a point's ball reaches to its neighbour: reference balls are [-1, 1], [0, 2] and [7, 13]
    reference = np.array([[0.0], [1.0], [10.0], [13.0]])
    samples = np.array([[2.0], [2.5], [9.0], [40.0]])
    # reach of the reference: 1, 1, 3, 3; inside: 2 (from 1), 9 (from 10). 2.5 and 40 are not.
    # reach of the samples: 0.5, 0.5, 6.5, 31
    precision, recall = precision_recall(samples, reference, neighbours=1)
    assert precision == 2 / 4
    # balls of samples: [1.5, 2.5], [2, 3], [2.5, 15.5], [9, 71]: 10 and 13 lie inside, 0 and 1 do not
    assert recall == 2 / 4


def test_precision_and_recall_drop_for_missing_modes() -> None:
    rng = np.random.default_rng(0)
    both = np.concatenate([rng.normal(size=(60, 2)), rng.normal(size=(60, 2)) + 50])
    assert precision_recall(both[:60], both) == (1.0, 0.5)  # half of the reference is not covered
    assert precision_recall(both, both[:60]) == (0.5, 1.0)  # half of the samples are not like the reference
    assert precision_recall(both, both) == (1.0, 1.0)


def test_blocks_do_not_change_precision_and_recall() -> None:
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(300, 12)), rng.normal(size=(260, 12)) * 1.1 + 0.3
    assert len({precision_recall(a, b, block=block) for block in (1, 7, 64, 10_000)}) == 1
    with pytest.raises(ValueError, match="too few for 3 neighbours"):
        precision_recall(a[:3], b)


def test_authenticity_of_points_on_a_line() -> None:
    # the nearest other points of the reference are 1, 1, 3 and 3 away, the samples 1 (from 1), 1.5 (from 1), 1 and 27
    reference = np.array([[0.0], [1.0], [10.0], [13.0]])
    assert authenticity(np.array([[2.0], [2.5], [9.0], [40.0]]), reference) == 2 / 4
    assert authenticity(reference, reference) == 0.0
    with pytest.raises(ValueError, match="4 samples and 1 reference image are too few for authenticity"):
        authenticity(reference, reference[:1])


def test_authenticity_is_that_of_dgm_eval() -> None:
    """Its algorithm, with scipy's distances; a third of the samples are the reference with a little noise."""
    rng = np.random.default_rng(3)
    reference = rng.normal(size=(200, 8))
    samples = np.concatenate([rng.normal(size=(200, 8)), reference[:100] + 0.1 * rng.normal(size=(100, 8))])
    between, within = cdist(reference, samples), cdist(reference, reference)
    np.fill_diagonal(within, 1e38)
    authentic = within.min(axis=0)[between.argmin(axis=0)] < between.min(axis=0)
    found = authenticity(samples, reference)
    assert found == authentic.mean() and 0.2 < found < 0.5
    assert {authenticity(samples, reference, block=block) for block in (1, 7, 10_000)} == {found}
