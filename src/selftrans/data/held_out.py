"""Samples that a run never trains on, so that its loss on them can be compared with that on samples it has learnt.

They follow from the data and the share alone, so every method, seed and continued run holds out the same ones.
Shape legend: N samples of the data, H of them held out.
"""

from __future__ import annotations

import numpy as np

from selftrans.data.dataset import Dataset

#: seed of the order in which samples are chosen; it must stay, since a run that is continued holds out the same ones
SHUFFLE = 20_260


def held_out_rows(dataset: Dataset, share: float) -> np.ndarray | None:
    """(H,) the rows that are held out, in order: about this share of all, at least one; None where the share is 0.

    Each class gives about its share. One sample of each class (in each bucket) always stays, so classes of one sample lose
    none. ValueError where no class has a second one.
    """
    if not share:
        return None
    groups = _groups(dataset)
    order = _by_group(np.arange(len(groups)), groups)
    candidates = order[1:][groups[order[1:]] == groups[order[:-1]]]  # all but the first of each group
    if not len(candidates):
        noun, labelled = dataset.manifest.noun, dataset.manifest.num_classes > 1
        where = "no class has a second" if labelled else f"{dataset.path} has no second"
        raise ValueError(f"data.held_out {share:g} leaves nothing to train on: {where} {noun}; leave it out")
    count = min(max(1, round(share * len(groups))), len(candidates))
    return np.sort(_spread(candidates, count))


def measured_rows(dataset: Dataset, held_out: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(held-out rows, rows that are trained on) to be measured: `count` of each, spread over the classes.

    Where there are fewer, they are repeated, and each class has the weight that it has among them.
    """
    groups = _groups(dataset)
    trained = np.delete(np.arange(len(groups)), held_out)
    held, seen = (_spread(_by_group(rows, groups), count) for rows in (held_out, trained))
    return held, seen


def _groups(dataset: Dataset) -> np.ndarray:
    """(N,) a number of each row, equal for rows of one class in one bucket."""
    part = np.repeat(np.arange(len(dataset.parts)), dataset.parts)
    return part * max(1, dataset.manifest.num_classes) + dataset.labels


def _by_group(rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The rows shuffled, and then sorted by group."""
    shuffled = np.random.default_rng(SHUFFLE).permutation(rows)
    return shuffled[np.argsort(groups[shuffled], kind="stable")]


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
    """`count` of these rows at equal distances; of fewer, each as often as any other, or once more."""
    return rows[(2 * np.arange(count) + 1) * len(rows) // (2 * count)]
