"""A held-out part of prepared data, and the rest: every row in one of them, and the same numbers as in the data."""

import pickle

import numpy as np
import pytest
import torch

from selftrans.data.buckets import open_data
from selftrans.data.prepare import prepare
from selftrans.data.views import SelectedRows, one_shard, split
from selftrans.train.batches import Stream
from tests.support import captioned, ratios, toy


def test_each_row_is_in_one_part_and_reads_as_in_the_data():
    data = open_data(toy.digits())
    kept, held = split(data, 100, seed=3)
    assert (len(kept), len(held), kept.parts, held.parts) == (1697, 100, (1697,), (100,))
    assert sorted([*kept.rows, *held.rows]) == list(range(1797))
    rows = np.array([5, 0, 99])
    assert torch.equal(held.read(rows)["moments"], data.read(held.rows[rows], ["moments"])["moments"])
    assert held.names == ("moments",) and (held.labels == data.labels[held.rows]).all()
    again, other = split(data, 100, seed=3)[1], split(data, 100, seed=4)[1]
    assert (again.rows == held.rows).all() and (other.rows != held.rows).any()
    with pytest.raises(ValueError, match=r"indices 0 \.\. 100 are outside the 100 pictures"):
        held.read(np.array([0, 100]))


def test_every_part_gives_its_share():
    data = open_data(toy.digits())
    parts = SelectedRows(data, np.split(np.arange(1797), [1000, 1600]))
    kept, held = split(parts, 100, seed=0)
    assert parts.parts == (1000, 600, 197) and held.parts == (55, 33, 10)  # 100 / 1797 of each
    assert kept.parts == (945, 567, 187) and sorted([*kept.rows, *held.rows]) == list(range(1797))
    assert held.rows[54] < 1000 <= held.rows[55] and held.rows[87] < 1600 <= held.rows[88]


def test_batches_of_buckets_have_one_shape():
    data = open_data(ratios.shared())
    kept, held = split(data, 1000, seed=0)
    assert (sum(held.parts), sum(kept.parts)) == (1, 23) and kept.shapes == data.shapes
    stream = Stream(kept, batch_size=2, accumulate=1, seed=0)
    shapes = {
        tuple(loaded.tensors["moments"].shape[2:]) for loaded, _ in zip(stream.from_step(0), range(9), strict=False)
    }
    assert shapes == set(data.shapes)


def test_pickled_parts_have_the_same_rows(tmp_path):
    """A worker process of a loader gets the held-out rows and the others apart, as in the first process."""
    data = open_data(ratios.shared())
    for part in split(data, 1000, seed=0):
        copied = pickle.loads(pickle.dumps(part))
        assert (len(copied), copied.parts, copied.names) == (len(part), part.parts, part.names)
        assert copied.rows.tolist() == part.rows.tolist() and copied.labels.tolist() == part.labels.tolist()
    one = one_shard(open_data(captioned.prepared(tmp_path, count=8, shard_size=3)), 1)
    copied, rows = pickle.loads(pickle.dumps(one)), np.array([0, 1, 5, 7])
    assert copied.captions(rows) == one.captions(rows) and len(copied) == len(one)


@pytest.mark.parametrize(("asked", "held_out"), [(1, 1), (5, 1), (1000, 1)])
def test_a_tenth_at_most_and_one_at_least(tmp_path, asked, held_out):
    prepare(str(toy.pictures(tmp_path / "pictures")), tmp_path / "data", progress=False)
    kept, held = split(open_data(tmp_path / "data"), asked, seed=0)
    assert (len(kept), len(held)) == (10 - held_out, held_out)


def test_a_single_picture_is_refused(tmp_path):
    prepare(str(toy.pictures(tmp_path / "pictures", classes=(), count=1)), tmp_path / "data", progress=False)
    with pytest.raises(ValueError, match="holds 1 picture; at least two are needed"):
        split(open_data(tmp_path / "data"), 10, seed=0)
    assert issubclass(SelectedRows, type(open_data(tmp_path / "data")))


def test_one_shard_in_place_of_all(tmp_path):
    """Of shards of three rows: row i is row i % 3 of shard 1, with its label, captions and number of them."""
    data = open_data(captioned.prepared(tmp_path, count=8, shard_size=3))
    one, rows = one_shard(data, 1), np.array([0, 1, 5, 7])
    of_data = np.array([3, 4, 5, 4])
    assert len(one) == 8 and one.shapes == data.shapes and one.names == data.names and one.dry_run_data() is one
    assert one.captions(rows) == data.captions(of_data) and one.counts.tolist() == [1, 3, 1, 1, 3, 1, 1, 3]
    which = data.counts[of_data] - 1
    for name, tensor in one.read(rows, which=which).items():
        assert torch.equal(tensor, data.read(of_data, which=which)[name])
    with pytest.raises(ValueError, match="outside the 8 pictures"):
        one.read(np.array([8]))
    with pytest.raises(ValueError, match="holds no features"):
        one.open_features()
