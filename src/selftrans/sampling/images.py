"""Run ⇒ images: what `selftrans sample` does, alone or under `accelerate launch`."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import Weights, load_model
from selftrans.config import SampleConfig
from selftrans.encoders.autoencoder import load_autoencoder
from selftrans.flow import PATHS
from selftrans.models.compiling import compile_model
from selftrans.precision import PRECISIONS
from selftrans.sampling.folder import write_samples
from selftrans.sampling.samplers import sample_images

MANY = 20  #: batches of a process that are worth the minute of compiling, on a GPU


class Sampling(NamedTuple):
    """A model that is ready to be sampled."""

    config: SampleConfig
    described: dict[str, Any]  #: all that the images depend on, but for their number
    sample: Callable[[np.ndarray], Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]]  #: see `sample_images`


def is_model(path: Path) -> bool:
    """Whether `path` is a run, a stage, a checkpoint or a weights file, rather than pictures."""
    if path.is_file():
        return path.suffix == ".safetensors"
    return (path / "checkpoints").is_dir() or (path / checkpoint.STATE).exists() or (path / "config.json").exists()


def sampling(
    origin: str | Path, settings: dict[str, Any], *, weights: Weights = "ema", stage: str | None = None
) -> Sampling:
    """The model that `origin` stands for, on this process' device; `settings` override the run's own `SampleConfig`.

    ValueError for settings that cannot work.
    """
    found = load_model(origin, stage=stage, weights=weights)
    config = dataclasses.replace(found.config.sample, **settings)
    config.check()
    if config.guidance_scale == 1 and "guidance_interval" in settings:
        warnings.warn("the guidance interval is ignored: the guidance scale is 1", stacklevel=3)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    model = found.model.to(device)
    cast_products(model, PRECISIONS[config.precision])
    compiled = worth_compiling(config, device)
    if compiled:
        compile_model(model)
    autoencoder, path = load_autoencoder(found.autoencoder, device=device), PATHS[found.config.train.path]
    described = config.settings() | {
        "weights": found.weights,
        "num_classes": model.num_classes,
        "stage": found.stage,
        "step": found.step,
        "autoencoder": found.autoencoder,
        "source": found.source,
    }

    def sample(indices: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        options: dict[str, Any] = {"num_classes": model.num_classes, "device": device, "path": path}
        padded = fill(indices, config.batch_size) if compiled else indices
        for at, batch in enumerate(sample_images(model, autoencoder, config, **options, indices=padded)):
            left = len(indices) - at * config.batch_size
            yield batch[0][:left], batch[1][:left], batch[2][:left]

    return Sampling(config, described, sample)


def worth_compiling(config: SampleConfig, device: torch.device) -> bool:
    """Whether each process samples so many batches on a GPU that compiling pays."""
    return device.type == "cuda" and config.num >= MANY * config.batch_size * int(os.environ.get("WORLD_SIZE", 1))


def cast_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights of every product in `dtype`, once, as autocast would round them in each pass of a sampler."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype=dtype)


def fill(indices: np.ndarray, batch_size: int) -> np.ndarray:
    """Indices up to whole batches, the last one repeated: another shape of batch would be compiled anew."""
    return np.concatenate([indices, np.repeat(indices[-1:], -len(indices) % batch_size)])


def generate(
    origin: str | Path, out: str | Path, settings: dict[str, Any], *, weights: Weights = "ema", stage: str | None = None
) -> int:
    """Sample from a run, checkpoint or weights file into the folder `out`; returns how many images this call made.

    ValueError for settings that cannot work and for a folder that holds other samples. Several processes share the work
    (RANK, WORLD_SIZE, LOCAL_RANK as accelerate sets them).
    """
    made = sampling(origin, settings, weights=weights, stage=stage)
    if (Path(out) / "manifest.json").exists():
        raise ValueError(f"{out} holds prepared data; choose another folder for samples")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return write_samples(made.sample, Path(out), made.described, made.config.num, rank=rank, world=world)
