"""The parts a diffusion transformer is built of. Shape legend: N batch, T tokens, D width, C H W latent."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention through SDPA, with LayerNorm on queries and keys as an option."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}; choose heads that divide the width")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        # 1e-5, unlike the other norms: the published models have their attention from timm, which leaves torch's default
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-5) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, D) -> (N, T, D)
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(dim=0)
        x = F.scaled_dot_product_attention(self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v)
        return self.proj(x.transpose(1, 2).reshape(n, t, d))


class Mlp(nn.Module):
    """Two linear layers with tanh-GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (N, T, D) shifted and scaled per image by (N, D)."""
    return x * (1 + scale.unsqueeze(dim=1)) + shift.unsqueeze(dim=1)


class Block(nn.Module):
    """Transformer block with adaLN-Zero conditioning (DiT, 2212.09748, section 3.2)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (N, T, D), (N, D) -> (N, T, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1.unsqueeze(dim=1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(dim=1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a linear map to patch pixels."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (N, T, D), (N, D) -> (N, T, out)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def time_rates(frequencies: int, device: torch.device | None = None) -> Tensor:
    """(frequencies / 2,) angular rates of the sinusoids of t: from 1 down to nearly 1 / 10,000, geometrically."""
    half = frequencies // 2
    return torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=torch.float32, device=device))


class TimestepEmbedder(nn.Module):
    """Sinusoids of t (256 of them, periods up to 10,000) through a two-layer MLP."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.frequencies = frequencies

    def forward(self, t: Tensor) -> Tensor:  # (N,) -> (N, D)
        angles = t.float()[:, None] * time_rates(self.frequencies, t.device)[None, :]
        waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """A learned vector per class, and one for the null label, which is `num_classes`."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:  # (N,) -> (N, D)
        return self.embedding_table(labels)


def sincos_positions(width: int, side: int) -> Tensor:
    """(side², width) fixed 2-D sine-cosine positions: first half of the channels by column, second by row (MAE, DiT)."""
    if width % 4:
        raise ValueError(f"width {width} is not a multiple of 4, which 2-D sine-cosine positions need")
    rates = 1.0 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates[None, :]  # (side, width / 4)
    line = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)  # (side, width / 2)
    column = line[None, :, :].expand(side, side, -1)
    row = line[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], dim=-1).reshape(side * side, width).float()


class PatchEmbed(nn.Module):
    """Cut a latent into square patches and map each to a token, row by row."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, T, D)
        # contiguous: all that follows inherits the layout, and channels that lie apart cost a copy at each norm
        return self.proj(x).flatten(start_dim=2).transpose(1, 2).contiguous()


def unpatchify(tokens: Tensor, patch: int, channels: int, grid: tuple[int, int] | None = None) -> Tensor:
    """(N, T, patch² C) -> (N, C, H, W); inside a token: row, column, channel (DiT's order). grid None: a square latent."""
    n, t, _ = tokens.shape
    rows, columns = grid or (math.isqrt(t),) * 2
    x = tokens.view(n, rows, columns, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, channels, rows * patch, columns * patch)


def initialise(model: Any) -> None:
    """DiT's initialisation of a model with its module names: Xavier, then zero gates and output, so that each block starts
    as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    projection = model.x_embedder.proj
    nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
    nn.init.zeros_(projection.bias)
    nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.02)
    for weight in (model.t_embedder.mlp[0].weight, model.t_embedder.mlp[2].weight):
        nn.init.normal_(weight, std=0.02)
    final = model.final_layer
    for module in [*(block.adaLN_modulation for block in model.blocks), final.adaLN_modulation, final.linear]:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
