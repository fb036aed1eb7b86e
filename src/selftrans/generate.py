"""Run ⇒ images: what `selftrans sample` does, alone or under `accelerate launch`."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selftrans.flow import PATHS
from selftrans.latents import load_autoencoder
from selftrans.sample import sample_images
from selftrans.samples_io import write_samples
from selftrans.train.restore import Weights, restore

MANY = 20  #: batches of a process that are worth the minute of compiling, on a GPU


def generate(
    origin: str | Path, out: str | Path, settings: dict[str, Any], *, weights: Weights = "ema", stage: str | None = None
) -> int:
    """Sample from a run, checkpoint or weights file into the folder `out`; returns how many images this call made.

    `settings` override the run's own `SampleConfig`. ValueError for settings that cannot work and for a folder that
    holds other samples. Several processes share the work (RANK, WORLD_SIZE, LOCAL_RANK as accelerate sets them).
    """
    found = restore(origin, stage=stage, weights=weights)
    config = dataclasses.replace(found.config.sample, **settings)
    config.check()
    if config.guidance_scale == 1 and "guidance_interval" in settings:
        warnings.warn("the guidance interval is ignored: the guidance scale is 1", stacklevel=2)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    model = found.model.to(device)
    if device.type == "cuda" and config.num >= MANY * config.batch_size * world:
        for block in model.blocks:
            block.compile(dynamic=False)
    autoencoder = load_autoencoder(found.autoencoder, device=device)

    def sample(indices: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        path = PATHS[found.config.train.path]
        return sample_images(
            model, autoencoder, config, num_classes=model.num_classes, device=device, path=path, indices=indices
        )

    described = config.settings() | {
        "weights": found.weights,
        "num_classes": model.num_classes,
        "stage": found.stage,
        "step": found.step,
        "autoencoder": found.autoencoder,
        "source": found.source,
    }
    if (Path(out) / "manifest.json").exists():
        raise ValueError(f"{out} holds prepared data; choose another folder for samples")
    return write_samples(sample, Path(out), described, config.num, rank=rank, world=world)
