"""The random generators of an image: its noise, its label and its caption depend on the seed and its index alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from selftrans.sampling.samplers import Noise

#: random streams of one image; a new use takes a new number, so that the others do not change
NOISE_STREAM, LABEL_STREAM, CAPTION_STREAM = 1, 2, 3


def image_stream(seed: int, index: int, stream: int) -> np.random.Generator:
    """The random generator of image `index` for one use.

    From NumPy, because torch's CPU generator keeps only 32 bits of a seed: two of 50,000 images would likely collide.
    The seed comes last, because SeedSequence pads with zeros: in front, a long seed could equal another (seed, index).
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((stream, index, seed))))


def image_noise(
    indices: Sequence[int] | np.ndarray, shape: tuple[int, ...], seed: int, device: torch.device | str = "cpu"
) -> Noise:
    """A function that returns float32 standard normals (N, *shape); row i comes from the stream of (seed, indices[i]).

    Drawn on the CPU, so that an image does not depend on the device; global generators are not used.
    """
    streams = [image_stream(seed, int(k), NOISE_STREAM) for k in indices]

    def noise() -> Tensor:
        rows = np.empty((len(streams), *shape), dtype=np.float32)
        for row, generator in zip(rows, streams, strict=True):
            generator.standard_normal(dtype=np.float32, out=row)
        drawn = torch.from_numpy(rows)
        if torch.device(device).type == "cuda":  # pinned, so that the copy is asynchronous
            return drawn.pin_memory().to(device, non_blocking=True)
        return drawn.to(device)

    return noise
