"""Autoencoders: pixels ⇒ moments ⇒ latents ⇒ pixels.

pixels   (N, 3 or 1, R, R) float in [-1, 1]
moments  mean and, for a variational autoencoder, standard deviation: raw, as the encoder gives them; this is stored
latents  (N, C, H, W) = (sample - shift) * scale, of about unit variance; this is what a model learns
Shape legend: N batch, R resolution, (C, H, W) latent, M moments channels (2C when stochastic, else C).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn


class Moments(NamedTuple):
    """What an encoder says of an image: raw, not yet scaled."""

    mean: Tensor  #: (N, C, H, W)
    std: Tensor | None  #: (N, C, H, W); None when the autoencoder is deterministic

    def stack(self) -> Tensor:
        """(N, M, H, W): mean, then std if there is one, along the channels."""
        return self.mean if self.std is None else torch.cat([self.mean, self.std], dim=1)


class Autoencoder(Protocol):
    """Maps pixels to moments, and scaled latents back to pixels."""

    name: str  #: "pixel", a hub id, or the absolute path of a folder
    scale: float  #: latents = (sample - shift) * scale
    shift: float
    channels: int  #: C of a latent; 0 when a latent has the channels of the pixels
    downsample: int  #: R / H
    stochastic: bool  #: whether moments have a standard deviation
    pictures: bool  #: decodes to pixels in [-1, 1]; False: to numbers that are no pictures, which are not clamped

    def encode(self, pixels: Tensor) -> Moments:
        """Pixels (N, 3 or 1, R, R) in [-1, 1] to raw float32 moments (N, C, H, W)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, C, H, W) to float32 pixels (N, 3 or 1, R, R), clamped to [-1, 1]."""
        ...


class PixelAutoencoder:
    """The identity: the model learns pixels themselves."""

    name, scale, shift, channels, downsample, stochastic, pictures = "pixel", 1.0, 0.0, 0, 1, False, True

    def encode(self, pixels: Tensor) -> Moments:
        return Moments(pixels.float(), None)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.float().clamp(-1, 1)


class DiffusersAutoencoder:
    """A diffusers `AutoencoderKL` (stochastic) or `AutoencoderTiny` (deterministic), frozen."""

    pictures = True

    def __init__(self, name: str, model: nn.Module, *, device: torch.device | str, dtype: torch.dtype) -> None:
        config: Any = model.config
        self.name = name
        self.stochastic = config["_class_name"] == "AutoencoderKL"
        self.scale, self.shift = float(config.scaling_factor), float(config.shift_factor or 0.0)
        self.channels, self.pixel_channels = int(config.latent_channels), int(config.in_channels)
        stages = config.block_out_channels if self.stochastic else config.encoder_block_out_channels
        self.downsample = 2 ** (len(stages) - 1)
        self.device, self.dtype = torch.device(device), dtype
        # convolutions in reduced precision are fastest with the channels innermost
        self.model = cast(Any, model.eval().requires_grad_(False))
        self.model.to(self.device, dtype, memory_format=torch.channels_last)

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Moments:
        channels, side = pixels.shape[1], pixels.shape[-1]
        if side % self.downsample or pixels.shape[-2] != side:
            raise ValueError(
                f"autoencoder {self.name} needs squares with a side that is a multiple of {self.downsample}, "
                f"not {pixels.shape[-2]}x{side}; choose another resolution"
            )
        if channels == 1 and self.pixel_channels == 3:
            pixels = pixels.expand(-1, 3, -1, -1)
        elif channels != self.pixel_channels:
            raise ValueError(f"autoencoder {self.name} reads {self.pixel_channels} channels, not {channels}")
        encoded = self.model.encode(self._cast(pixels))
        if not self.stochastic:
            return Moments(encoded.latents.float().contiguous(), None)
        posterior = encoded.latent_dist
        return Moments(posterior.mean.float().contiguous(), posterior.std.float().contiguous())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        raw = latents.float() / self.scale + self.shift
        return self.model.decode(self._cast(raw)).sample.float().clamp(-1, 1).contiguous()


#: classes of diffusers that are understood; a table so that a stranger sees what may be added
DIFFUSERS_CLASSES = ("AutoencoderKL", "AutoencoderTiny")


def autoencoder_name(name: str) -> str:
    """The name that is stored: a local folder by its absolute path, so that it is found from anywhere."""
    return name if name == "pixel" or not Path(name).is_dir() else str(Path(name).resolve())


def load_autoencoder(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PixelAutoencoder | DiffusersAutoencoder:
    """Load an autoencoder: `pixel`, or a diffusers VAE by local folder or hub id.

    A hub id may name a folder of its repository (`owner/repository/vae`). Only safetensors are read and no code is
    run. `dtype` is that of the network; moments and pixels are float32 always.
    Raises ValueError when there is none of that name, of an unknown class, without safetensors or with other weights
    than its config asks for.
    """
    if name == "pixel":
        return PixelAutoencoder()
    folder, subfolder = _locate(name)
    config = _read_config(name, folder, subfolder)
    kind = config.get("_class_name")
    if kind not in DIFFUSERS_CLASSES:
        raise ValueError(f"autoencoder {name!r} is of class {kind!r}; supported: pixel, {', '.join(DIFFUSERS_CLASSES)}")
    import diffusers

    where = {"subfolder": subfolder} if subfolder else {}
    try:
        model, info = getattr(diffusers, kind).from_pretrained(
            folder, use_safetensors=True, torch_dtype=dtype, output_loading_info=True, **where
        )
    except Exception as error:  # diffusers raises a dozen types for what is one fault here: unusable files
        raise ValueError(
            f"autoencoder {name!r} cannot be loaded ({_reason(error)}); safetensors weights are needed"
        ) from error
    # diffusers only warns of these, and fills the gaps with random numbers
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info.get(kind) or ()]
    if wrong:
        raise ValueError(f"autoencoder {name!r}: {len(wrong)} weights do not fit its config, such as {wrong[0]}")
    return DiffusersAutoencoder(autoencoder_name(name), model, device=device, dtype=dtype)


def sample_latents(moments: Tensor, *, stochastic: bool, scale: float, shift: float) -> Tensor:
    """Stored moments (N, M, H, W) to scaled float32 latents (N, C, H, W), drawn by torch's default RNG."""
    if not stochastic:
        return (moments.float() - shift) * scale
    assert moments.shape[1] % 2 == 0, "stochastic moments are mean and std stacked along the channels"
    mean, std = moments.float().chunk(2, dim=1)
    return torch.addcmul(mean, std, torch.randn_like(mean)).sub_(shift).mul_(scale)


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels (N, C, R, R) in [-1, 1] to images (N, R, R, C) uint8, rounded to the nearest and clamped."""
    images = (pixels.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).contiguous()


def from_uint8(images: Tensor) -> Tensor:
    """Images (N, R, R, C) uint8 to float32 pixels (N, C, R, R) in [-1, 1]; `to_uint8` gives them back exactly."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def _locate(name: str) -> tuple[str, str]:
    """(folder or hub repository, subfolder in it)."""
    path = Path(name)
    if path.is_dir():
        return str(path), ""
    parts = name.split("/")
    if path.exists() or path.is_absolute() or name.startswith(".") or len(parts) < 2 or not all(parts):
        raise ValueError(f"no autoencoder {name!r}: neither 'pixel', nor a folder, nor a hub id such as owner/name")
    return "/".join(parts[:2]), "/".join(parts[2:])


def _read_config(name: str, folder: str, subfolder: str) -> dict[str, Any]:
    """The config.json of an autoencoder, read as data."""
    path = Path(folder, subfolder, "config.json")
    try:
        if not Path(folder).is_dir():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(folder, "config.json", subfolder=subfolder or None))
        config = json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:  # missing, offline, gated, not json: to the reader all are "no such autoencoder"
        raise ValueError(f"no autoencoder {name!r}: its config.json cannot be read ({_reason(error)})") from error
    if not isinstance(config, dict):
        raise ValueError(f"no autoencoder {name!r}: its config.json is not an object")
    return config


def _reason(error: Exception) -> str:
    """First line of an error, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
