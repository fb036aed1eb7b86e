"""What SiT, DiT and LightningDiT share: tokens of a latent with fixed positions, conditioned by time and label.

Latents have one to three dimensions: (C, L) signals, (C, H, W) pictures, (C, F, H, W) videos, none of them necessarily
square. A model is made for one shape, and works on any other that its patches divide (aspect ratios, lengths).
Shape legend: N batch, T tokens, D width, (C, *S) latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from selftrans.models.layers import (
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    initialise,
    patchify,
    sincos_positions,
    unpatchify,
)
from selftrans.models.spec import ModelConfig
from selftrans.suggest import nearest
from selftrans.types import Backbone, Cond, Conditions, Output, map_cond

LARGEST = 1 << 20  #: of a size: what is beyond is a mistake, or an attempt to take all time and memory


@dataclass(frozen=True)
class SizedConfig(ModelConfig):
    """Settings of a family with published sizes. A field left at None comes from the size `name`."""

    published: ClassVar[Mapping[str, Mapping[str, int]]] = {}

    width: int | None = None
    """channels of a token"""
    depth: int | None = None
    """number of blocks"""
    heads: int | None = None
    """attention heads; with a width of your own, None means one per 64 channels"""
    patch: int | None = None
    """side of a token in latent pixels"""
    patch_frames: int = 1
    """frames of a token, for latents with frames"""

    def sizes(self) -> dict[str, int]:
        """Constructor arguments width, depth, heads, patch. ValueError for an unknown name or a size out of range."""
        return chosen_sizes(self, self.published)

    def check(self) -> None:
        self.sizes()
        _check_size("patch_frames", self.patch_frames)

    def blocks(self) -> int:
        return self.sizes()["depth"]

    def num_classes(self, conditions: Conditions) -> int:
        """Classes of the data, 0 for none. ValueError for text."""
        if conditions.kind == "text":
            raise ValueError(f"{self.name} is conditioned on labels or on nothing; the data have text")
        return conditions.num_classes


def chosen_sizes(config: Any, published: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Width, depth, heads, patch: those of the published size `config.name`, replaced by the fields that are given.

    ValueError for an unknown name or a size out of range.
    """
    if config.name not in published:
        raise ValueError(f"model.name '{config.name}' is unknown{nearest(config.name, published)}")
    fields = {key: getattr(config, key) for key in ("width", "depth", "heads", "patch")}
    given = {key: value for key, value in fields.items() if value is not None}
    for key, value in given.items():
        _check_size(key, value)
    sizes = {**published[config.name], **given}
    if config.heads is None and sizes["width"] != published[config.name]["width"]:
        width = sizes["width"]
        sizes["heads"] = next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)
    return sizes


def _check_size(key: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"model.{key} must be above zero, not {value}")
    if value > LARGEST:
        raise ValueError(f"model.{key} must be at most {LARGEST}, not {value}")


class LabelTransformer(Backbone):
    """A class-conditional (or, with num_classes = 0, unconditional) diffusion transformer.

    Args:
        shape: (C, L), (C, H, W) or (C, F, H, W) of a latent; L, H, W multiples of `patch`, F of `patch_frames`.
        num_classes: labels 0 .. num_classes - 1; the null label is num_classes.
        block: makes a block, a module that maps tokens (N, T, D), condition (N, D) and `block_inputs` to tokens.
        learn_sigma: the output layer carries a second, unused half, as in the original DiT and SiT checkpoints.
        norm: the norm of the last layer; None: LayerNorm.
    Raises ValueError when the sizes do not fit each other.
    """

    pos_embed: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        block: Callable[[], nn.Module],
        *,
        width: int,
        depth: int,
        patch: int,
        patch_frames: int = 1,
        learn_sigma: bool = False,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        axes = len(shape) - 1
        if not 1 <= axes <= 3:
            raise ValueError(
                f"{type(self).__name__} takes latents (C, L), (C, H, W) or (C, F, H, W), not {tuple(shape)}; choose "
                "another model"
            )
        if patch_frames != 1 and axes != 3:
            raise ValueError(f"model.patch_frames is for latents with frames (C, F, H, W), not {tuple(shape)}; omit it")
        self.cells = (patch_frames, patch, patch) if axes == 3 else (patch,) * axes
        self.shape, self.grid, channels = tuple(shape), self.grid_of(shape[1:]), shape[0]
        self.conditions = Conditions("labels" if num_classes else "none", num_classes)
        self.width, self.depth, self.patch, self.num_classes = width, depth, patch, num_classes
        self.x_embedder = PatchEmbed(channels, self.cells, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.register_buffer("pos_embed", sincos_positions(width, self.grid)[None], persistent=False)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        out = math.prod(self.cells) * channels * (2 if learn_sigma else 1)
        self.final_layer: FinalLayer | None = FinalLayer(width, out, norm)
        initialise(self)

    def grid_of(self, sides: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens on each axis of a latent (C, *sides). ValueError when patches do not divide it."""
        if len(sides) != len(self.cells) or any(side % p for side, p in zip(sides, self.cells, strict=True)):
            own = self.cells[:1] if len(set(self.cells)) == 1 else self.cells
            size, cells = ("x".join(map(str, each)) for each in (sides, own))
            raise ValueError(f"a latent of {size} does not divide into patches of {cells}; change model.patch")
        return tuple(side // p for side, p in zip(sides, self.cells, strict=True))

    def positions(self, grid: tuple[int, ...]) -> Tensor:
        """(1, T, D) of a grid: a buffer for the model's own, computed in the graph for any other."""
        if grid == self.grid:
            return self.pos_embed
        return sincos_positions(self.width, grid, self.pos_embed.device)[None].to(self.pos_embed.dtype)

    def block_inputs(self, grid: tuple[int, ...]) -> tuple[Tensor, ...]:
        """What each block is called with besides tokens and condition."""
        return ()

    def forward(self, x: Tensor, t: Tensor, cond: Cond, *, taps: tuple[int, ...] = (), stop: bool = False) -> Output:
        """x (N, C, *S), t (N,), labels (N,) -> velocity (N, C, *S) and the features of blocks `taps` (1-based).

        S may be another than the model's own. ValueError when patches do not divide it.
        """
        assert isinstance(cond, Tensor) and all(1 <= k <= self.depth for k in taps)
        grid = self.grid_of(x.shape[2:])
        tokens = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype)) + self.positions(grid)  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(cond)  # (N, D)
        inputs = self.block_inputs(grid)
        feats: dict[int, Tensor] = {}
        for k, block in enumerate(self.blocks, start=1):
            tokens = self.run_block(block, tokens, c, *inputs)
            if k in taps:
                feats[k] = tokens
            if stop and len(feats) == len(set(taps)):
                return Output(None, feats)
        assert self.final_layer is not None, "a truncated model has no velocity; call it with stop=True"
        channels = self.final_layer.linear.out_features // math.prod(self.cells)
        out = unpatchify(self.final_layer(tokens, c), self.cells, channels, grid)
        return Output(out[:, : self.shape[0]], feats)

    def null(self, cond: Cond) -> Cond:
        return map_cond(lambda labels: torch.full_like(labels, self.num_classes), cond)

    def patchify(self, x: Tensor) -> Tensor:
        """(N, C, *S) -> (N, T, C * cells), in the order of the grid; inside a token: channel, then row by row."""
        return patchify(x, self.cells)

    def repeated(self) -> list[nn.Module]:
        return list(self.blocks)

    def truncate(self, block: int) -> None:
        del self.blocks[block:]
        self.final_layer = None
