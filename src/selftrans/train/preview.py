"""A grid of samples from the EMA while training goes on: the same noise and labels each time, so that grids compare."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from selftrans.config import RunConfig
from selftrans.data.shards import Manifest
from selftrans.flow import PATHS
from selftrans.latents import load_autoencoder
from selftrans.sample import sample_images


class Preview:
    """Makes previews with the run's sampler settings. A preview that fails warns and never stops the training."""

    def __init__(self, config: RunConfig, manifest: Manifest, device: torch.device) -> None:
        self.config, self.manifest, self.device = config, manifest, device
        self.settings = dataclasses.replace(config.sample, num=config.log.preview_images)
        self._autoencoder = None

    def save(self, model: nn.Module, path: Path) -> None:
        """Sample with `model` (the EMA, in eval mode) and write a PNG."""
        try:
            if self._autoencoder is None:
                name = self.config.data.autoencoder or self.manifest.autoencoder
                self._autoencoder = load_autoencoder(name, device=self.device)
            batches = sample_images(
                model,
                self._autoencoder,
                self.settings,
                num_classes=self.manifest.num_classes,
                path=PATHS[self.config.train.path],
                device=self.device,
            )
            write_grid(np.concatenate([images for _, _, images in batches], axis=0), path)
        except (OSError, ValueError, RuntimeError) as error:
            warnings.warn(f"no preview at {path}: {error}", stacklevel=2)


def write_grid(images: np.ndarray, path: Path) -> None:
    """(n, R, R, C) uint8 to a square PNG grid, small pictures enlarged."""
    from PIL import Image

    n, side, _, channels = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (side + 1) + 1, columns * (side + 1) + 1, channels), 255, dtype=np.uint8)
    for k, image in enumerate(images):
        top, left = (k // columns) * (side + 1) + 1, (k % columns) * (side + 1) + 1
        canvas[top : top + side, left : left + side] = image
    zoom = max(1, 512 // canvas.shape[1])
    picture = Image.fromarray(canvas.squeeze() if channels == 1 else canvas)
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    picture.save(beside, format="PNG")
    os.replace(beside, path)
