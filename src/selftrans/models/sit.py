"""SiT, the scalable interpolant transformer (Ma et al., 2401.08740): DiT's architecture, predicting a velocity.

Parameter names are those of the published checkpoints. Shape legend: N batch, T tokens, D width, (C, H, W) latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selftrans.models.layers import (
    Block,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    initialise,
    sincos_positions,
    unpatchify,
)
from selftrans.models.spec import ModelConfig
from selftrans.suggest import nearest
from selftrans.types import Backbone, Cond, Conditions, Output, map_cond

#: published sizes: width, depth, heads (SiT, table 1)
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
PATCHES = (1, 2, 4, 8)
#: name of a published model -> the constructor's arguments
SIT_SIZES = {
    f"SiT-{size}/{patch}": {"width": width, "depth": depth, "heads": heads, "patch": patch}
    for size, (width, depth, heads) in SIZES.items()
    for patch in PATCHES
}


LARGEST = 1 << 20  #: of a size: what is beyond is a mistake, or an attempt to take all time and memory


@dataclass(frozen=True)
class SiTConfig(ModelConfig):
    """The student. A field left at None comes from the published size `name`."""

    published: ClassVar[dict[str, dict[str, int]]] = SIT_SIZES

    name: str = "SiT-S/2"
    """published size, SiT-{S,B,L,XL}/{1,2,4,8}"""
    width: int | None = None
    """channels of a token"""
    depth: int | None = None
    """number of blocks"""
    heads: int | None = None
    """attention heads; with a width of your own, None means one per 64 channels"""
    patch: int | None = None
    """side of a token in latent pixels"""
    qk_norm: bool = True
    """LayerNorm on queries and keys, as in the released models"""

    def sizes(self) -> dict[str, int]:
        """Constructor arguments width, depth, heads, patch. ValueError for an unknown name or a size below one."""
        return chosen_sizes(self, self.published)

    def check(self) -> None:
        self.sizes()

    def blocks(self) -> int:
        return self.sizes()["depth"]


def chosen_sizes(config: Any, published: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Width, depth, heads, patch: those of the published size `config.name`, replaced by the fields that are given.

    ValueError for an unknown name or a size out of range.
    """
    if config.name not in published:
        raise ValueError(f"model.name '{config.name}' is unknown{nearest(config.name, published)}")
    chosen = {key: getattr(config, key) for key in ("width", "depth", "heads", "patch")}
    for key, value in chosen.items():
        if value is not None and value < 1:
            raise ValueError(f"model.{key} must be above zero, not {value}")
        if value is not None and value > LARGEST:
            raise ValueError(f"model.{key} must be at most {LARGEST}, not {value}")
    sizes = {**published[config.name], **{key: value for key, value in chosen.items() if value is not None}}
    if config.heads is None and sizes["width"] != published[config.name]["width"]:
        width = sizes["width"]
        sizes["heads"] = next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)
    return sizes


def build(config: SiTConfig, shape: tuple[int, ...], conditions: Conditions) -> SiT:
    """A freshly initialised SiT for latents (C, H, W). ValueError for other latents, and for text."""
    if conditions.kind == "text":
        raise ValueError(f"{config.name} is conditioned on labels or on nothing; the data have text")
    return SiT(shape, conditions.num_classes, qk_norm=config.qk_norm, **config.sizes())  # type: ignore[arg-type]


class SiT(Backbone):
    """A class-conditional (or, with num_classes = 0, unconditional) diffusion transformer on square latents.

    Args:
        shape: (C, H, W) of a latent, H == W, a multiple of `patch`.
        num_classes: labels 0 .. num_classes - 1; the null label is num_classes.
        learn_sigma: the output layer carries a second, unused half, as in the original SiT checkpoints.
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
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"SiT takes latents of pictures (C, H, W), not {tuple(shape)}; choose another model")
        channels, height, side = shape
        if height != side or side % patch:
            raise ValueError(
                f"a latent of {height}x{side} does not divide into square patches of {patch}; change model.patch"
            )
        self.shape, self.grid = (channels, height, side), (height // patch, side // patch)
        self.conditions = Conditions("labels" if num_classes else "none", num_classes)
        self.width, self.depth, self.patch, self.num_classes = width, depth, patch, num_classes
        self.x_embedder = PatchEmbed(channels, patch, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.register_buffer("pos_embed", sincos_positions(width, side // patch)[None], persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_layer: FinalLayer | None = FinalLayer(width, patch * patch * channels * (2 if learn_sigma else 1))
        initialise(self)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, *, taps: tuple[int, ...] = (), stop: bool = False) -> Output:
        """x (N, C, H, W), t (N,), labels (N,) -> velocity (N, C, H, W) and the features of blocks `taps` (1-based)."""
        assert isinstance(cond, Tensor) and all(1 <= k <= self.depth for k in taps)
        tokens = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(cond)  # (N, D)
        feats: dict[int, Tensor] = {}
        for k, block in enumerate(self.blocks, start=1):
            tokens = self.run_block(block, tokens, c)
            if k in taps:
                feats[k] = tokens
            if stop and len(feats) == len(set(taps)):
                return Output(None, feats)
        assert self.final_layer is not None, "a truncated model has no velocity; call it with stop=True"
        out = unpatchify(self.final_layer(tokens, c), self.patch, self.final_layer.linear.out_features // self.patch**2)
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
