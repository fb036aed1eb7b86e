"""The random generators of an image: its noise, its label and its caption depend on the seed and its index alone."""

from __future__ import annotations

import numpy as np

#: random streams of one image; a new use takes a new number, so that the others do not change
NOISE_STREAM, LABEL_STREAM, CAPTION_STREAM = 1, 2, 3


def image_stream(seed: int, index: int, stream: int) -> np.random.Generator:
    """The random generator of image `index` for one use.

    From NumPy, because torch's CPU generator keeps only 32 bits of a seed: two of 50,000 images would likely collide.
    The seed comes last, because SeedSequence pads with zeros: in front, a long seed could equal another (seed, index).
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((stream, index, seed))))
