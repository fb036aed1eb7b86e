"""Model ⇒ images, for `selftrans sample`, previews, `compare`, `evaluate` and `bench`.

Image k depends only on the model, the settings, the seed and k, not on batch size, number of processes or order.
Shape legend: N or n images, (C, *S) latent, (H, W, C) picture.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from selftrans import flow
from selftrans.checkpoints.load import LoadedModel, Weights, load_model
from selftrans.config import Labels, SampleConfig
from selftrans.data.decoded import decode_images
from selftrans.device import default_device
from selftrans.encoders.autoencoder import Autoencoder, DiffusersAutoencoder, load_autoencoder
from selftrans.evaluate.probes import eval_mode
from selftrans.models.compiling import compile_model
from selftrans.precision import PRECISIONS
from selftrans.sampling.samplers import SAMPLERS, Noise, guided
from selftrans.types import Backbone, Cond, Conditions, map_cond

#: random streams of one image; a new use takes a new number, so that the others do not change
NOISE_STREAM, LABEL_STREAM = 1, 2
MANY = 20  #: batches per process from which compilation, which takes about a minute, saves time on a GPU


class SampledBatch(NamedTuple):
    """A batch of the requested images, in order."""

    indices: np.ndarray  #: (n,) int64
    labels: np.ndarray  #: (n,) int64; 0 if the model has no classes
    images: np.ndarray  #: pictures uint8 (n, H, W, C), or float32 (n, C, *S) for data that are not pictures


class Sampler:
    """Samples a model with an autoencoder on a device, under fixed settings.

    Attributes:
        settings: number of images, sampler, guidance.
        described: everything that an image depends on besides its index, as json types.
    """

    def __init__(
        self,
        model: Backbone,
        autoencoder: Autoencoder,
        settings: SampleConfig,
        path: flow.Path = flow.LINEAR,
        *,
        device: torch.device | str,
    ) -> None:
        """Sample `model`, which is on `device` and predicts the velocity of `path`; it is neither cast nor compiled.

        Raises ValueError for invalid settings.
        """
        settings.check()
        self.model, self.autoencoder, self.settings, self.path = model, autoencoder, settings, path
        self.device = torch.device(device)
        self.described = settings.settings()
        self._compiled = False

    @classmethod
    def of(cls, loaded: LoadedModel, settings: SampleConfig, *, device: torch.device | str | None = None) -> Self:
        """The sampler of a loaded model, which is moved to `device` (None: `default_device`) and cast in place.

        In reduced precision the weights of linear and convolution layers are cast once. On a GPU the autoencoder then decodes
        in bfloat16 (float16 overflows in some), and both are compiled if that saves time.
        Raises ValueError for invalid settings.
        """
        settings.check()
        device, dtype = torch.device(device or default_device()), PRECISIONS[settings.precision]
        reduced = device.type == "cuda" and dtype != torch.float32
        decoder = load_autoencoder(
            loaded.autoencoder, device=device, dtype=torch.bfloat16 if reduced else torch.float32
        )
        sampler = cls(loaded.model.to(device), decoder, settings, flow.PATHS[loaded.config.train.path], device=device)
        cast_products(sampler.model, dtype)
        if worth_compiling(settings, device):
            sampler._compile()
        sampler.described |= {
            "weights": loaded.weights,
            "num_classes": loaded.model.conditions.num_classes,
            "stage": loaded.stage,
            "step": loaded.step,
            "autoencoder": loaded.autoencoder,
            "source": loaded.source,
        }
        return sampler

    @classmethod
    def load(
        cls,
        origin: str | Path,
        overrides: dict[str, Any],
        *,
        weights: Weights = "ema",
        stage: str | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """The sampler of a run, checkpoint or weights file; `overrides` replace fields of the run's own `SampleConfig`.

        Raises ValueError for invalid settings and as `load_model` does.
        """
        loaded = load_model(origin, stage=stage, weights=weights)
        settings = dataclasses.replace(loaded.config.sample, **overrides)
        settings.check()
        if settings.guidance_scale == 1 and "guidance_interval" in overrides:
            warnings.warn("the guidance interval is ignored: the guidance scale is 1", stacklevel=3)
        return cls.of(loaded, settings, device=device)

    def sample(self, indices: Sequence[int] | np.ndarray | None = None) -> Iterator[SampledBatch]:
        """Yield the images of `indices` (None: 0 .. settings.num - 1) in batches; the last batch may be smaller.

        The model is in eval mode while a batch is computed, and in its previous mode between batches.
        """
        todo = np.arange(self.settings.num) if indices is None else np.asarray(indices, dtype=np.int64)
        size = self.settings.batch_size
        for start in range(0, len(todo), size):
            chunk = todo[start : start + size]
            computed = fill(chunk, size) if self._compiled else chunk
            cond = conditions_for(computed, self.model.conditions, self.settings.labels, self.settings.seed)
            images = self._images(computed, map_cond(lambda x: x.to(self.device), cond))
            yield SampledBatch(chunk, _labels(cond)[: len(chunk)], images[: len(chunk)])

    def _compile(self) -> None:
        compile_model(self.model)
        if isinstance(self.autoencoder, DiffusersAutoencoder):
            self.autoencoder.model.decoder.compile(dynamic=False)
        self._compiled = True

    @torch.inference_mode()
    def _images(self, indices: np.ndarray, cond: Cond) -> np.ndarray:
        settings, dtype = self.settings, PRECISIONS[self.settings.precision]
        noise = image_noise(indices, self.model.shape, settings.seed, self.device)
        velocity = guided(self.model, cond, scale=settings.guidance_scale, interval=settings.guidance_interval)
        # autocast casts the weights again in every forward pass, also compiled: `cast_products` avoids that
        amp = torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)
        with eval_mode(self.model), amp:
            sampler = SAMPLERS[settings.sampler]
            z0 = sampler(velocity, noise(), steps=settings.steps, path=self.path, noise=noise)
        return decode_images(self.autoencoder, z0)  # outside autocast: an autoencoder can overflow in float16


def worth_compiling(settings: SampleConfig, device: torch.device) -> bool:
    """Whether each process samples enough batches on a GPU for compilation to save time."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    return device.type == "cuda" and settings.num >= MANY * settings.batch_size * world


