"""The order of an epoch in windows of shards: every row once, few shards at a time, a function of seed and epoch."""

from __future__ import annotations

import numpy as np
import pytest

from selftrans.data.windows import classes_in_a_window, window_order, window_that_fits, windows_of

COUNTS = (5, 0, 3, 7, 2, 4)


@pytest.mark.parametrize("window", [1, 2, 3, 5, 9])
def test_every_row_is_read_once_within_the_window_of_its_shard(window: int) -> None:
    order = window_order(COUNTS, window, (3, 1))
    assert np.array_equal(np.sort(order.rows), np.arange(sum(COUNTS)))
    ends, starts = np.cumsum(COUNTS), np.cumsum((0, *COUNTS))[:-1]
    begin = 0
    for number, (end, shards) in enumerate(zip(order.ends, order.shards, strict=True)):
        rows = order.rows[begin:end]
        assert {int(np.searchsorted(ends, row, side="right")) for row in rows} == set(shards)
        assert len(rows) == sum(COUNTS[k] for k in shards) and len(shards) <= window
        assert {order.window_at(position) for position in range(begin, end)} == {number}
        begin = int(end)
    assert begin == sum(COUNTS) and len(starts) == len(COUNTS)
    assert 1 not in {k for shards in order.shards for k in shards}  # it has no rows


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first, again = window_order(COUNTS, 2, (3, 1)), window_order(COUNTS, 2, (3, 1))
    assert np.array_equal(first.rows, again.rows) and first.shards == again.shards == windows_of(COUNTS, 2, (3, 1))
    for other in ((3, 2), (4, 1)):
        assert not np.array_equal(first.rows, window_order(COUNTS, 2, other).rows)


def test_rows_of_a_window_are_mixed() -> None:
    order = window_order((50, 50), 2, (0, 0))
    from_first = order.rows[:50] < 50
    assert 10 < from_first.sum() < 40  # hypergeometric, mean 25, standard deviation 2.5


def test_largest_window_leaves_three_of_them_in_the_cache() -> None:
    assert window_that_fits([10, 20, 20], 120) == 2 and window_that_fits([10, 20], 59) == 0


def test_share_of_classes_in_a_window() -> None:
    sorted_labels = np.repeat(np.arange(4), 6)
    assert classes_in_a_window(sorted_labels, (6, 6, 6, 6), 1) == pytest.approx(1 / 4)
    assert classes_in_a_window(sorted_labels, (6, 6, 6, 6), 2) == pytest.approx(1 / 2)
    assert classes_in_a_window(np.tile(np.arange(4), 6), (8, 8, 8), 1) == 1
