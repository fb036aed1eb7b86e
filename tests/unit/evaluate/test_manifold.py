"""Precision, recall and authenticity by hand; test_metrics compares the first two with torch-fidelity."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

from selftrans.evaluate import manifold
from selftrans.evaluate.manifold import manifolds


def test_precision_and_recall_of_points_on_a_line() -> None:
    # With k = 1 a point's ball reaches to its neighbour: reference balls are [-1, 1], [0, 2] and [7, 13]
    reference = np.array([[0.0], [1.0], [10.0], [13.0]])
    samples = np.array([[2.0], [2.5], [9.0], [40.0]])
    # reach of the reference: 1, 1, 3, 3; inside: 2 (from 1), 9 (from 10). 2.5 and 40 are not.
    # reach of the samples: 0.5, 0.5, 6.5, 31
    precision, recall, _ = manifolds(samples, reference, neighbours=1)
    assert precision == 2 / 4
    # balls of samples: [1.5, 2.5], [2, 3], [2.5, 15.5], [9, 71]: 10 and 13 lie inside, 0 and 1 do not
    assert recall == 2 / 4


def test_precision_and_recall_drop_for_missing_modes() -> None:
    rng = np.random.default_rng(0)
    both = np.concatenate([rng.normal(size=(60, 2)), rng.normal(size=(60, 2)) + 50])
    assert manifolds(both[:60], both)[:2] == (1.0, 0.5)  # half of the reference is not covered
    assert manifolds(both, both[:60])[:2] == (0.5, 1.0)  # half of the samples are not like the reference
    assert manifolds(both, both)[:2] == (1.0, 1.0)


def test_blocks_do_not_change_the_result() -> None:
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(300, 12)), rng.normal(size=(260, 12)) * 1.1 + 0.3
    assert len({manifolds(a, b, block=block) for block in (1, 7, 64, 10_000)}) == 1
    few = manifolds(a[:3], b)
    assert few[:2] == (None, None) and few.authenticity is not None  # too few for 3 neighbours


def test_authenticity_of_points_on_a_line() -> None:
    # the nearest other points of the reference are 1, 1, 3 and 3 away, the samples 1 (from 1), 1.5 (from 1), 1 and 27
    reference = np.array([[0.0], [1.0], [10.0], [13.0]])
    assert manifolds(np.array([[2.0], [2.5], [9.0], [40.0]]), reference).authenticity == 2 / 4
    assert manifolds(reference, reference).authenticity == 0.0
    assert manifolds(reference, reference[:1]) == manifolds(reference[:0], reference) == (None, None, None)


def test_authenticity_is_that_of_dgm_eval() -> None:
    """Its algorithm, with scipy's distances; a third of the samples are the reference with a little noise."""
    rng = np.random.default_rng(3)
    reference = rng.normal(size=(200, 8))
    samples = np.concatenate([rng.normal(size=(200, 8)), reference[:100] + 0.1 * rng.normal(size=(100, 8))])
    between, within = cdist(reference, samples), cdist(reference, reference)
    np.fill_diagonal(within, 1e38)
    authentic = within.min(axis=0)[between.argmin(axis=0)] < between.min(axis=0)
    found = manifolds(samples, reference).authenticity
    assert found == authentic.mean() and 0.2 < found < 0.5
    assert {manifolds(samples, reference, block=block).authenticity for block in (1, 7, 10_000)} == {found}


def test_distances_between_the_sets_are_computed_once(monkeypatch) -> None:
    """Those of the samples, of the reference, and between them: half of what three separate measures would compute."""
    distances, passes = manifold._distances, []
    monkeypatch.setattr(
        manifold, "_distances", lambda x, y, block: passes.append((len(x), len(y))) or distances(x, y, block)
    )
    rng = np.random.default_rng(7)
    manifolds(rng.normal(size=(9, 2)), rng.normal(size=(8, 2)))
    assert sorted(passes) == [(8, 8), (9, 8), (9, 9)]
