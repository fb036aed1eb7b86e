"""LightningDiT (Yao et al., 2501.01423): SiT with rotary positions, SwiGLU and RMSNorm, on latents of many channels.

Parameter names are those of the published checkpoints. Shape legend: N batch, T tokens, D width, d channels of an
attention head, (C, *S) latent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selftrans.models.label_transformer import LabelledConfig, LabelTransformer
from selftrans.models.layers import LABEL_STD, Attention, Mlp, RMSNorm, axis_channels, axis_positions, over_grid
from selftrans.models.patch_transformer import published_sizes
from selftrans.models.sit import SIZES as SIT_WIDTHS
from selftrans.types import Conditions

#: width, depth, heads. Published: B, L, XL, 1p0B, 1p6B. S is SiT's, as LightningDiT has none so small
SIZES = SIT_WIDTHS | {"1p0B": (1536, 24, 24), "1p6B": (1792, 28, 28)}
LIGHTNING_SIZES = published_sizes("LightningDiT", SIZES, patches=(1, 2))  #: published: all but S and L/1
MLP_RATIO = 4.0


@dataclass(frozen=True)
class LightningConfig(LabelledConfig):
    """A LightningDiT. A field left at None comes from the size `name`; the other defaults are the published ones."""

    published = LIGHTNING_SIZES

    name: str = "LightningDiT-B/1"
    """size, LightningDiT-{S,B,L,XL,1p0B,1p6B}/{1,2}"""
    qk_norm: bool = False
    """norm on queries and keys; its authors advise it where the loss diverges"""
    swiglu: bool = True
    """SwiGLU MLP, 2/3 as wide as the other; False: GELU"""
    rope: bool = True
    """rotary positions in attention, besides the sine-cosine ones that are always added to the tokens"""
    rms_norm: bool = True
    """RMSNorm with a learned weight; False: LayerNorm"""
    shift: bool = True
    """the condition also shifts the input of attention and MLP; False: it scales and gates them only"""


#: constructor arguments that say what the blocks are made of
OPTIONS = ("qk_norm", "swiglu", "rope", "rms_norm", "shift")


def build(config: LightningConfig, shape: tuple[int, ...], conditions: Conditions) -> LightningDiT:
    """A freshly initialised LightningDiT for latents (C, *S). ValueError for shapes that it cannot take, and for text."""
    return config.build(LightningDiT, shape, conditions, OPTIONS)


def rotation_table(channels: int, grid: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """(2, T, d / 2) float64: cosine and sine of each pair of channels' angle at each token (RoPE, 2104.09864).

    The pairs are divided among the axes (`axis_channels`), in their order: on two, the first half turns with the row, the
    second with the column. Those of an axis with p pairs turn at rates 10,000^(-i / p), i < p. ValueError: d does not divide.
    """
    parts = []
    remedy = "change model.heads, or set model.rope False"
    for axis, own in enumerate(axis_channels(channels, len(grid), remedy)):
        pairs = own // 2
        rates = 10_000.0 ** (-1 / pairs * torch.arange(pairs, dtype=torch.float64, device=device))
        parts.append(over_grid(axis_positions(grid[axis], rates), axis, grid))
    angles = torch.cat(parts, dim=-1).flatten(end_dim=-2)  # (T, d / 2)
    return torch.stack([angles.cos(), angles.sin()])


class SwiGLU(nn.Module):
    """silu(A x) * (B x) through a last layer (2002.05202); A and B are one layer `w12`, all with biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class LightningBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning; without `shift` the condition gives two scales and two gates."""

    def __init__(
        self, width: int, heads: int, *, qk_norm: bool, swiglu: bool, rms_norm: bool, shift: bool, mlp_ratio: float
    ) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = _norm(width, rms_norm)
        self.norm2 = _norm(width, rms_norm)
        self.attn = Attention(width, heads, qk_norm, rms_norm)
        # the published expression: another order of the operations rounds some widths down by one
        self.mlp: nn.Module = SwiGLU(width, int(2 / 3 * hidden)) if swiglu else Mlp(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (6 if shift else 4) * width))
        self.shift = shift

    def forward(self, x: Tensor, c: Tensor, table: Tensor | None = None) -> Tensor:
        """(N, T, D), (N, D), (2, T, d / 2) or (2, N, T, d / 2) -> (N, T, D)"""
        parts = self.adaLN_modulation(c).unsqueeze(dim=1).chunk(6 if self.shift else 4, dim=-1)  # each (N, 1, D)
        scale1, gate1, scale2, gate2 = parts[1:3] + parts[4:] if self.shift else parts
        h = self.norm1(x) * (1 + scale1)
        x = x + gate1 * self.attn(h + parts[0] if self.shift else h, table)
        h = self.norm2(x) * (1 + scale2)
        return x + gate2 * self.mlp(h + parts[3] if self.shift else h)


def _norm(width: int, rms_norm: bool) -> nn.Module:
    return RMSNorm(width, eps=1e-6) if rms_norm else nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class LightningDiT(LabelTransformer):
    """A `LabelTransformer` of LightningDiT's blocks. For its options see `LightningConfig`."""

    rotations: Tensor | None

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        *,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        patch_frames: int = 1,
        qk_norm: bool = False,
        swiglu: bool = True,
        rope: bool = True,
        rms_norm: bool = True,
        shift: bool = True,
        learn_sigma: bool = False,
        label_std: float = LABEL_STD,
    ) -> None:
        options = {"qk_norm": qk_norm, "swiglu": swiglu, "rms_norm": rms_norm, "shift": shift}
        super().__init__(
            shape,
            num_classes,
            lambda: LightningBlock(width, heads, **options, mlp_ratio=MLP_RATIO),
            width=width,
            depth=depth,
            patch=patch,
            patch_frames=patch_frames,
            learn_sigma=learn_sigma,
            norm=_norm(width, rms_norm),
            label_std=label_std,
        )
        table = rotation_table(width // heads, self.grid).float() if rope else None
        self.register_buffer("rotations", table, persistent=False)

    def block_inputs(self, grid: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The rotations (2, T, d / 2) of a grid, if there are any."""
        own = self.rotations
        if own is None or grid == self.grid:
            return () if own is None else (own,)
        return (rotation_table(2 * own.shape[-1], grid, own.device).float().to(own.dtype),)

    def kept_inputs(self, inputs: tuple[Tensor, ...], kept: Tensor) -> tuple[Tensor, ...]:
        """The rotations of the tokens `kept` (N, K): (2, N, K, d / 2)."""
        return tuple(table[:, kept] for table in inputs)
