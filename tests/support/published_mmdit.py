"""Checkpoints as REPA's text-to-image code writes them, and its network by its formulas, without anything of selftrans."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from torch import Tensor

from tests.support.published_files import Named, Tensors

#: the published class has 32 channels a head, as many heads as blocks, 16 x 16 patches, and text of 768 channels
TINY = {"depth": 2, "patch": 1, "channels": 2, "grid": 16, "text": 768}


def state(
    depth: int,
    patch: int,
    channels: int,
    grid: int,
    text: int,
    *,
    qk_norm: bool = False,
    heads: str = "",
    seed: int | None = 0,
) -> Named:
    """A state dict, in the order in which the published module registers it; `heads`: "repa" or "stage1"."""
    out, width = Tensors(seed), 32 * depth
    out["pos_embed"] = get_2d_sincos_pos_embed(width, grid, base_size=grid, output_type="pt")[None].float()
    out.conv("x_embedder.proj", width, channels, patch)
    out.linear("t_embedder.mlp.0", width, 256)
    out.linear("t_embedder.mlp.2", width, width)
    out.linear("context_embedder", width, text)
    for i in range(depth):
        for side in ("context_block", "x_block"):
            name, last = f"joint_blocks.{i}.{side}", side == "context_block" and i == depth - 1
            out.linear(f"{name}.attn.qkv", 3 * width, width)
            if not last:
                out.linear(f"{name}.attn.proj", width, width)
            if qk_norm:
                for norm in ("ln_q", "ln_k"):
                    out.norm(f"{name}.attn.{norm}", 32, bias=False)
            if not last:
                out.linear(f"{name}.mlp.fc1", 4 * width, width)
                out.linear(f"{name}.mlp.fc2", width, 4 * width)
            out.linear(f"{name}.adaLN_modulation.1", (2 if last else 6) * width, width)
    out.linear("final_layer.linear", patch * patch * channels, width)
    out.linear("final_layer.adaLN_modulation.1", 2 * width, width)
    for part, (rows, columns) in {"0": (16, width), "2": (16, 16), "4": (width, 16)}.items() if heads else ():
        out.linear(f"projectors.{'0.' if heads == 'repa' else ''}{part}", rows, columns)
    if heads == "stage1":
        out.linear("projectors_final.linear", patch * patch * channels, width)
        out.linear("projectors_final.adaLN_modulation.1", 2 * width, width)
    return dict(out)


def linear(named: Named, name: str, x: Tensor) -> Tensor:
    return F.linear(x, named[f"{name}.weight"], named[f"{name}.bias"])


def normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights (epsilon 1e-6), then 1 + scale and shift of each image."""
    x = (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    return x * (1 + scale[:, None]) + shift[:, None]


def rms(named: Named, name: str, x: Tensor) -> Tensor:
    weight = named.get(f"{name}.weight")
    return x if weight is None else x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight


def network(named: Named, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """(N, C, H, W), (N,), (N, L, E) -> velocity (N, C, H, W): noise minus data, where t = 0 is data."""
    depth = len({name.split(".")[1] for name in named if name.startswith("joint_blocks")})
    kernel = named["x_embedder.proj.weight"]
    width, channels, patch, _ = kernel.shape
    grid = x.shape[-1] // patch
    h = F.conv2d(x, kernel, named["x_embedder.proj.bias"], stride=patch).flatten(2).transpose(1, 2) + named["pos_embed"]
    waves = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    c = F.silu(linear(named, "t_embedder.mlp.2", F.silu(linear(named, "t_embedder.mlp.0", waves))))
    streams = {"context_block": linear(named, "context_embedder", text), "x_block": h}
    for i in range(depth):
        mods, parts = {}, []
        for side, tokens in streams.items():
            name = f"joint_blocks.{i}.{side}"
            mods[side] = linear(named, f"{name}.adaLN_modulation.1", c).split(width, dim=-1)
            qkv = linear(named, f"{name}.attn.qkv", normed(tokens, mods[side][0], mods[side][1]))
            q, k, v = qkv.unflatten(-1, (3, -1, 32)).unbind(dim=2)  # each (N, T, h, 32)
            parts.append((rms(named, f"{name}.attn.ln_q", q), rms(named, f"{name}.attn.ln_k", k), v))
        q, k, v = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
        weights = torch.einsum("nqhd,nkhd->nhqk", q, k).div(math.sqrt(32)).softmax(dim=-1)
        mixed = torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2)
        given = dict(zip(streams, mixed.split([s.shape[1] for s in streams.values()], dim=1), strict=True))
        if i == depth - 1:
            del streams["context_block"]
        for side in streams:
            name = f"joint_blocks.{i}.{side}"
            _, _, gate, shift, scale, gate2 = mods[side]
            tokens = streams[side] + gate[:, None] * linear(named, f"{name}.attn.proj", given[side])
            hidden = F.gelu(linear(named, f"{name}.mlp.fc1", normed(tokens, shift, scale)), approximate="tanh")
            streams[side] = tokens + gate2[:, None] * linear(named, f"{name}.mlp.fc2", hidden)
    shift, scale = linear(named, "final_layer.adaLN_modulation.1", c).chunk(2, dim=-1)
    cells = linear(named, "final_layer.linear", normed(streams["x_block"], shift, scale))
    cells = cells.reshape(len(x), grid, grid, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
    return cells.reshape(len(x), channels, grid * patch, grid * patch)
