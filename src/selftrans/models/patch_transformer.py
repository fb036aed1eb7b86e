"""What the transformers here share: the sizes of their configs, and the tokens of a latent with fixed positions.

Latents have one to three dimensions: (C, L) signals, (C, H, W) pictures, (C, F, H, W) videos, none of them necessarily
square. A model is made for one shape, and works on any other that its patches divide (aspect ratios, lengths).
Shape legend: N batch, T tokens, D width, (C, *S) latent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from selftrans.messages import shape_text
from selftrans.models.layers import FinalLayer, PatchEmbed, patchify, sincos_positions, unpatchify
from selftrans.models.spec import LABELS_ONLY, ModelConfig
from selftrans.suggest import nearest
from selftrans.types import Backbone, Conditions

LARGEST = 1 << 20  #: of a size: a larger one is a mistake, or an attempt to exhaust time or memory


def published_sizes(
    family: str, sizes: Mapping[str, tuple[int, int, int]], patches: Iterable[int]
) -> dict[str, dict[str, int]]:
    """Name of a model, such as SiT-S/2 -> the constructor's arguments. `sizes`: width, depth, heads by name."""
    return {
        f"{family}-{size}/{patch}": {"width": width, "depth": depth, "heads": heads, "patch": patch}
        for size, (width, depth, heads) in sizes.items()
        for patch in patches
    }


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
        """Constructor arguments width, depth, heads, patch: those of the published size `name`, replaced by given fields.

        ValueError for an unknown name or a size out of range.
        """
        if self.name not in self.published:
            raise ValueError(f"model.name '{self.name}' is unknown{nearest(self.name, self.published)}")
        usual = self.published[self.name]
        given = {key: value for key in usual if (value := getattr(self, key)) is not None}
        for key, value in given.items():
            _check_size(key, value)
        sizes = {**usual, **given}
        width = sizes["width"]
        if self.heads is None and width != usual["width"]:
            sizes["heads"] = next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)
        return sizes

    def check(self) -> None:
        self.sizes()
        _check_size("patch_frames", self.patch_frames)

    def blocks(self) -> int:
        return self.sizes()["depth"]

    def num_classes(self, conditions: Conditions) -> int:
        """Classes of the data, 0 for none. ValueError for text."""
        if conditions.kind == "text":
            raise ValueError(f"{self.name} is {LABELS_ONLY}")
        return conditions.num_classes


def _check_size(key: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"model.{key} must be above zero, not {value}")
    if value > LARGEST:
        raise ValueError(f"model.{key} must be at most {LARGEST}, not {value}")


class PatchTransformer(Backbone):
    """A diffusion transformer on the patches of a latent; its last layer is `final_layer`."""

    x_embedder: PatchEmbed
    pos_embed: Tensor
    final_layer: FinalLayer | None
    random_blocks = False

    def cut(self, shape: tuple[int, ...], *, width: int, patch: int, patch_frames: int = 1) -> None:
        """Set shape and grid, and make the embedding of patches and the positions. ValueError for sizes that do not fit.

        Args:
            shape: (C, L), (C, H, W) or (C, F, H, W) of a latent; L, H, W multiples of `patch`, F of `patch_frames`.
        """
        axes = len(shape) - 1
        if not 1 <= axes <= 3:
            raise ValueError(
                f"{type(self).__name__} takes latents (C, L), (C, H, W) or (C, F, H, W), not {tuple(shape)}; choose "
                "another model"
            )
        if patch_frames != 1 and axes != 3:
            raise ValueError(f"model.patch_frames is for latents with frames (C, F, H, W), not {tuple(shape)}; omit it")
        self.cells = (patch_frames, patch, patch) if axes == 3 else (patch,) * axes
        self.shape, self.grid, self.width, self.patch = tuple(shape), self.grid_of(shape[1:]), width, patch
        self.x_embedder = PatchEmbed(shape[0], self.cells, width)
        self.register_buffer("pos_embed", sincos_positions(width, self.grid)[None], persistent=False)

    def grid_of(self, sides: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens on each axis of a latent (C, *sides). ValueError when patches do not divide it."""
        if len(sides) != len(self.cells) or any(side % p for side, p in zip(sides, self.cells, strict=True)):
            own = self.cells[:1] if len(set(self.cells)) == 1 else self.cells
            size, cells = (shape_text(each) for each in (sides, own))
            patch = "model.patch or model.patch_frames" if len(self.cells) == 3 else "model.patch"
            raise ValueError(
                f"a latent of {size} does not divide into patches of {cells}; change {patch}, or take latents whose sides "
                f"are multiples of {cells} (prepare --resolution, --bucket-multiple, --length, --frames; sample --size)"
            )
        return tuple(side // p for side, p in zip(sides, self.cells, strict=True))

    def positions(self, grid: tuple[int, ...]) -> Tensor:
        """(1, T, D) of a grid: a buffer for the model's own, computed in the graph for any other."""
        if grid == self.grid:
            return self.pos_embed
        return sincos_positions(self.width, grid, self.pos_embed.device)[None].to(self.pos_embed.dtype)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """(N, C, *S) -> tokens (N, T, D) with their positions, and the grid, which may be another than the model's own."""
        grid = self.grid_of(x.shape[2:])
        return self.x_embedder(x.to(self.x_embedder.proj.weight.dtype)) + self.positions(grid), grid

    def velocity(self, tokens: Tensor, c: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Tokens (N, T, D) after the last block, condition (N, D) -> (N, C, *S)."""
        assert self.final_layer is not None, "a truncated model has no velocity; call it with stop=True"
        channels = self.final_layer.linear.out_features // math.prod(self.cells)
        return unpatchify(self.final_layer(tokens, c), self.cells, channels, grid)[:, : self.shape[0]]

    def compiled_alone(self) -> list[nn.Module]:
        return [] if self.final_layer is None else [self.final_layer]

    def patchify(self, x: Tensor) -> Tensor:
        """(N, C, *S) -> (N, T, C * cells), in the order of the grid; inside a token: channel, then row by row."""
        return patchify(x, self.cells)
