"""A run as a pipeline of diffusers: model, scheduler, autoencoder and text encoder in one folder of safetensors and json.

A folder is read as data: the classes of its parts are known here, and none that it names is imported.
Shape legend: N images, (C, *S) latent, (H, W, C) picture.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from selftrans.checkpoints import hub
from selftrans.checkpoints.load import PIPELINE, VAE, Weights
from selftrans.data.decoded import decode_images
from selftrans.encoders.autoencoder import Autoencoder, DiffusersAutoencoder, load_autoencoder
from selftrans.encoders.text import UNMASKED, TextEncoder, encoder_of
from selftrans.interop.interpolant_scheduler import InterpolantScheduler
from selftrans.interop.pipeline_parts import copy_text_encoder, parts_of, save_vae
from selftrans.messages import first_line, printable
from selftrans.plain_json import read_object
from selftrans.sampling.samplers import Early, Noise, early_weight, guided, scaled
from selftrans.sampling.streams import image_noise
from selftrans.storage import write_json
from selftrans.types import MASK, TEXT, Cond, Output, map_cond


@dataclasses.dataclass
class SiTPipelineOutput(BaseOutput):
    """What a pipeline returns: PIL pictures, or an array (N, H, W, C) uint8, (N, C, *S) float32 of other data, or latents."""

    images: Any


class SiTPipeline(DiffusionPipeline):
    """Samples a model of a path between data and noise: SiT, DiT, LightningDiT, MMDiT or any other backbone of selftrans.

    From the same noise, with the same settings and batch, its pictures are those of `selftrans sample` bit for bit.

    Args:
        transformer, scheduler: the model, and how it is sampled; on the linear path any flow-matching scheduler of diffusers.
        vae: decodes latents; None: what the model's header names (pixels, sound, video).
        text_encoder, tokenizer: of a model of text; None: loaded at the first prompt, by the name in the header.
    """

    transformer: Any
    scheduler: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012 - as in diffusers

    def __init__(
        self, transformer: Any, scheduler: Any, vae: Any = None, text_encoder: Any = None, tokenizer: Any = None
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )

    @classmethod
    def from_run(cls, run: str | Path, *, weights: Weights = "ema", stage: str | None = None) -> Self:
        """The pipeline of a run, checkpoint, weights file, or model on the hub. ValueError where there is none."""
        return cls(**parts_of(run, weights=weights, stage=stage))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        torch_dtype: torch.dtype | None = None,
        **components: Any,
    ) -> Self:
        """The pipeline in a folder of `save_pretrained`, or in the repository `owner/name` of the hub at a revision.

        `components` replace parts (`scheduler=...`). Nothing in the folder is executed, and only safetensors and json are
        read. ValueError, in one line, where it is no such folder.
        """
        name = str(pretrained_model_name_or_path)
        if not Path(name).is_dir():
            name = f"{hub.SCHEME}{name.removeprefix(hub.SCHEME)}" + (f"@{revision}" if revision else "")
        folder = hub.local(name)
        known = {"transformer", "scheduler", "vae", "text_encoder", "tokenizer"}
        for option in sorted({*components} - known):
            raise ValueError(
                f"SiTPipeline.from_pretrained has no option {option}; parts are {', '.join(sorted(known))}"
            )
        _check_index(folder)
        found = cls(**parts_of(folder) | components)
        found.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return found if torch_dtype is None else found.to(torch_dtype)

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True, **ignored: Any) -> None:
        """Write all parts as safetensors and json; text encoders of the hub stay names. ValueError for another format."""
        folder = Path(save_directory)
        self.transformer.save_pretrained(folder / "transformer", safe_serialization=safe_serialization)
        self.scheduler.save_pretrained(folder / "scheduler")
        save_vae(self.vae, folder / VAE)
        index: dict[str, Any] = {key: value for key, value in self.config.items() if isinstance(value, tuple | list)}
        if not copy_text_encoder(self.transformer.conditions, folder):
            index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
        write_json(folder / PIPELINE, {"_class_name": type(self).__name__} | dict(sorted(index.items())))

    @torch.inference_mode()
    def __call__(
        self,
        class_labels: int | Sequence[int] | None = None,
        prompt: str | Sequence[str] | None = None,
        *,
        num_images: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_channels: int | None = None,
        early_guidance: float | None = None,
        early_interval: tuple[float, float] | None = None,
        seed: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> SiTPipelineOutput | tuple[Any]:
        """Sample images. What is None is as in the settings of the run.

        Args:
            class_labels: of a model of classes; prompt: of a model of text; either repeats for num_images images.
            num_images: N; None: one for each label, prompt or row of `latents`.
            guidance_scale, guidance_interval, guidance_channels: see `samplers.guided`.
            early_guidance, early_interval: see `samplers.early_guided`.
            seed: the noise of image k is that of `selftrans sample --seed`. generator: torch's, instead.
            latents: (N, C, *S) noise to start from.
            output_type: pil, np or latent; np where the data are not pictures.
        ValueError for conditions of another kind, labels outside the classes, and early guidance without a second output.
        """
        settings = self.transformer.settings.sample
        n = num_images or (len(latents) if latents is not None else _count(class_labels, prompt))
        device = self._execution_device
        cond = map_cond(lambda x: x.to(device), self._condition(n, class_labels, prompt))
        noise = self._noise(n, seed, generator, device)
        if latents is not None and len(latents) != n:
            raise ValueError(
                f"{len(latents)} latents are given for {n} images; give one for each, or leave out num_images"
            )
        drawn = noise()  # drawn also where latents are given, so that the later noise of an SDE is the same
        z = drawn if latents is None else latents.to(device, torch.float32)
        scale = settings.guidance_scale if guidance_scale is None else guidance_scale
        early = Early(
            settings.early_guidance if early_guidance is None else early_guidance,
            early_interval or settings.early_interval,
        )
        model = _Velocity(self.transformer, early)
        velocity = guided(
            model,  # type: ignore[arg-type]
            cond,
            scale=scale,
            interval=guidance_interval or settings.guidance_interval,
            channels=settings.guidance_channels if guidance_channels is None else guidance_channels,
        )
        steps = num_inference_steps or settings.steps
        longer = scaled(lambda z, t: velocity(z, model.at(t)), settings.velocity_scale)
        z0 = self._integrate(longer, z, steps, noise, generator)
        images = self._images(z0, settings.rounding, output_type)
        self.maybe_free_model_hooks()
        return SiTPipelineOutput(images=images) if return_dict else (images,)

    def _integrate(self, velocity: Any, z: Tensor, steps: int, noise: Noise, generator: Any) -> Tensor:
        scheduler = self.scheduler
        ours = isinstance(scheduler, InterpolantScheduler)
        if not ours and self.transformer.settings.train.path != "linear":
            raise ValueError("this model is of the cosine path; use selftrans' InterpolantScheduler")
        scheduler.set_timesteps(steps, device=z.device)
        largest, own = scheduler.config.num_train_timesteps, {"noise": noise} if ours else {}
        if not ours and "generator" in inspect.signature(scheduler.step).parameters:
            own = {"generator": generator}  # of the schedulers that draw noise
        for t in self.progress_bar(scheduler.timesteps):
            v = velocity(z, t if ours else t / largest)
            z = scheduler.step(v, t, z, return_dict=False, **own)[0]
        return z

    def _images(self, z0: Tensor, rounding: str, output_type: str) -> Any:
        """Latents (N, C, *S) as `output_type` asks for them."""
        if output_type == "latent":
            return z0
        images = decode_images(self._decoder(), z0, rounding)
        if output_type != "pil" or images.dtype != np.uint8:
            return images
        return [Image.fromarray(each[..., 0] if each.shape[-1] == 1 else each) for each in images]

    def _condition(self, n: int, labels: Any, prompt: Any) -> Cond:
        """The condition of n images, on the CPU or a device. ValueError for one that the model does not have."""
        conditions = self.transformer.conditions
        if conditions.kind != "text":
            if prompt is not None:
                raise ValueError(f"prompts are for models of text, this one is of {conditions}; leave them out")
            given = None if labels is None else torch.tensor(_repeated(labels, n), dtype=torch.long)
            if given is not None:
                conditions.check_labels(given, n, null=True)
            return self.transformer.condition(n, None if given is None else given.to(self.transformer.device))
        if labels is not None or prompt is None:
            raise ValueError(f"this model is of {conditions}; give a prompt, and no class_labels")
        encoder, backbone = self._text(), self.transformer.backbone
        if not backbone.null_set:  # an imported model
            backbone.use_null(encoder.encode([""]))
        return encoder.encode(_repeated(prompt, n))

    def _text(self) -> TextEncoder:
        conditions = self.transformer.conditions
        if self.text_encoder is None:
            found = encoder_of(conditions, device=self._execution_device)
            self.register_modules(text_encoder=found.model, tokenizer=found.tokenizer)
            return found
        masked = type(self.text_encoder).__name__ not in UNMASKED
        parts = (self.text_encoder, self.tokenizer, conditions.tokens, conditions.sha256)
        return TextEncoder(conditions.encoder, *parts, masked=masked)

    def _noise(self, n: int, seed: int | None, generator: Any, device: torch.device) -> Noise:
        shape = tuple(self.transformer.backbone.shape)
        if seed is not None:
            if generator is not None:
                raise ValueError("seed and generator exclude each other; give one of them")
            return image_noise(np.arange(n), shape, seed, device)
        return lambda: randn_tensor((n, *shape), generator=generator, device=device, dtype=torch.float32)

    def _decoder(self) -> Autoencoder:
        if self.vae is not None:
            return DiffusersAutoencoder("vae", self.vae, device=self.vae.device, dtype=self.vae.dtype)
        return load_autoencoder(str(self.transformer.config["header"]["autoencoder"]), device=self._execution_device)


class _Velocity:
    """A transformer of a pipeline as `guided` calls a model; called through `forward`, so that hooks of offloading run."""

    def __init__(self, transformer: Any, early: Early) -> None:
        if early.scale != 1 and transformer.backbone.early is None:
            raise ValueError(f"early_guidance is {early.scale:g}, and the model has no second output; give 1")
        self.transformer, self.early, self.strength = transformer, early, 1.0

    def at(self, t: Tensor) -> Tensor:
        """t, after setting the strength of early guidance for the next call: it acts only within its interval."""
        self.strength = early_weight(self.early, t)
        return t

    def null(self, cond: Cond) -> Cond:
        return self.transformer.backbone.null(cond)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Output:
        if isinstance(cond, dict):
            named = {"encoder_hidden_states": cond[TEXT], "encoder_attention_mask": cond[MASK]}
        else:
            named = {"class_labels": cond}
        return Output(self.transformer(x, t, **named, early_guidance=self.strength).sample, {})


def _count(*given: Any) -> int:
    """How many labels or prompts there are; 1 without any."""
    for each in given:
        if each is not None:
            return 1 if isinstance(each, int | str) else len(each)
    return 1


def _repeated(given: Any, n: int) -> list[Any]:
    several = [given] if isinstance(given, int | str) else list(given)
    if not several:
        raise ValueError("no labels or prompts are given; give one at least")
    return [several[k % len(several)] for k in range(n)]


def check_replaceable(out: Path) -> None:
    """ValueError unless `out` is free, or holds what `selftrans export` or `push` wrote there, and nothing else."""
    names = (
        {path.name for path in out.iterdir()} if out.is_dir() else {""} if out.exists() or out.is_symlink() else set()
    )
    try:
        if names:
            _check_index(out)
        own = names <= {PIPELINE, hub.CARD, hub.SAMPLES, hub.RECORD, *hub.FOLDERS}
    except ValueError:
        own = False
    if not own:
        raise ValueError(f"{out} exists and is not an export, or holds other files, too; choose another --out")


def _check_index(folder: Path) -> None:
    """ValueError unless the index of a folder names this class; the classes of the parts that it names are not used."""
    try:
        name = (read_object(folder / PIPELINE) or {})["_class_name"]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{printable(folder)} is no pipeline ({first_line(error)}); `selftrans export RUN --out DIR --layout pipeline` "
            "makes one of a run"
        ) from error
    if name != SiTPipeline.__name__:
        raise ValueError(
            f"{printable(folder)} is a pipeline of class {name!r:.60}, not SiTPipeline; use diffusers' own"
        )
