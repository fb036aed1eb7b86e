"""LightningDiT (Yao et al., 2501.01423): SiT with rotary positions, SwiGLU and RMSNorm, on latents of many channels.

Parameter names are those of the published checkpoints. Shape legend: N batch, T tokens, D width, d channels of an
attention head, (C, H, W) latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selftrans.models.layers import (
    FinalLayer,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    initialise,
    sincos_positions,
    unpatchify,
)
from selftrans.models.sit import SIZES as SIT_WIDTHS
from selftrans.models.sit import chosen_sizes
from selftrans.models.spec import ModelConfig
from selftrans.types import Backbone, Cond, Conditions, Output, map_cond

#: width, depth, heads. Published: B, L, XL, 1p0B, 1p6B. S is SiT's, as LightningDiT has none so small
SIZES = SIT_WIDTHS | {"1p0B": (1536, 24, 24), "1p6B": (1792, 28, 28)}
#: name of a model -> the constructor's arguments (published: all but S and L/1)
LIGHTNING_SIZES = {
    f"LightningDiT-{size}/{patch}": {"width": width, "depth": depth, "heads": heads, "patch": patch}
    for size, (width, depth, heads) in SIZES.items()
    for patch in (1, 2)
}
MLP_RATIO = 4.0


@dataclass(frozen=True)
class LightningConfig(ModelConfig):
    """A LightningDiT. A field left at None comes from the size `name`; the other defaults are the published ones."""

    name: str = "LightningDiT-B/1"
    """size, LightningDiT-{S,B,L,XL,1p0B,1p6B}/{1,2}"""
    width: int | None = None
    """channels of a token"""
    depth: int | None = None
    """number of blocks"""
    heads: int | None = None
    """attention heads; with a width of your own, None means one per 64 channels"""
    patch: int | None = None
    """side of a token in latent pixels"""
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

    def sizes(self) -> dict[str, int]:
        """Constructor arguments width, depth, heads, patch. ValueError for an unknown name or a size out of range."""
        return chosen_sizes(self, LIGHTNING_SIZES)

    def options(self) -> dict[str, bool]:
        """Constructor arguments that say what the blocks are made of."""
        return {key: getattr(self, key) for key in OPTIONS}

    def check(self) -> None:
        self.sizes()

    def blocks(self) -> int:
        return self.sizes()["depth"]


OPTIONS = ("qk_norm", "swiglu", "rope", "rms_norm", "shift")


def build(config: LightningConfig, shape: tuple[int, ...], conditions: Conditions) -> LightningDiT:
    """A freshly initialised LightningDiT for latents (C, H, W). ValueError for other latents, and for text."""
    if conditions.kind == "text":
        raise ValueError(f"{config.name} is conditioned on labels or on nothing; the data have text")
    sizes: dict[str, Any] = {**config.sizes(), **config.options()}
    return LightningDiT(shape, conditions.num_classes, **sizes)


def rotation_table(channels: int, grid: tuple[int, int]) -> Tensor:
    """(2, T, d / 2) float64: cosine and sine of each pair of channels' angle at each token (RoPE, 2104.09864, in 2-D).

    The first half of the pairs turns with the row, the second with the column, at rates 10,000^(-4 i / d), i < d / 4.
    ValueError unless d is a multiple of 4.
    """
    if channels % 4:
        raise ValueError(
            f"rotary positions need attention heads of a multiple of 4 channels, not {channels}; change model.heads, or "
            "set model.rope False"
        )
    rates = 10_000.0 ** (-4 / channels * torch.arange(channels // 4, dtype=torch.float64))
    rows, columns = (torch.arange(n, dtype=torch.float64)[:, None] * rates for n in grid)  # (n, d / 4)
    size = (*grid, channels // 4)
    angles = torch.cat([rows[:, None].expand(size), columns[None].expand(size)], dim=-1).flatten(0, 1)  # (T, d / 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of x (..., T, d) by the angles of `table` (2, T, d / 2)."""
    cos, sin = table.unbind(dim=0)
    a, b = x.unflatten(-1, (-1, 2)).unbind(dim=-1)  # (..., T, d / 2)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


