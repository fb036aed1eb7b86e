"""Autoencoders: pixels => moments => latents => pixels.

pixels   (N, 3 or 1, H, W) float in [-1, 1]; for data that are not pictures, values (N, C, *S) of any range
moments  mean and, for a variational autoencoder, standard deviation: raw encoder output; stored on disk
latents  (N, C, *S) = (sample - shift) * scale, of about unit variance; a model is trained on these
Shape legend: N batch, (C, *S) latent with one to three spatial dimensions S, M moments channels (2C when
stochastic, else C).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from selftrans.encoders.identity import identity, identity_kind
from selftrans.encoders.latent_space import LatentSpace, Moments
from selftrans.encoders.media import is_media, parse_media
from selftrans.encoders.pretrained import encoder_name
from selftrans.messages import first_line

MOST_PIXELS = 64 * 256**2  #: pixels that a GPU decodes at a time; with 256 channels they take 2.1 GB in bfloat16


class Autoencoder(Protocol):
    """Maps pixels to moments, and scaled latents back to pixels."""

    @property
    def name(self) -> str:
        """ "pixel" or "values", a kind of sound or video, each with its numbers; a hub id, or the absolute path of a folder."""
        ...

    @property
    def pictures(self) -> bool:
        """Whether it encodes pictures; if not, its inputs are values (N, C, *S)."""
        ...

    @property
    def latent_space(self) -> LatentSpace: ...

    @property
    def channels(self) -> int:
        """C of a latent; 0: as many as the pixels have."""
        ...

    @property
    def downsample(self) -> int:
        """Side of the pixels / side of the latent."""
        ...

    def encode(self, pixels: Tensor) -> Moments:
        """Pixels (N, 3 or 1, H, W) in [-1, 1] to raw float32 moments (N, C, h, w)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) to float32 pixels (N, 3 or 1, H, W), clamped to [-1, 1]."""
        ...


class DiffusersAutoencoder:
    """A diffusers `AutoencoderKL` (stochastic) or `AutoencoderTiny` (deterministic), frozen."""

    pictures = True

    def __init__(self, name: str, model: nn.Module, *, device: torch.device | str, dtype: torch.dtype) -> None:
        config: Any = model.config
        self.name = name
        stochastic = config["_class_name"] == "AutoencoderKL"
        self.channels, self.pixel_channels = int(config.latent_channels), int(config.in_channels)
        self.latent_space = _latent_space(name, config, self.channels, stochastic)
        stages = config.block_out_channels if stochastic else config.encoder_block_out_channels
        self.downsample = 2 ** (len(stages) - 1)
        self.device, self.dtype = torch.device(device), dtype
        # convolutions in reduced precision are fastest in channels_last layout
        self.model = cast(Any, model.eval().requires_grad_(False))
        self.model.to(self.device, memory_format=torch.channels_last)
        self.most_pixels = MOST_PIXELS if self.device.type == "cuda" else None  #: decoded at a time; None: any number

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Moments:
        channels, height, width = pixels.shape[1:]
        if height % self.downsample or width % self.downsample:
            raise ValueError(
                f"autoencoder {self.name} needs sides that are multiples of {self.downsample}, "
                f"not {height}x{width}; choose another resolution"
            )
        if channels == 1 and self.pixel_channels == 3:
            pixels = pixels.expand(-1, 3, -1, -1)
        elif channels != self.pixel_channels:
            raise ValueError(f"autoencoder {self.name} reads {self.pixel_channels} channels, not {channels}")
        encoded = self.model.encode(self._cast(pixels))
        if not self.latent_space.stochastic:
            return Moments(encoded.latents.float().contiguous(), None)
        posterior = encoded.latent_dist
        return Moments(posterior.mean.float().contiguous(), posterior.std.float().contiguous())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        inputs = self._cast(self.latent_space.unscale(latents))
        most = self.most_pixels and max(1, self.most_pixels // (math.prod(latents.shape[2:]) * self.downsample**2))
        if not most or len(inputs) <= most:
            return self._decoded(inputs)
        # pieces of one size, so that a compiled decoder has one shape
        size = -(-len(inputs) // -(-len(inputs) // most))
        pieces = list(inputs.split(size))
        pieces[-1] = torch.cat([pieces[-1], pieces[-1][-1:].expand(size - len(pieces[-1]), -1, -1, -1)])
        decoded = [self._decoded(piece.contiguous(memory_format=torch.channels_last)) for piece in pieces]
        return torch.cat(decoded)[: len(inputs)]

    def _decoded(self, inputs: Tensor) -> Tensor:
        return self.model.decode(inputs).sample.float().clamp(-1, 1).contiguous()


def _latent_space(name: str, config: Any, channels: int, stochastic: bool) -> LatentSpace:
    """Shift and scale of a diffusers config: statistics of each channel where it has them, else one number for all.

    As diffusers' pipelines use them: latents = (sample - latents_mean) * scaling_factor / latents_std. ValueError where
    there are not as many as channels, or not all are finite and the deviations above zero.
    """
    scale, mean, std = float(config.scaling_factor), config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return LatentSpace(float(config.shift_factor or 0.0), scale, stochastic=stochastic)
    given = [[0.0] * channels if mean is None else mean, [1.0] * channels if std is None else std]
    numbers = all(
        isinstance(each, list | tuple) and len(each) == channels and all(isinstance(x, int | float) for x in each)
        for each in given
    )
    if not numbers or not all(map(math.isfinite, [*given[0], *given[1]])) or min(given[1]) <= 0:
        raise ValueError(
            f"autoencoder {name!r}: latents_mean and latents_std of its config should be {channels} finite numbers each, "
            "the second above zero"
        )
    return LatentSpace(tuple(map(float, given[0])), tuple(scale / x for x in given[1]), stochastic=stochastic)


#: supported classes of diffusers
DIFFUSERS_CLASSES = ("AutoencoderKL", "AutoencoderTiny")


def autoencoder_name(name: str) -> str:
    """The name to store: a local folder by its absolute path, so that it is found from any working directory."""
    return encoder_name(name) if has_network(name) else name


def has_network(name: str) -> bool:
    """Whether an autoencoder is a VAE: neither pixels or values as they are, nor sound or video."""
    return not identity_kind(name) and not is_media(name)


def load_autoencoder(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """Load an autoencoder: `pixel`, `values` (data that are not pictures), sound or video by its name in a manifest (see
    `media`), or a diffusers VAE by local folder or hub id.

    A hub id may include a folder of its repository (`owner/repository/vae`). Only safetensors are read, and no code is
    run. `dtype` is that of the network; moments and pixels are always float32.
    Raises ValueError when it does not exist, has an unknown class, has no safetensors, or when its weights do not match
    its config.
    """
    if identity_kind(name):
        return identity(name)
    if is_media(name):
        return parse_media(name)
    folder, subfolder = _locate(name)
    kind, _ = _class_and_config(name, folder, subfolder)
    try:
        model, info = kind.from_pretrained(
            folder, subfolder=subfolder, use_safetensors=True, torch_dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # diffusers raises many types; all mean unusable files
        raise ValueError(
            f"autoencoder {name!r} cannot be loaded ({first_line(error)}); safetensors weights are needed"
        ) from error
    # diffusers only warns about these, and initialises missing weights randomly
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info.get(kind) or ()]
    if wrong:
        raise ValueError(f"autoencoder {name!r}: {len(wrong)} weights do not fit its config, such as {wrong[0]}")
    return DiffusersAutoencoder(autoencoder_name(name), model, device=device, dtype=dtype)


def load_decoder(own: str, other: str | None, *, device: torch.device | str, dtype: torch.dtype) -> Autoencoder:
    """The VAE `other` (None: `own`) as decoder of latents that were encoded, shifted and scaled by `own`.

    Raises ValueError as `load_autoencoder`, and unless both have latents of the same channels and side.
    """
    if other is None:
        return load_autoencoder(own, device=device, dtype=dtype)
    decoder, encoder = load_autoencoder(other, device=device, dtype=dtype), _without_weights(own)
    known = (decoder.channels, decoder.downsample, decoder.pictures)
    if not isinstance(decoder, DiffusersAutoencoder) or known != (encoder.channels, encoder.downsample, True):
        raise ValueError(
            f"{other} cannot decode latents of {own}: {_latents(decoder)}, {_latents(encoder)}; give a VAE of the same latents"
        )
    decoder.latent_space = encoder.latent_space
    return decoder


def _latents(model: Autoencoder) -> str:
    if not isinstance(model, DiffusersAutoencoder):
        return f"{model.name} is no VAE"
    return f"those of {model.name} have {model.channels} channels and 1/{model.downsample} of the pictures' side"


def _without_weights(name: str) -> Autoencoder:
    """An autoencoder whose network is on the meta device, for its shapes and its latent space only."""
    if not has_network(name):
        return load_autoencoder(name)
    kind, config = _class_and_config(name, *_locate(name))
    with torch.device("meta"):
        model = kind.from_config(config)
    return DiffusersAutoencoder(autoencoder_name(name), model, device="meta", dtype=torch.float32)


def stored_files(name: str) -> list[Path]:
    """config.json and the safetensors of an autoencoder, in its folder or, for a hub id, in the hub's cache on this machine.

    Nothing is fetched. Empty for an autoencoder without weights, and for one that is not on this machine.
    """
    if not has_network(name):
        return []
    try:
        folder, subfolder = _locate(name)
        config: Any = Path(folder, "config.json")
        if not Path(folder).is_dir():
            from huggingface_hub import try_to_load_from_cache

            config = try_to_load_from_cache(folder, f"{subfolder}/config.json" if subfolder else "config.json")
    except ValueError:  # a folder that is gone, or no name of a repository
        return []
    weights = sorted(Path(config).parent.glob("*.safetensors")) if isinstance(config, str | Path) else []
    return [Path(config), *weights] if weights else []


def to_uint8(pixels: Tensor, rounding: str = "nearest") -> Tensor:
    """Pixels (N, C, H, W) in [-1, 1] to images (N, H, W, C) uint8, clamped; rounded to nearest, or `down`."""
    if rounding == "down":  # in the order of operations of published sampling code, so that it agrees to the last bit
        images = ((pixels.float() + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
    else:
        images = (pixels.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).contiguous()


def from_uint8(images: Tensor) -> Tensor:
    """Images (N, H, W, C) uint8 to float32 pixels (N, C, H, W) in [-1, 1]; `to_uint8` is its exact inverse."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def _locate(name: str) -> tuple[str, str | None]:
    """(folder or hub repository, subfolder in it or None)."""
    path = Path(name)
    if path.is_dir():
        return str(path), None
    parts = name.split("/")
    if path.exists() or path.is_absolute() or name.startswith(".") or len(parts) < 2 or not all(parts):
        raise ValueError(
            f"no autoencoder {name!r}: neither 'pixel', nor 'values', nor a folder, nor a hub id such as owner/name"
        )
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def _class_and_config(name: str, folder: str, subfolder: str | None) -> tuple[Any, dict[str, Any]]:
    """The class of diffusers that an autoencoder is of, and its config.json. ValueError for any other class."""
    path = Path(folder, "config.json")
    try:
        if not Path(folder).is_dir():
            from huggingface_hub import hf_hub_download

            # not by diffusers, which offline says that the repository has no such file
            path = Path(hf_hub_download(folder, "config.json", subfolder=subfolder))
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
    except Exception as error:  # missing, offline, gated, not json: the same to the user
        raise ValueError(f"no autoencoder {name!r}: its config.json cannot be read ({first_line(error)})") from error
    kind = config.get("_class_name")
    if kind not in DIFFUSERS_CLASSES:
        raise ValueError(
            f"autoencoder {name!r} is of class {kind!r}; supported: pixel, values, {', '.join(DIFFUSERS_CLASSES)}"
        )
    import diffusers

    return getattr(diffusers, kind), config
