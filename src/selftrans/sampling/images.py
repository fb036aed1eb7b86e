"""Model ⇒ images, for `selftrans sample`, previews, `compare`, `evaluate` and `bench`.

Image k depends only on the model, the settings, the seed and k, not on batch size, number of processes or order.
Shape legend: N or n images, (C, *S) latent, (H, W, C) picture.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from selftrans import flow
from selftrans.checkpoints import hub
from selftrans.checkpoints.load import LoadedModel, Weights, find_asked, load_model
from selftrans.config import SampleConfig
from selftrans.data.decoded import decode_images
from selftrans.data.resolution import Resolution, sides, size_text
from selftrans.device import default_device, world_size
from selftrans.encoders.autoencoder import Autoencoder, DiffusersAutoencoder, load_decoder
from selftrans.messages import plural
from selftrans.models.compiling import compile_model
from selftrans.precision import PRECISIONS
from selftrans.sampling.captured_passes import CapturedPasses
from selftrans.sampling.conditioning import Conditioning, conditioning_of
from selftrans.sampling.run_settings import overridden
from selftrans.sampling.samplers import SAMPLERS, Early, autoguided, guided, launched, scaled
from selftrans.sampling.size_cost import check_cost
from selftrans.sampling.streams import image_noise
from selftrans.sampling.weak_model import weak_model
from selftrans.types import Backbone, Cond, check_takes, eval_mode, map_cond

MANY = 20  #: batches per process from which compilation, which takes about a minute, saves time on a GPU


class SampledBatch(NamedTuple):
    """A batch of the requested images, in order."""

    indices: np.ndarray  #: (n,) int64
    labels: np.ndarray  #: (n,) int64: classes; numbers of prompts; 0 if the model has no conditions
    images: np.ndarray  #: pictures uint8 (n, H, W, C), or float32 (n, C, *S) for data that are not pictures


class Sampler:
    """Samples a model with an autoencoder on a device, under fixed settings.

    Attributes:
        settings: number of images, sampler, guidance.
        conditioning: the condition of each image.
        shape: (C, *S) of the latents; the model's own, unless `resize` changes it.
        classes: names of the labels; empty: they have none.
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
        conditioning: Conditioning | None = None,
        weak: Backbone | None = None,
    ) -> None:
        """Sample `model`, which is on `device` and predicts the velocity of `path`; it is neither cast nor compiled.

        `conditioning`: the conditions of the images; None: the labels or prompts of `settings`. `weak`: a weaker
        model that guides, see `autoguided`; None: classifier-free guidance.
        Raises ValueError for invalid settings.
        """
        settings.check()
        channels = settings.guidance_channels
        if channels is not None and channels > model.shape[0]:
            raise ValueError(
                f"sample.guidance_channels is {channels}, the latents have {plural(model.shape[0], 'channel')}; leave it out "
                "for all"
            )
        if settings.early_guidance != 1 and model.early is None:
            raise ValueError(
                f"early_guidance is {settings.early_guidance:g}, and the model has no second output (model.early_block); leave "
                "it out"
            )
        self.model, self.autoencoder, self.settings, self.path = model, autoencoder, settings, path
        self.weak = weak
        self.device = torch.device(device)
        self.conditioning = conditioning or conditioning_of(model.conditions, settings, device=self.device)
        if not model.null_set and self.conditioning.null is not None:  # an imported model of text
            model.use_null(self.conditioning.null)
        self.described = settings.settings() | self.conditioning.described
        self.shape, self.classes = tuple(model.shape), tuple[str, ...]()
        self._compiled = False
        self._captured = CapturedPasses(self.device) if settings.capture == "on" else None

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        settings: SampleConfig,
        *,
        device: torch.device | str | None = None,
        conditioning: Conditioning | None = None,
        text_encoder: str | None = None,
        total: int | None = None,
    ) -> Self:
        """The sampler of a loaded model, which is moved to `device` (None: `default_device`) and cast in place.

        A model of text samples the prompts of `settings`, or (None) those of its run, unless `conditioning` is given;
        `text_encoder` is where their encoder lies, if not where it was at training.
        In reduced precision the weights of linear and convolution layers are cast once. On a GPU the autoencoder then decodes
        in bfloat16 (float16 overflows in some), and both are compiled if that saves time: `total` is the number of images that
        this process samples of models of one kind (None: those of `settings`), which share a compilation.
        Raises ValueError for invalid settings.
        """
        settings.check()
        device, dtype = torch.device(device or default_device()), PRECISIONS[settings.precision]
        if conditioning is None:
            conditions = loaded.model.conditions
            if settings.num < len(settings.prompts or ()):
                warnings.warn(
                    f"{plural(settings.num, 'image')} of {plural(len(settings.prompts or ()), 'prompt')}: the last ones get "
                    f"none; give --num {len(settings.prompts or ())} for one image each",
                    stacklevel=3,
                )
            if conditions.kind == "text" and settings.prompts is None:
                settings = dataclasses.replace(settings, prompts=loaded.prompts)
            present = loaded.present
            conditioning = conditioning_of(
                conditions, settings, present=present, text_encoder=text_encoder, device=device
            )
        of_decoder = decoder_dtype(device, settings.precision)
        decoder = load_decoder(loaded.autoencoder, settings.decode_with, device=device, dtype=of_decoder)
        path = flow.PATHS[loaded.config.train.path]
        weak = weak_model(loaded, settings)
        model, weaker = loaded.model.to(device), weak and weak.model.to(device)
        sampler = cls(model, decoder, settings, path, device=device, conditioning=conditioning, weak=weaker)
        sampler.classes = loaded.classes
        for each in sampler.models:
            cast_products(each, dtype)
        if worth_compiling(settings if total is None else dataclasses.replace(settings, num=total), device):
            sampler._compile()
        sampler.described |= {
            "weights": loaded.weights,
            "num_classes": loaded.model.conditions.num_classes,
            "stage": loaded.stage,
            "step": loaded.step,
            "autoencoder": hub.recorded_name(loaded.autoencoder),
            "source": loaded.source,
        } | ({"decode_with": decoder.name} if settings.decode_with else {})
        if weak:
            about = {"weights": weak.weights, "stage": weak.stage, "step": weak.step, "source": weak.source}
            sampler.described |= {"autoguidance": about}
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
        text_encoder: str | None = None,
    ) -> Self:
        """The sampler of a run, checkpoint or weights file; `overrides` replace fields of the run's own `SampleConfig`.

        Raises ValueError for invalid settings and as `load_model` does.
        """
        loaded = load_model(find_asked(origin, stage=stage, weights=weights), stage=stage)
        return cls.of(loaded, overridden(loaded, overrides), device=device, text_encoder=text_encoder)

    @property
    def models(self) -> list[Backbone]:
        """The model, and the weaker one if there is one."""
        return [self.model] if self.weak is None else [self.model, self.weak]

    def sample(self, indices: Sequence[int] | np.ndarray | None = None) -> Iterator[SampledBatch]:
        """Yield the images of `indices` (None: 0 .. settings.num - 1) in batches; the last batch may be smaller.

        The model is in eval mode while a batch is computed, and in its previous mode between batches.
        """
        todo = np.arange(self.settings.num) if indices is None else np.asarray(indices, dtype=np.int64)
        size, multiple = self.settings.batch_size, self._multiple(len(todo))
        for start in range(0, len(todo), size):
            chunk = todo[start : start + size]
            computed = padded(chunk, multiple)
            cond, labels = self.conditioning.of(computed)
            images = self._images(computed, map_cond(lambda x: x.to(self.device), cond))
            yield SampledBatch(chunk, labels[: len(chunk)], images[: len(chunk)])

    def _multiple(self, total: int) -> int:
        """Each pass computes a multiple of so many images: compiled code and graphs are of one shape.

        A graph is recorded anew for fewer images than a batch.
        """
        size = self.settings.batch_size
        if self._compiled:
            return size
        return min(size, total) if self._captured else 1

    def resize(self, resolution: Resolution) -> None:
        """Sample pictures of this size instead of the model's own. A warning for a much larger one.

        ValueError where model, autoencoder or the device's memory does not take it.
        """
        size, factor = sides(resolution), self.autoencoder.downsample
        if not self.autoencoder.pictures or len(self.shape) != 3:
            raise ValueError("a size is for models of pictures; leave it out")
        if any(side % factor for side in size):
            raise ValueError(f"size {size_text(resolution)} is not a multiple of {factor}, as the autoencoder needs")
        self.shape = (self.shape[0], *(side // factor for side in size))
        if self.shape != tuple(self.model.shape):
            own = -(-self.settings.num // world_size())  # images of a process
            batch, dtype = min(self.settings.batch_size, own), PRECISIONS[self.settings.precision]
            check_cost(self.model, self.shape, resolution, batch=batch, dtype=dtype, device=self.device)
            for model in self.models:
                check_takes(model, self.shape)  # now, not when the folder of samples is begun
            self.described["size"] = size_text(resolution)

    def _compile(self) -> None:
        for model in self.models:
            compile_model(model)
        if isinstance(self.autoencoder, DiffusersAutoencoder):
            self.autoencoder.model.decoder.compile(dynamic=False)
        self._compiled = True

    @torch.inference_mode()
    def _images(self, indices: np.ndarray, cond: Cond) -> np.ndarray:
        settings, dtype = self.settings, PRECISIONS[self.settings.precision]
        noise = image_noise(indices, self.shape, settings.seed, self.device)
        scale, interval, channels = settings.guidance_scale, settings.guidance_interval, settings.guidance_channels
        early, run = Early(settings.early_guidance, settings.early_interval), self._captured or launched
        if self.weak is None:
            velocity = guided(self.model, cond, scale=scale, interval=interval, channels=channels, early=early, run=run)
        else:
            velocity = autoguided(self.model, self.weak, cond, scale=scale, interval=interval, early=early, run=run)
        # autocast casts the weights again in every forward pass, also compiled: `cast_products` avoids that
        amp = torch.autocast(
            self.device.type,
            dtype=dtype,
            enabled=dtype != torch.float32,
            cache_enabled=False if self._captured else None,  # it is freed below, and a graph would go on reading it
        )
        with eval_mode(self.model), amp:
            sampler = SAMPLERS[settings.sampler]
            shift = settings.time_shift
            velocity = scaled(velocity, settings.velocity_scale)
            z0 = sampler(velocity, noise(), steps=settings.steps, path=self.path, noise=noise, shift=shift)
        _check_finite(z0, indices, settings)
        # outside autocast: an autoencoder can overflow in float16
        return decode_images(self.autoencoder, z0, settings.rounding)


class NotFinite(ValueError):
    """Samples that are not finite."""


def _check_finite(z0: Tensor, indices: np.ndarray, settings: SampleConfig) -> None:
    """`NotFinite` for latents (N, C, *S) that are not finite: as pictures they would be black, and be measured."""
    bad = ~torch.isfinite(z0).flatten(start_dim=1).all(dim=1)
    if bad.any():
        first = int(indices[int(bad.int().argmax())])
        causes = ["fp16 may overflow (set the precision of sampling to bf16 or fp32)"] * (settings.precision == "fp16")
        if settings.guidance_scale != 1:
            causes.append(f"the guidance scale {settings.guidance_scale:g} is too large")
        causes.append("the weights of the model have diverged")
        raise NotFinite(f"sample {first} is not finite: {', or '.join(causes)}")


def decoder_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Dtype of the autoencoder that decodes samples in this precision: reduced on a GPU only."""
    reduced = device.type == "cuda" and PRECISIONS[precision] != torch.float32
    return torch.bfloat16 if reduced else torch.float32


def worth_compiling(settings: SampleConfig, device: torch.device) -> bool:
    """Whether each process samples enough batches on a GPU for compilation to save time."""
    return device.type == "cuda" and settings.num >= MANY * settings.batch_size * world_size()


def cast_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of linear and convolution layers to `dtype`, as autocast would in every forward pass."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            module.to(dtype=dtype)


def padded(indices: np.ndarray, multiple: int) -> np.ndarray:
    """Pad indices to a multiple of so many by repeating the last one: another batch size would trigger recompilation."""
    return np.concatenate([indices, np.repeat(indices[-1:], -len(indices) % multiple)])