class RotaryAttention(nn.Module):
    """Multi-head self-attention through SDPA; queries and keys are normalised (an option), then rotated (likewise)."""

    def __init__(self, width: int, heads: int, qk_norm: bool, rms_norm: bool) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}; choose heads that divide the width")
        self.heads, d = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)

        def norm() -> nn.Module:  # 1e-5: the published LayerNorm leaves torch's default, its RMSNorm does not
            if not qk_norm:
                return nn.Identity()
            return RMSNorm(d, eps=1e-6) if rms_norm else nn.LayerNorm(d, eps=1e-5)

        self.q_norm, self.k_norm = norm(), norm()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:  # (N, T, D), (2, T, d / 2) -> (N, T, D)
        n, t, width = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(dim=0)
        q, k = self.q_norm(q), self.k_norm(k)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(x.transpose(1, 2).reshape(n, t, width))


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
        self.attn = RotaryAttention(width, heads, qk_norm, rms_norm)
        # the published expression: another order of the operations rounds some widths down by one
        self.mlp: nn.Module = SwiGLU(width, int(2 / 3 * hidden)) if swiglu else Mlp(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (6 if shift else 4) * width))
        self.shift = shift

    def forward(self, x: Tensor, c: Tensor, table: Tensor | None = None) -> Tensor:
        """(N, T, D), (N, D), (2, T, d / 2) -> (N, T, D)"""
        parts = self.adaLN_modulation(c).unsqueeze(dim=1).chunk(6 if self.shift else 4, dim=-1)  # each (N, 1, D)
        scale1, gate1, scale2, gate2 = parts[1:3] + parts[4:] if self.shift else parts
        h = self.norm1(x) * (1 + scale1)
        x = x + gate1 * self.attn(h + parts[0] if self.shift else h, table)
        h = self.norm2(x) * (1 + scale2)
        return x + gate2 * self.mlp(h + parts[3] if self.shift else h)


class RMSNorm(nn.RMSNorm):
    """torch's, with the weight in the precision of its input: under autocast the fused kernel takes no other."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def _norm(width: int, rms_norm: bool) -> nn.Module:
    return RMSNorm(width, eps=1e-6) if rms_norm else nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class LightningDiT(Backbone):
    """A class-conditional (or, with num_classes = 0, unconditional) LightningDiT.

    Args:
        shape: (C, H, W) of a latent, H and W multiples of `patch`; the published models have H == W.
        num_classes: labels 0 .. num_classes - 1; the null label is num_classes.
        qk_norm, swiglu, rope, rms_norm, shift: see `LightningConfig`.
        learn_sigma: the output layer carries a second, unused half.
    Raises ValueError when the sizes do not fit each other.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        *,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        qk_norm: bool = False,
        swiglu: bool = True,
        rope: bool = True,
        rms_norm: bool = True,
        shift: bool = True,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"LightningDiT takes latents of pictures (C, H, W), not {tuple(shape)}")
        channels, rows, columns = shape
        if rows % patch or columns % patch:
            raise ValueError(
                f"a latent of {rows}x{columns} does not divide into patches of {patch}; change model.patch"
            )
        grid = (rows // patch, columns // patch)
        self.shape, self.grid = (channels, rows, columns), grid
        self.conditions = Conditions("labels" if num_classes else "none", num_classes)
        self.width, self.depth, self.patch, self.num_classes = width, depth, patch, num_classes
        self.x_embedder = PatchEmbed(channels, patch, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        side = max(grid)  # positions of a square, cut to the latent
        positions = sincos_positions(width, side).view(side, side, width)[: grid[0], : grid[1]].reshape(1, -1, width)
        self.register_buffer("pos_embed", positions, persistent=False)
        options = {"qk_norm": qk_norm, "swiglu": swiglu, "rms_norm": rms_norm, "shift": shift}
        self.blocks = nn.ModuleList(LightningBlock(width, heads, **options, mlp_ratio=MLP_RATIO) for _ in range(depth))
        table = rotation_table(width // heads, grid).float() if rope else None
        self.register_buffer("rotations", table, persistent=False)
        self.final_layer: FinalLayer | None = FinalLayer(width, patch * patch * channels * (2 if learn_sigma else 1))
        if rms_norm:
            self.final_layer.norm_final = _norm(width, rms_norm)  # type: ignore[assignment]
        initialise(self)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, *, taps: tuple[int, ...] = (), stop: bool = False) -> Output:
        """x (N, C, H, W), t (N,), labels (N,) -> velocity (N, C, H, W) and the features of blocks `taps` (1-based)."""
        assert isinstance(cond, Tensor) and all(1 <= k <= self.depth for k in taps)
        tokens = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(cond)  # (N, D)
        rotations = () if self.rotations is None else (self.rotations,)
        feats: dict[int, Tensor] = {}
        for k, block in enumerate(self.blocks, start=1):
            tokens = self.run_block(block, tokens, c, *rotations)  # type: ignore[arg-type]
            if k in taps:
                feats[k] = tokens
            if stop and len(feats) == len(set(taps)):
                return Output(None, feats)
        assert self.final_layer is not None, "a truncated model has no velocity; call it with stop=True"
        channels = self.final_layer.linear.out_features // self.patch**2
        out = unpatchify(self.final_layer(tokens, c), self.patch, channels, (self.grid[0], self.grid[1]))
        return Output(out[:, : self.shape[0]], feats)

    def null(self, cond: Cond) -> Cond:
        return map_cond(lambda labels: torch.full_like(labels, self.num_classes), cond)

    def patchify(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, T, C patch²), row by row; inside a token: channel, row, column."""
        return F.unfold(x, kernel_size=self.patch, stride=self.patch).transpose(1, 2)

    def repeated(self) -> list[nn.Module]:
        return list(self.blocks)

    def truncate(self, block: int) -> None:
        del self.blocks[block:]
        self.final_layer = None
