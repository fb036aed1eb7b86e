"""LightningDiT's checkpoints as its repository writes them, and its network from the papers' formulas, in float64.

Nothing of selftrans is used. Positions are diffusers'; rotations are complex numbers, norms and gates are written out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support import published_files

Named = dict[str, Tensor]
TINY = {"width": 32, "depth": 3, "heads": 2, "patch": 1, "channels": 2, "side": 4, "classes": 10}
#: options of the released models; all of them are independent
RELEASED = {"qk_norm": False, "swiglu": True, "rope": True, "rms_norm": True, "shift": True}


def state(rope: bool = True, **given: Any) -> Named:
    """A state dict with the released options, but for what is given (`published_files.state`), and its rotary tables."""
    d, grid = given["width"] // given["heads"], given["side"] // given["patch"]
    angles = angle_table(d, (grid, grid)).float().repeat_interleave(2, dim=-1)
    tables = {"feat_rope.freqs_cos": angles.cos(), "feat_rope.freqs_sin": angles.sin()}
    released = {"swiglu": True, "rms_norm": True}
    return published_files.state(**{**released, **given}, rope=tables if rope else None)


def settings(**transport: Any) -> dict[str, Any]:
    """What its training command keeps of itself, under `config`."""
    return {
        "data": {"data_path": "latents", "image_size": 256, "num_classes": 10, "latent_norm": True},
        "model": {"model_type": "LightningDiT-XL/1", "use_qknorm": False, "use_swiglu": True, "in_chans": 2},
        "transport": {"path_type": "Linear", "prediction": "velocity", "loss_weight": None} | transport,
    }


def angle_table(d: int, grid: tuple[int, int]) -> Tensor:
    """(T, d / 2) float64 angles: row times theta^(-2j / (d / 2)), then column times the same."""
    rates = torch.tensor([10_000.0 ** (-2 * j / (d // 2)) for j in range(d // 4)], dtype=torch.float64)
    return torch.stack([torch.cat([r * rates, c * rates]) for r in range(grid[0]) for c in range(grid[1])])


def normalised(named: Named, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm where the norm has a weight and no bias, otherwise LayerNorm with what it has."""
    weight, bias = named.get(f"{name}.weight"), named.get(f"{name}.bias")
    if weight is not None and bias is None:
        return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight
    x = x - x.mean(dim=-1, keepdim=True)
    x = x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return x if weight is None else x * weight + bias


def linear(named: Named, name: str, x: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, named[f"{name}.weight"]) + named[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def attention(named: Named, name: str, x: Tensor, heads: int, grid: tuple[int, int], rope: bool) -> Tensor:
    n, t, width = x.shape
    d = width // heads
    q, k, v = (p.reshape(n, t, heads, d).transpose(1, 2) for p in linear(named, f"{name}.qkv", x).split(width, dim=-1))
    if f"{name}.q_norm.weight" in named:
        eps = 1e-5 if f"{name}.q_norm.bias" in named else 1e-6  # torch's LayerNorm; its own RMSNorm
        q, k = normalised(named, f"{name}.q_norm", q, eps), normalised(named, f"{name}.k_norm", k, eps)
    if rope:
        turn = torch.polar(torch.ones(t, d // 2, dtype=torch.float64), angle_table(d, grid))
        q, k = (
            torch.view_as_real(torch.view_as_complex(p.reshape(n, heads, t, d // 2, 2).contiguous()) * turn).flatten(-2)
            for p in (q, k)
        )
    weights = torch.softmax(torch.einsum("nhqd,nhkd->nhqk", q, k) / d**0.5, dim=-1)
    mixed = torch.einsum("nhqk,nhkd->nqhd", weights, v).reshape(n, t, width)
    return linear(named, f"{name}.proj", mixed)


def mlp(named: Named, name: str, x: Tensor) -> Tensor:
    if f"{name}.w12.weight" in named:
        a, b = linear(named, f"{name}.w12", x).tensor_split(2, dim=-1)
        return linear(named, f"{name}.w3", silu(a) * b)
    h = linear(named, f"{name}.fc1", x)
    h = h / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    return linear(named, f"{name}.fc2", h)


def block(named: Named, name: str, x: Tensor, c: Tensor, heads: int, grid: tuple[int, int], rope: bool) -> Tensor:
    """x (N, T, D), c (N, D), all in the dtype of `named` -> (N, T, D)"""
    parts = linear(named, f"{name}.adaLN_modulation.1", silu(c))[:, None]
    if parts.shape[-1] == 6 * x.shape[-1]:
        shift1, scale1, gate1, shift2, scale2, gate2 = parts.split(x.shape[-1], dim=-1)
    else:
        scale1, gate1, scale2, gate2 = parts.split(x.shape[-1], dim=-1)
        shift1 = shift2 = torch.zeros_like(scale1)
    h = normalised(named, f"{name}.norm1", x) * (1 + scale1) + shift1
    x = x + gate1 * attention(named, f"{name}.attn", h, heads, grid, rope)
    h = normalised(named, f"{name}.norm2", x) * (1 + scale2) + shift2
    return x + gate2 * mlp(named, f"{name}.mlp", h)


def network(named: Named, x: Tensor, t: Tensor, labels: Tensor, *, heads: int, rope: bool) -> Tensor:
    """The published network in float64 and in its own time: x (N, C, H, W), t (N,), labels (N,) -> (N, C, H, W)."""
    named, x = {name: tensor.double() for name, tensor in named.items()}, x.double()
    kernel, (n, channels, rows, columns) = named["x_embedder.proj.weight"], x.shape
    p = kernel.shape[-1]
    grid = (rows // p, columns // p)
    cut = x.reshape(n, channels, grid[0], p, grid[1], p)
    tokens = torch.einsum("ncrpsq,dcpq->nrsd", cut, kernel).flatten(1, 2) + named["x_embedder.proj.bias"]
    tokens = tokens + named["pos_embed"]
    rates = torch.exp(-torch.arange(128, dtype=torch.float64) / 128 * torch.log(torch.tensor(1e4, dtype=torch.float64)))
    waves = torch.cat([torch.cos(t.double()[:, None] * rates), torch.sin(t.double()[:, None] * rates)], dim=-1)
    c = linear(named, "t_embedder.mlp.2", silu(linear(named, "t_embedder.mlp.0", waves)))
    c = c + named["y_embedder.embedding_table.weight"][labels]
    for i in range(len({name.split(".")[1] for name in named if name.startswith("blocks.")})):
        tokens = block(named, f"blocks.{i}", tokens, c, heads, grid, rope)
    shift, scale = linear(named, "final_layer.adaLN_modulation.1", silu(c))[:, None].tensor_split(2, dim=-1)
    tokens = normalised(named, "final_layer.norm_final", tokens) * (1 + scale) + shift
    out = linear(named, "final_layer.linear", tokens).reshape(n, *grid, p, p, -1)
    return torch.einsum("nrspqc->ncrpsq", out).reshape(n, -1, rows, columns)[:, :channels]
