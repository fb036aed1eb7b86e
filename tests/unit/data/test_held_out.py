"""Which samples are held out: a share of each class, the same at every call, and none of a class of one sample."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from selftrans.data.buckets import open_data
from selftrans.data.dataset import Dataset
from selftrans.data.held_out import held_out_rows, measured_rows
from tests.support import ratios, toy


def data_of(labels: Any, parts: tuple[int, ...] | None = None, classes: int = 10) -> Any:
    labels = np.array(labels)
    manifest = SimpleNamespace(num_classes=classes, noun="picture")
    return SimpleNamespace(labels=labels, parts=parts or (len(labels),), manifest=manifest, path="data")


def rows_of(data: Any, share: float) -> np.ndarray:
    rows = held_out_rows(data, share)
    assert rows is not None and np.array_equal(rows, np.unique(rows)), "in order, each once"
    return rows


def test_each_class_of_the_digits_gives_its_share() -> None:
    data = Dataset.open(toy.digits())
    rows = rows_of(data, 0.1)
    assert len(rows) == 180 and np.array_equal(rows, held_out_rows(Dataset.open(toy.digits()), 0.1))
    given = np.bincount(data.labels[rows], minlength=10) / np.bincount(data.labels)
    assert given.min() > 0.09 and given.max() < 0.11
    assert 800 < rows.mean() < 1000, "from the whole set"
    assert held_out_rows(data, 0) is None


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99])
def test_no_class_and_no_bucket_is_emptied(share: float) -> None:
    labels = [0] * 40 + [1] + [2] * 2 + [3] * 57
    rows = rows_of(data_of(labels, parts=(41, 1, 58)), share)
    trained = np.delete(np.arange(100), rows)
    assert set(np.array(labels)[trained]) == {0, 1, 2, 3}
    assert {int(np.searchsorted((41, 42, 100), row, side="right")) for row in trained} == {0, 1, 2}
    # a sample stays of each of (part 0, class 0), (0, 1), (1, 2), (2, 2), (2, 3)
    assert len(rows) == min(round(100 * share), 95)


def test_small_classes_give_their_share_together() -> None:
    labels = np.repeat(np.arange(100), 5)
    counts = np.bincount(labels[rows_of(data_of(labels, classes=100), 0.1)], minlength=100)
    assert counts.sum() == 50 and counts.max() == 1
    assert len(rows_of(data_of([0] * 20), 0.001)) == 1, "at least one"


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [([0, 1, 2], 3, "no class has a second picture"), ([0], 0, "data has no second picture")],
)
def test_data_without_a_second_sample_are_refused(labels: list[int], classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"data.held_out 0.5 leaves nothing to train on: {message}; leave it out"):
        held_out_rows(data_of(labels, classes=classes), 0.5)


def test_measured_samples_are_of_both_kinds_and_all_classes() -> None:
    data = Dataset.open(toy.digits())
    held_out = rows_of(data, 0.5)
    for count in (30, 5000):
        held, trained = measured_rows(data, held_out, count)
        assert set(held) <= set(held_out) and not set(trained) & set(held_out)
        for rows, kind in ((held, 898), (trained, 899)):
            assert len(rows) == count and len(set(rows)) == min(count, kind)
            assert set(data.labels[rows]) == set(range(10))


def test_classes_keep_their_weight_where_samples_are_repeated() -> None:
    """Of 700 samples, which are in the order of the classes, 324 are measured twice."""
    data = data_of(np.repeat(np.arange(10), 350))
    for rows in measured_rows(data, rows_of(data, 0.2), 1024):
        times = np.unique(rows, return_counts=True)[1]
        assert len(rows) == 1024 and np.ptp(times) <= 1
        assert np.abs(np.bincount(data.labels[rows]) - 102.4).max() < 2


def test_each_bucket_gives_samples() -> None:
    rows = rows_of(open_data(ratios.shared()), 0.5)
    assert set(rows // 8) == {0, 1, 2} and len(rows) == 12
