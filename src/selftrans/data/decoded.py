"""Prepared data ⇒ latents ⇒ decoded pictures or arrays.

Shape legend: N or n rows, (C, *S) latent or array, (H, W, C) picture.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from selftrans.data.dataset import Dataset
from selftrans.device import default_device
from selftrans.encoders.autoencoder import Autoencoder, load_autoencoder, to_uint8


@torch.inference_mode()
def decode_images(autoencoder: Autoencoder, z0: Tensor, rounding: str = "nearest") -> np.ndarray:
    """Decode latents (N, C, *S) to pictures, uint8 (N, H, W, C), or to float32 (N, C, *S) when the data are not pictures.

    `rounding`: see `to_uint8`. Raises ValueError for decoded values that are not finite.
    """
    decoded = autoencoder.decode(z0)
    if not bool(torch.isfinite(decoded).all()):
        raise ValueError(f"the autoencoder {autoencoder.name} decodes latents to values that are not finite")
    return (to_uint8(decoded, rounding) if autoencoder.pictures else decoded.float()).cpu().numpy()


def decoded_images(
    dataset: Dataset,
    batch_size: int = 256,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[np.ndarray]:
    """Decoded posterior means of prepared data, in order and not mirrored; every call returns the same.

    Yields batches as `decode_images` returns them, each of one shape. `device`: where they are decoded (None:
    `default_device`). `dtype`: of the autoencoder's network.
    """
    manifest, device = dataset.manifest, device or default_device()
    autoencoder = load_autoencoder(manifest.autoencoder, device=device, dtype=dtype)
    for part in dataset.of_one_shape:
        for start in range(0, len(part), batch_size):
            rows = np.arange(start, min(start + batch_size, len(part)))
            z0 = manifest.latent_space.mean(part.read(rows, ["moments"])["moments"][:, 0])
            yield decode_images(autoencoder, z0.to(device))


def data_latents(dataset: Dataset, most: int) -> tuple[Tensor, Tensor]:
    """At most `most` latents (N, C, *S), chosen by a fixed shuffle, and their labels (N,).

    Of data of several shapes, they are of the shape that most rows have.
    """
    dataset = max(dataset.of_one_shape, key=len)
    return latents_of(dataset, dataset.some_rows(most))


def latents_of(dataset: Dataset, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Latents (N, C, *S) of these rows, always the same posterior sample, and labels (N,). Keeps torch's RNG state."""
    tensors = dataset.read(rows, ["moments", "labels"])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        z0 = dataset.manifest.latent_space.sample(tensors["moments"][:, 0])
    return z0, tensors["labels"]
