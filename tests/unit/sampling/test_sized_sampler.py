"""Images in the sizes of bucketed data: their proportions, their order, and each image as it would be sampled alone."""

import numpy as np
import pytest

from selftrans.data.buckets import open_data
from selftrans.sampling.images import Sampler
from selftrans.sampling.sized_sampler import SizedSampler
from selftrans.train.run import train
from tests.support import ratios, toy


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("ratios") / "run"
    few = {"method": "vanilla", "train.steps": 1, "train.batch_size": 4, "train.preview_every": 0}
    train(toy.toy(few | {"data.path": str(ratios.shared())}), out, quiet=True)
    return out


def sampler(run, num):
    return Sampler.load(run, {"num": num, "steps": 2, "sampler": "euler", "batch_size": 5})


def test_each_size_is_as_frequent_as_in_the_data(run):
    data = open_data(ratios.shared())
    sampling = sampler(run, 48)
    sized = SizedSampler(sampling, data)
    assert sampling.described["sizes"] == {name: 2 * count for name, count in ratios.COUNTS.items()}
    assert "size" not in sampling.described and sorted(sized.order.tolist()) == list(range(48))
    batches = list(sized.sample())
    shapes = [image.shape[:2] for batch in batches for image in batch.images]
    assert {shape: shapes.count(shape) for shape in shapes} == {(6, 10): 16, (8, 8): 16, (10, 6): 16}
    assert np.concatenate([batch.indices for batch in batches]).tolist() == sized.order.tolist()


def test_an_image_is_the_one_of_its_index_in_its_size(run):
    """The size of image k is that of the row that a fixed shuffle of the data's rows has at k."""
    data, count = open_data(ratios.shared()), 12
    found = {
        int(k): image
        for batch in SizedSampler(sampler(run, count), data).sample()
        for k, image in zip(batch.indices, batch.images, strict=True)
    }
    rows = np.random.default_rng(0).permutation(24)[:count]
    for part, size in enumerate(((6, 10), (8, 8), (10, 6))):
        alone = sampler(run, count)
        alone.resize(size)
        expected = np.concatenate([batch.images for batch in alone.sample()])
        for k in np.flatnonzero(rows // 8 == part):
            assert np.abs(found[int(k)].astype(int) - expected[k].astype(int)).max() <= 1


def test_data_of_one_shape_change_nothing(run):
    data = open_data(ratios.shared() / "8x8")
    for dataset in (None, data):
        sampling = sampler(run, 7)
        sized = SizedSampler(sampling, dataset)
        assert "sizes" not in sampling.described and sized.order.tolist() == list(range(7))
        assert [batch.images.shape for batch in sized.sample()] == [(5, 8, 8, 3), (2, 8, 8, 3)]


def test_sizes_that_the_model_does_not_take_are_refused_at_once(run, tmp_path):
    data = ratios.prepared(tmp_path, multiple=1, resolution=9)
    with pytest.raises(ValueError, match="does not divide into patches"):
        SizedSampler(sampler(run, 4), open_data(data))
