"""A variational autoencoder of latent diffusion's code (VQGAN-KL: VA-VAE, LDM) => a folder that diffusers' AutoencoderKL loads.

The networks are the same; names differ, and attention has 1x1 convolutions there and linear layers here. VA-VAE
(github.com/hustvl/LightningDiT) normalises each channel of its latents by statistics, a file `latents_stats.pt` with mean and
std (1, C, 1, 1): they are kept in the folder's config.json as `latents_mean` and `latents_std`, diffusers' names.
Shape legend: C channels of a latent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from selftrans.interop.exporting import check_out
from selftrans.interop.published_file import load_content
from selftrans.messages import first_line, printable
from selftrans.models.spec import Named, check_shapes, count_and_names
from selftrans.plain_json import Number, from_plain, parse_object, read_text
from selftrans.storage import FREE_SPACE, atomic_directory, write_json

#: parts of a checkpoint that are the autoencoder; discriminators and vision models for the loss are left out
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
GROUPS = 32  #: of the group norms, in all of these networks
WEIGHTS = "diffusion_pytorch_model.safetensors"  #: diffusers' name


def import_vae(file: str | Path, out: str | Path, *, latent_stats: str | Path | None = None) -> Path:
    """Make the folder `out` from an autoencoder's checkpoint and the statistics of its latents; returns the folder.

    `prepare --autoencoder OUT` takes it. Nothing is unpickled. Written atomically. ValueError for a file that is no such
    autoencoder, statistics that do not fit it, and for an `out` that is not empty.
    """
    path, out = Path(file), Path(out)
    check_out(out, set(), "empty")
    named = _weights(path)
    config = _config(path, named)
    translated = {
        diffusers_name(name, len(config["block_out_channels"])): tensor for name, tensor in sorted(named.items())
    }
    translated = {
        name: t.flatten(start_dim=1) if re.search(r"\.to_\w+(\.0)?\.weight$", name) and t.dim() == 4 else t
        for name, t in translated.items()
    }
    _check(path, translated, config)
    if latent_stats is not None:
        mean, std = _statistics(Path(latent_stats), config["latent_channels"])
        config |= {"latents_mean": mean, "latents_std": std}
    try:
        with atomic_directory(out) as folder:
            save_file({name: t.float().contiguous() for name, t in translated.items()}, folder / WEIGHTS)
            write_json(folder / "config.json", {"_class_name": "AutoencoderKL", **config})
    except (OSError, SafetensorError) as error:
        raise OSError(f"{out} could not be written ({error}); {FREE_SPACE}") from error
    return out


def diffusers_name(name: str, levels: int) -> str:
    """The name of a tensor in diffusers' AutoencoderKL with so many resolutions; its decoder counts them the other way."""
    name = re.sub(r"\bdown\.(\d+)\.", r"down_blocks.\1.", name)
    name = re.sub(r"\bup\.(\d+)\.", lambda found: f"up_blocks.{levels - 1 - int(found[1])}.", name)
    name = re.sub(r"\.mid\.block_([12])\.", lambda found: f".mid_block.resnets.{int(found[1]) - 1}.", name)
    name = name.replace(".mid.attn_1.", ".mid_block.attn.0.").replace(".nin_shortcut.", ".conv_shortcut.")
    name = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", name)
    name = re.sub(r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv.", name)
    name = re.sub(
        r"\.attn\.(\d+)\.(\w+)\.", lambda found: f".attentions.{found[1]}.{ATTENTION.get(found[2], found[2])}.", name
    )
    return name.replace(".norm_out.", ".conv_norm_out.")


def _weights(path: Path) -> Named:
    """The autoencoder's tensors of a checkpoint, by their names. ValueError when it has none."""
    content = load_content(path)[0]
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    held = content if isinstance(content, Mapping) else {}
    named = {name: t for name, t in held.items() if isinstance(name, str) and name.startswith(PARTS)}
    for name, t in named.items():
        if not isinstance(t, Tensor) or t.layout != torch.strided or not t.is_floating_point():
            raise ValueError(f"{path}: entry {printable(name, 80)} is not a plain floating-point tensor")
        if not bool(torch.isfinite(t).all()):
            raise ValueError(f"{path}: {printable(name, 80)} holds values that are not finite")
    if not named:
        raise ValueError(f"{path} holds no autoencoder of latent diffusion; it holds {count_and_names(map(str, held))}")
    return named


def _config(path: Path, named: Named) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderKL, from names and shapes. ValueError where what shows a size is missing."""

    def shape(name: str) -> torch.Size:
        if name not in named or named[name].dim() != 4 or not named[name].numel():
            raise ValueError(f"{path} is no autoencoder of latent diffusion: {name} is missing, or no convolution")
        return named[name].shape

    def count(pattern: str) -> int:
        found = (re.match(pattern, name) for name in named)
        return len({each[1] for each in found if each})

    levels, layers = count(r"encoder\.down\.(\d{1,2})\.block\."), count(r"encoder\.down\.0\.block\.(\d{1,2})\.")
    attended = {i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in named}
    raised = {i for i in range(levels) if f"decoder.up.{i}.attn.0.q.weight" in named}
    return {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "latent_channels": shape("post_quant_conv.weight")[1],
        "block_out_channels": [shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)],
        "layers_per_block": layers,
        "down_block_types": [f"{'Attn' if i in attended else ''}DownEncoderBlock2D" for i in range(levels)],
        "up_block_types": [f"{'Attn' if i in raised else ''}UpDecoderBlock2D" for i in reversed(range(levels))],
        "norm_num_groups": GROUPS,
        "scaling_factor": 1.0,
    }


def _check(path: Path, named: Named, config: dict[str, Any]) -> None:
    """ValueError unless the tensors are exactly those of diffusers' class with this configuration."""
    from diffusers import AutoencoderKL

    try:
        with torch.device("meta"):
            model = AutoencoderKL(**{key: tuple(v) if isinstance(v, list) else v for key, v in config.items()})
    except Exception as error:  # diffusers raises many types; all mean sizes that do not go together
        raise ValueError(f"{path} is no autoencoder that diffusers can build ({first_line(error)})") from error
    check_shapes(str(path), named, {name: tuple(t.shape) for name, t in model.state_dict().items()})


def _statistics(path: Path, channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel: from json, or tensors `mean` and `std` (also (1, C, 1, 1)).

    ValueError unless both are C finite numbers, the deviations above zero.
    """
    if path.suffix == ".json":
        held: Any = parse_object(read_text(path), str(path), "give json with mean and std")
    else:
        content = load_content(path)[0]
        held = content if isinstance(content, Mapping) else {}
    found = []
    for name in ("mean", "std"):
        values = held.get(name)
        if isinstance(values, Tensor) and values.layout == torch.strided and values.is_floating_point():
            values = values.flatten().tolist() if values.numel() == channels else None
        try:
            numbers: tuple[float, ...] = from_plain(tuple[Number, ...], values, name)
        except ValueError:
            numbers = ()
        if len(numbers) != channels:
            raise ValueError(f"{path}: {name} should be {channels} finite numbers, one for each channel of the latents")
        found.append(list(numbers))
    if min(found[1]) <= 0:
        raise ValueError(f"{path}: std should be above zero for every channel")
    return found[0], found[1]
