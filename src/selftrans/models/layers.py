"""The parts a diffusion transformer is built of.

Shape legend: N batch, T tokens, D width, (C, *S) latent with one to three dimensions S: L, (H, W) or (F, H, W).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selftrans.models import fused_bias, fused_gelu, fused_norm


class RMSNorm(nn.RMSNorm):
    """torch's, with the weight in the precision of its input: under autocast the fused kernel takes no other."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def head_width(width: int, heads: int) -> int:
    """d, the channels of an attention head. ValueError where heads do not divide the width."""
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of heads {heads}; choose heads that divide the width")
    return width // heads


class Attention(nn.Module):
    """Multi-head self-attention through SDPA. Options: queries and keys are normalised, and then rotated by their positions."""

    def __init__(self, width: int, heads: int, qk_norm: bool, rms_norm: bool = False) -> None:
        super().__init__()
        self.heads, d = heads, head_width(width, heads)

        def norm() -> nn.Module:
            if not qk_norm:
                return nn.Identity()
            # 1e-5: the published LayerNorm (of timm) leaves torch's default, the published RMSNorm does not
            return RMSNorm(d, eps=1e-6) if rms_norm else nn.LayerNorm(d, eps=1e-5)

        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = norm(), norm()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        """(N, T, D) -> (N, T, D); rotations `table` (2, T, d / 2), or (2, N, T, d / 2)."""
        return self.proj(self.mixed(x, table))

    def mixed(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        """As `forward`, without the last layer."""
        fused = table is None and not isinstance(self.q_norm, RMSNorm)
        qkv, bias = fused_bias.linear(self.qkv, x) if fused else (self.qkv(x), None)
        if bias is not None:
            return attend(*fused_bias.split_heads(qkv, bias, self.heads, self.q_norm, self.k_norm))
        q, k, v = split_heads(qkv, self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if table is not None:
            q, k = (rotate(part, table.unsqueeze(dim=-2)) for part in (q, k))
        return attend(q.to(v.dtype), k.to(v.dtype), v)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of x (..., d) by the angles of `table` (2, ..., d / 2): cosines and sines."""
    cos, sin = table.unbind(dim=0)
    a, b = x.unflatten(-1, (-1, 2)).unbind(dim=-1)  # (..., d / 2)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(N, T, 3 D) -> queries, keys, values (N, T, h, d), all of them views.

    Split on an inner axis, so that backward writes the gradients into (N, T, 3, h, d), the layout that the product before
    takes; split on the first axis they are written once more. Norms of heads are best applied here, before `attend`
    transposes: in memory order a compiled norm is one kernel, in the other order two.
    """
    return qkv.unflatten(-1, (3, heads, -1)).unbind(dim=2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of queries, keys, values (N, T, h, d) -> (N, T, h d). `mask`: as SDPA takes it."""
    mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return mixed.transpose(1, 2).flatten(start_dim=2)


def gelu(x: Tensor) -> Tensor:
    """tanh-GELU. Compiled as x sigmoid(2 u), which equals x (1 + tanh u) / 2: the exponential is cheaper than tanh on a GPU."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return fused_bias.sigmoid_gelu(x)


class Mlp(nn.Module):
    """Two linear layers with tanh-GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if fused_gelu.applies(self.fc1, self.fc2, x):
            return fused_gelu.mlp(self.fc1, self.fc2, x)
        return self.fc2(self._hidden(x))

    def biased(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `forward`, with the bias of the last layer as from `fused_bias.linear`."""
        if not fused_gelu.applies(self.fc1, self.fc2, x):
            return fused_bias.linear(self.fc2, self._hidden(x))
        apart = fused_bias.applies(self.fc2, x)
        return fused_gelu.mlp(self.fc1, self.fc2, x, bias_apart=apart), self.fc2.bias if apart else None

    def _hidden(self, x: Tensor) -> Tensor:
        h, bias = fused_bias.linear(self.fc1, x)
        return gelu(h) if bias is None else fused_bias.gelu(h, bias)


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
        if fused_norm.applies(x):
            x, y = fused_norm.modulated(x, shift1, scale1, self.norm1.eps)
            # without it attention and MLP are called as modules: they may have hooks, or be others
            fused = fused_bias.FUSED_BIASES
            a, bias = fused_bias.linear(self.attn.proj, self.attn.mixed(y)) if fused else (self.attn(y), None)
            x, y = fused_norm.gate_modulated(x, a, gate1, shift2, scale2, self.norm2.eps, bias)
            gate2 = gate2.unsqueeze(dim=1)
            a, bias = self.mlp.biased(y) if fused else (self.mlp(y), None)
            return fused_bias.gate_add(x, a, gate2, bias)
        x = x + gate1.unsqueeze(dim=1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(dim=1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Modulated LayerNorm (or the norm that is given) and a linear map to patch pixels."""

    def __init__(self, width: int, out: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm_final = norm or nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (N, T, D), (N, D) -> (N, T, out)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


FREQUENCIES = 256  #: channels of the sinusoids of t


def time_rates(frequencies: int) -> Tensor:
    """(frequencies / 2,) angular rates of the sinusoids of t: from 1 down to nearly 1 / 10,000, geometrically."""
    half = frequencies // 2
    return torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=torch.float32))


class TimestepEmbedder(nn.Module):
    """Sinusoids of t (FREQUENCIES of them, periods up to 10,000) through a two-layer MLP."""

    rates: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        # as bits: a model that is cast to half precision must keep them
        self.register_buffer("rates", time_rates(FREQUENCIES).view(torch.int32), persistent=False)

    def forward(self, t: Tensor) -> Tensor:  # (N,) -> (N, D)
        angles = t.float()[:, None] * self.rates.view(torch.float32)[None, :]
        waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


LABEL_STD = 0.02  #: published deviation of an untrained label table (DiT, SiT)


class LabelEmbedder(nn.Module):
    """A learned vector per class, and one for the null label, which is `num_classes`. ValueError for other labels."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:  # (N,) -> (N, D)
        if labels.dtype not in (torch.int64, torch.int32):
            dtype = str(labels.dtype).removeprefix("torch.")
            raise ValueError(f"labels must be whole numbers (torch.long), not {dtype}")
        try:
            return self.embedding_table(labels)
        except IndexError as error:  # on the CPU; a GPU reports it by an assertion of its own
            classes = self.embedding_table.num_embeddings - 1
            known = f"0 to {classes - 1}, and {classes} for no condition" if classes else "0, as there are no classes"
            found = f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"labels from {found} are out of range: this model has {known}") from error


def axis_channels(channels: int, axes: int, remedy: str) -> list[int]:
    """How many of a token's channels hold its position on each axis: even numbers, equal ones with two axes.

    With three (frames, rows, columns) each gets a third, rounded down to an even number, and frames get the rest.
    ValueError, with the remedy, when there are too few channels.
    """
    need = 4 if axes == 2 else 2
    part = channels // axes // 2 * 2
    if channels % need or not part:
        raise ValueError(
            f"positions on {axes} axes need a multiple of {need} channels, not {channels}, and at least {2 * axes}; {remedy}"
        )
    return [channels - (axes - 1) * part, *[part] * (axes - 1)]


def axis_positions(side: int, rates: Tensor) -> Tensor:
    """(side, R) float64: the angles of the positions 0 .. side - 1 on one axis, at each of the rates (R,)."""
    return torch.arange(side, dtype=torch.float64, device=rates.device)[:, None] * rates[None, :]


def over_grid(line: Tensor, axis: int, grid: tuple[int, ...]) -> Tensor:
    """(side, R) of one axis -> (*grid, R): at each token what the line has at its position on that axis."""
    return line.view(*(side if k == axis else 1 for k, side in enumerate(grid)), -1).expand(*grid, -1)


def sincos_positions(width: int, grid: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """(T, width) fixed sine-cosine positions of a grid with one to three axes; on two they are those of MAE and DiT.

    The channels are divided among the axes (`axis_channels`), the last axis first: columns, rows, frames. Those of an axis
    are sines, then cosines of its position at geometrically falling rates, 1 to nearly 1 / 10,000. ValueError: `width`.
    """
    parts = []
    for axis, channels in enumerate(axis_channels(width, len(grid), "change model.width")):
        half = channels // 2
        rates = 1.0 / 10_000 ** (torch.arange(half, dtype=torch.float64, device=device) / half)
        angles = axis_positions(grid[axis], rates)  # (side, channels / 2)
        parts.append(over_grid(torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1), axis, grid))
    return torch.cat(parts[::-1], dim=-1).flatten(end_dim=-2).float()


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  #: of latents with one to three dimensions


class PatchEmbed(nn.Module):
    """Cut a latent into patches and map each to a token, in the order of the grid (row by row).

    `patch`: its size on each axis; a number means a square of a picture.
    """

    def __init__(self, channels: int, patch: int | tuple[int, ...], width: int) -> None:
        super().__init__()
        cells = (patch, patch) if isinstance(patch, int) else patch
        self.proj = CONVOLUTIONS[len(cells) - 1](channels, width, kernel_size=cells, stride=cells)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:  # (N, C, *S) -> (N, T, D)
        # contiguous: all that follows inherits the layout, and channels that lie apart cost a copy at each norm
        return self.proj(x).flatten(start_dim=2).transpose(1, 2).contiguous()


def patchify(x: Tensor, cells: tuple[int, ...]) -> Tensor:
    """(N, C, *S) cut into patches of `cells`: (N, T, C * cells), in the order of the grid; inside a token: channel, cell."""
    n, channels, *sides = x.shape
    grid = [side // p for side, p in zip(sides, cells, strict=True)]
    x = x.reshape(n, channels, *(k for pair in zip(grid, cells, strict=True) for k in pair))
    axes = range(2, 2 + 2 * len(cells), 2)
    x = x.permute(0, 1, *(axis + 1 for axis in axes), *axes)  # N, C, cells, grid
    return x.reshape(n, channels * math.prod(cells), math.prod(grid)).transpose(1, 2)


def unpatchify(
    tokens: Tensor, patch: int | tuple[int, ...], channels: int, grid: tuple[int, ...] | None = None
) -> Tensor:
    """(N, T, cells * C) -> (N, C, *S); inside a token: row, column, channel (DiT's order). grid None: a square picture.

    `patch` as `PatchEmbed` takes it. It is not the inverse of `patchify`, in which channels come first.
    """
    n, t, _ = tokens.shape
    cells = (patch, patch) if isinstance(patch, int) else patch
    grid = grid or (math.isqrt(t),) * 2
    x = tokens.view(n, *grid, *cells, channels)
    d = len(cells)
    order = (0, 2 * d + 1, *(axis for k in range(1, d + 1) for axis in (k, d + k)))
    return x.permute(order).reshape(n, channels, *(g * p for g, p in zip(grid, cells, strict=True)))


def initialise(model: Any, label_std: float | None = None) -> None:
    """DiT's initialisation of a model with its module names: Xavier, then zero gates and output, so that each block starts
    as the identity. `label_std`: deviation of the label table; None: there is none."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    projection = model.x_embedder.proj
    nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
    nn.init.zeros_(projection.bias)
    if label_std is not None:
        nn.init.normal_(model.y_embedder.embedding_table.weight, std=label_std)
    for weight in (model.t_embedder.mlp[0].weight, model.t_embedder.mlp[2].weight):
        nn.init.normal_(weight, std=0.02)
    for name, module in model.named_modules():
        if name.endswith("adaLN_modulation") or name == "final_layer.linear":
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
