"""Which samples a step reads, and the batch made from them."""

import numpy as np
import pytest
import torch

from selftrans.data.buckets import open_data
from selftrans.data.dataset import Dataset
from selftrans.train.batches import Loaded, Schedule, Stream, to_batch
from tests.support import captioned, ratios, toy
from tests.support.toy import quick  # noqa: F401 - a fixture


def test_every_epoch_reads_every_picture_once_for_any_number_of_processes():
    shards = Dataset.open(toy.digits())
    alone = Stream(shards, batch_size=12, accumulate=1, seed=3)
    rows = np.concatenate([alone.indices(step, 0) for step in range(2 * 1797 // 12 + 1)])
    assert sorted(rows[:1797]) == sorted(rows[1797 : 2 * 1797]) == list(range(1797))
    assert not np.array_equal(rows[:1797], rows[1797 : 2 * 1797])
    shared = [Stream(shards, batch_size=12, accumulate=3, seed=3, rank=rank, world=2) for rank in (0, 1)]
    for step in (0, 149, 150):  # the second crosses an epoch
        parts = [stream.indices(step, micro) for stream in shared for micro in range(3)]
        assert np.array_equal(np.concatenate(parts), alone.indices(step, 0))
    batches = alone.from_step(149)
    for step in (149, 150):
        read_rows, tensors = next(batches)
        assert np.array_equal(read_rows, alone.indices(step, 0))
        assert all(torch.equal(tensors[name], each) for name, each in shards.read(read_rows).items())


def test_batch_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of 6"):
        Stream(Dataset.open(toy.digits()), batch_size=8, accumulate=3, seed=0, world=2)


def test_each_read_draws_one_of_the_mirrored_copies():
    shards = Dataset.open(toy.digits())
    rows = np.repeat(7, 64)
    torch.manual_seed(0)
    z0 = to_batch(Loaded(rows, shards.read(rows)), shards, torch.device("cpu")).z0
    one, other = z0[0], z0[0].flip(dims=(-1,))
    assert not torch.equal(one, other)
    assert {int(torch.equal(z, one)) + 2 * int(torch.equal(z, other)) for z in z0} == {1, 2}


def test_each_visit_reads_one_random_caption_that_depends_on_its_place_alone():
    shards = Dataset.open(captioned.shared())
    streams = [Stream(shards, batch_size=8, accumulate=2, seed=5, rank=rank, world=2) for rank in (0, 0, 1)]
    first, again, other = (stream.from_step(0) for stream in streams)
    rows, seen = [], []
    for at in range(200):
        loaded, same, _ = next(first), next(again), next(other)
        assert all(torch.equal(loaded.tensors[name], x) for name, x in same.tensors.items())
        which = streams[0].caption(loaded.rows, *divmod(at, 2))
        expected = shards.text(loaded.rows, which)
        found = to_batch(loaded, shards, torch.device("cpu")).cond
        assert torch.equal(found["text"], expected["text"]) and torch.equal(found["mask"], expected["mask"])
        assert found["text"].shape == (2, 12, 16) and found["text"].dtype == torch.float32
        rows.append(loaded.rows), seen.append(which)
    resumed = streams[0].from_step(37)
    assert all(
        torch.equal(next(resumed).tensors["text"], shards.read(rows[k], which=seen[k])["text"]) for k in (74, 75)
    )
    rows, seen = np.concatenate(rows), np.concatenate(seen)
    assert not seen[rows % 2 == 1].any(), "odd rows have one caption"
    counts = np.bincount(seen[rows % 2 == 0], minlength=3)
    assert counts.sum() > 150 and counts.min() > counts.sum() / 5, "each of three is drawn about as often"
    assert not np.array_equal(streams[0].caption(np.zeros(64, int), 3, 0), streams[2].caption(np.zeros(64, int), 3, 0))


@pytest.mark.parametrize("sizes", [(5,), (4, 4), (1, 2, 4), (1000, 3, 77, 20), (1, 1, 1, 1, 1)])
def test_schedule_takes_parts_in_proportion_at_every_length(sizes):
    schedule, total = Schedule.of(sizes, seed=3), sum(sizes)
    found = [schedule.at(step) for step in range(2 * total)]
    taken = np.array([[part == k for k in range(len(sizes))] for part, _ in found]).cumsum(axis=0)
    assert all(taken[step][part] - 1 == visit for step, (part, visit) in enumerate(found)), "visits count from 0"
    assert taken[total - 1].tolist() == list(sizes) and taken[-1].tolist() == [2 * size for size in sizes]
    ideal = np.arange(1, 2 * total + 1)[:, None] * np.array(sizes) / total
    assert np.abs(taken - ideal).max() < len(sizes)
    far = 10**15
    assert schedule.at(far)[1] in {far * size // total + around for size in sizes for around in range(-5, 6)}


def test_schedule_depends_on_the_seed():
    drawn = [[Schedule.of((5, 7, 9), seed).at(step)[0] for step in range(21)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_each_step_reads_one_bucket_and_each_epoch_of_it_every_row_once():
    data = open_data(ratios.shared())
    alone = Stream(data, batch_size=4, accumulate=1, seed=3)
    steps = [alone.indices(step, 0) for step in range(24)]
    assert all(len(set(rows // 8)) == 1 for rows in steps), "rows 0 .. 7 are the first bucket, and so on"
    for k in range(3):
        rows = np.concatenate([rows for rows in steps if rows[0] // 8 == k])
        assert len(rows) == 32
        assert all(sorted(rows[at : at + 8]) == list(range(8 * k, 8 * k + 8)) for at in range(0, 32, 8))
        assert not np.array_equal(rows[:8], rows[8:16])
    shared = [Stream(data, batch_size=4, accumulate=2, seed=3, rank=rank, world=2) for rank in (0, 1)]
    for step in (17, 5, 23):  # in any order: nothing is remembered
        parts = [stream.indices(step, micro) for stream in shared for micro in range(2)]
        assert np.array_equal(np.concatenate(parts), steps[step])
        assert np.array_equal(shared[1].all_indices(step), steps[step])
    batches = alone.from_step(5)
    for step in range(5, 9):
        rows, tensors = next(batches)
        assert np.array_equal(rows, steps[step])
        assert tensors["moments"].shape == (4, 1, *data.shapes[rows[0] // 8])


def test_bucket_smaller_than_the_batch_wraps_around():
    data = open_data(ratios.shared())
    rows = Stream(data, batch_size=20, accumulate=1, seed=0).indices(4, 0)
    assert np.bincount(rows % 8, minlength=8).tolist().count(2) >= 4 and len(set(rows // 8)) == 1


def test_labels_are_read_without_captions():
    shards = Dataset.open(toy.digits())
    assert Stream(shards, batch_size=4, accumulate=1, seed=0).caption(np.arange(4), 0, 0) is None


def test_batch_is_entirely_on_the_device():
    """Otherwise DDP would move the rest at every micro-batch, and the host would wait for it."""
    shards = Dataset.open(toy.digits())
    loaded = next(Stream(shards, batch_size=4, accumulate=1, seed=0).from_step(0))
    batch = to_batch(loaded, shards, torch.device("meta"))
    assert {x.device.type for x in batch if isinstance(x, torch.Tensor)} == {"meta"}
