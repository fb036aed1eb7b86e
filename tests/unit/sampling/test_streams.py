"""The random generators of an image."""

import numpy as np

from selftrans.sampling.streams import CAPTION_STREAM, LABEL_STREAM, NOISE_STREAM, image_stream


def test_streams_differ_in_seed_index_and_use():
    first = {
        (seed, index, use): image_stream(seed, index, use).integers(1 << 62)
        for seed in (0, 1, 2**32, 3 * 2**32)
        for index in (0, 1, 3)
        for use in (NOISE_STREAM, LABEL_STREAM, CAPTION_STREAM)
    }
    assert len(set(first.values())) == len(first) == 36
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - the global generator must not be used
    assert image_stream(1, 3, LABEL_STREAM).integers(1 << 62) == first[1, 3, LABEL_STREAM]
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
