"""Prepared data ⇒ latents ⇒ what people look at and extractors read.

Shape legend: N or n rows, M moments channels, (C, *S) latent or array, (H, W, C) picture.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from selftrans.data.dataset import Shards
from selftrans.device import default_device
from selftrans.encoders.autoencoder import Autoencoder, load_autoencoder, sample_latents, to_uint8


@torch.inference_mode()
def decode_images(autoencoder: Autoencoder, z0: Tensor) -> np.ndarray:
    """Latents (N, C, *S) to pictures, uint8 (N, H, W, C); of an autoencoder without pictures, to float32 (N, C, *S)."""
    decoded = autoencoder.decode(z0)
    return (to_uint8(decoded) if autoencoder.pictures else decoded.float()).cpu().numpy()


def decoded_images(
    dataset: Shards, batch_size: int = 256, *, device: torch.device | str | None = None
) -> Iterator[np.ndarray]:
    """Posterior means of prepared data, decoded by its autoencoder, in order and unmirrored: the same at each call.

    Batches as `decode_images` gives them. `device`: where it is decoded; None: see `default_device`.
    """
    manifest, device = dataset.manifest, device or default_device()
    autoencoder = load_autoencoder(manifest.autoencoder, device=device)
    for start in range(0, len(dataset), batch_size):
        moments, _ = dataset.read(np.arange(start, min(start + batch_size, len(dataset))))
        means = moments[:, 0, : manifest.shape[0]]
        z0 = sample_latents(means, stochastic=False, scale=manifest.scale, shift=manifest.shift)
        yield decode_images(autoencoder, z0.to(device))


def data_latents(dataset: Shards, most: int) -> tuple[Tensor, Tensor]:
    """At most `most` latents (N, C, *S) of a fixed shuffle, and their labels (N,)."""
    return latents_of(dataset, np.random.default_rng(0).permutation(len(dataset))[:most])


def latents_of(dataset: Shards, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Latents (N, C, *S) of these rows, the same posterior sample each time, and labels (N,); torch's RNG is left alone."""
    moments, labels = dataset.read(rows)
    manifest = dataset.manifest
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        z0 = sample_latents(moments[:, 0], stochastic=manifest.stochastic, scale=manifest.scale, shift=manifest.shift)
    return z0, labels
