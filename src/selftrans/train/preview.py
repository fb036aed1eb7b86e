"""A grid of samples from the EMA while training goes on: the same noise and labels each time, so that grids compare."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selftrans.analyse.plots import image_grid, save_png
from selftrans.config import RunConfig
from selftrans.data.shards import Manifest
from selftrans.flow import PATHS
from selftrans.latents import Autoencoder, load_autoencoder
from selftrans.sample import sample_images


class Preview:
    """Makes previews with Heun's method and the run's guidance. A preview that fails warns and never stops the training."""

    def __init__(self, config: RunConfig, manifest: Manifest, device: torch.device) -> None:
        self.config, self.manifest, self.device = config, manifest, device
        log = config.log
        self.settings = dataclasses.replace(
            config.sample, num=log.preview_images, sampler="heun", steps=log.preview_steps
        )
        self._autoencoder: Autoencoder | None = None

    def save(self, model: Any, path: Path) -> None:
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
            images = np.concatenate([images for _, _, images in batches], axis=0)
            save_png(image_grid(images, upscale=max(1, 64 // images.shape[1])), path)
        except (OSError, ValueError, RuntimeError) as error:
            warnings.warn(f"no preview at {path}: {error}", stacklevel=2)