def cast_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of linear and convolution layers to `dtype`, as autocast would in every forward pass."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            module.to(dtype=dtype)


def fill(indices: np.ndarray, batch_size: int) -> np.ndarray:
    """Pad indices to a full batch by repeating the last one: another batch size would trigger recompilation."""
    return np.concatenate([indices, np.repeat(indices[-1:], -len(indices) % batch_size)])


def image_noise(
    indices: Sequence[int] | np.ndarray, shape: tuple[int, ...], seed: int, device: torch.device | str = "cpu"
) -> Noise:
    """A function that returns float32 standard normals (N, *shape); row i comes from the stream of (seed, indices[i]).

    Drawn on the CPU, so that an image does not depend on the device; global generators are not used.
    """
    streams = [_stream(seed, int(k), NOISE_STREAM) for k in indices]

    def noise() -> Tensor:
        rows = np.empty((len(streams), *shape), dtype=np.float32)
        for row, generator in zip(rows, streams, strict=True):
            generator.standard_normal(dtype=np.float32, out=row)
        drawn = torch.from_numpy(rows)
        if torch.device(device).type == "cuda":  # pinned, so that the copy is asynchronous
            return drawn.pin_memory().to(device, non_blocking=True)
        return drawn.to(device)

    return noise


def conditions_for(
    indices: Sequence[int] | np.ndarray, conditions: Conditions, mode: Labels = "balanced", seed: int = 0
) -> Cond:
    """Condition of each image, from its index and the seed: labels (N,) int64 for the kinds none and labels.

    `balanced` cycles through the classes, `random` draws them uniformly, a tuple of classes is repeated (in it,
    `num_classes` is the null label); with kind none every label is 0. Raises ValueError for anything else.
    """
    if conditions.kind == "text":
        raise ValueError("text conditions are not supported yet")
    indices, count = np.asarray(indices, dtype=np.int64), conditions.num_classes
    if not isinstance(mode, str):
        wrong = [label for label in mode if not 0 <= label <= count]
        if wrong or not mode:
            raise ValueError(f"labels {list(mode)} do not fit a model of {count} classes; use 0 to {count}")
        labels = np.asarray(mode, dtype=np.int64)[indices % len(mode)]
    elif mode not in ("balanced", "random"):
        raise ValueError(f"labels {mode!r} are unknown; use 'balanced', 'random' or a list of classes")
    elif conditions.kind == "none":
        labels = np.zeros_like(indices)
    elif mode == "balanced":
        labels = indices % count
    else:
        draws = [_stream(seed, int(k), LABEL_STREAM).integers(count) for k in indices]
        labels = np.asarray(draws, dtype=np.int64)
    return torch.from_numpy(labels)


def _labels(cond: Cond) -> np.ndarray:
    assert isinstance(cond, Tensor), "conditions_for only returns labels so far"
    return cond.cpu().numpy()


def _stream(seed: int, index: int, stream: int) -> np.random.Generator:
    """The random generator of image `index`.

    From NumPy, because torch's CPU generator keeps only 32 bits of a seed: two of 50,000 images would likely collide.
    The seed comes last, because SeedSequence pads with zeros: in front, a long seed could equal another (seed, index).
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((stream, index, seed))))
