"""diffusers' PixArtTransformer2DModel (PixArt-alpha, 2310.00426) as a backbone.

Latent tokens attend to the text (cross-attention), whose padding is masked; the time modulates all blocks by one layer
(adaLN-single). The released models of 1024 pixels have two more inputs, resolution and aspect ratio: they come from the shape.
Shape legend: N batch, T tokens, D width, L text tokens of E channels, (C, H, W) latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from selftrans.models.diffusers_backbone import (
    DiffusersBackbone,
    NoiseConfig,
    Prediction,
    fit_positions,
    initialise,
)
from selftrans.models.text_null import TextNull, check_text
from selftrans.types import MASK, TEXT, Cond, Conditions

MASKED = -10_000.0  #: added to the attention scores of padding, as the original does


@dataclass(frozen=True)
class DiffusersPixArtConfig(NoiseConfig):
    """diffusers' PixArt, conditioned on text."""

    name: str = "diffusers-pixart"
    """diffusers-pixart"""
    interpolation: float = 1.0
    """the positions are divided by it; the released models have sample_size / 64"""
    sizes: bool = False
    """resolution and aspect ratio are inputs, as in the released models of 1024 pixels; the width must divide by 3"""
    pixels: int = 8
    """side of a latent pixel in pixels of the picture, for the resolution"""

    def check(self) -> None:
        super().check()
        if self.sizes and self.heads * self.head_dim % 3:
            raise ValueError(
                f"model.sizes True needs a width that divides by 3, not {self.heads * self.head_dim}; change model.heads"
            )
        if not self.interpolation > 0:
            raise ValueError(f"model.interpolation must be above zero, not {self.interpolation}")

    def arguments(self, shape: tuple[int, ...], conditions: Conditions) -> dict[str, Any]:
        """Arguments of PixArtTransformer2DModel."""
        return super().arguments(shape, conditions) | {
            "cross_attention_dim": self.heads * self.head_dim,
            "interpolation_scale": self.interpolation,
            "use_additional_conditions": self.sizes,  # None would mean: if sample_size is 128
            "caption_channels": conditions.width,
        }


def build(config: DiffusersPixArtConfig, shape: tuple[int, ...], conditions: Conditions) -> DiffusersPixArt:
    """A freshly initialised one for latents (C, H, W). ValueError for other latents, and for data without text."""
    from diffusers import PixArtTransformer2DModel

    check_text(config.name, conditions)
    net = PixArtTransformer2DModel(**config.arguments(shape, conditions))
    # as published: the cross-attention and the output start at zero, the gates do not
    zero = [*(block.attn2.to_out[0] for block in net.transformer_blocks), net.proj_out]
    initialise(net, zero, [net.adaln_single.linear, net.caption_projection.linear_1, net.caption_projection.linear_2])
    return wrap(config, net, shape, conditions)


def wrap(
    config: DiffusersPixArtConfig, net: nn.Module, shape: tuple[int, ...], conditions: Conditions
) -> DiffusersPixArt:
    """A PixArtTransformer2DModel of these sizes, with its weights, as a backbone."""
    return DiffusersPixArt(net, shape, conditions, prediction=config.prediction, pixels=config.pixels)


class DiffusersPixArt(TextNull, DiffusersBackbone):
    """diffusers' PixArt.

    Args:
        net: a PixArtTransformer2DModel.
        shape: (C, H, W) of a latent.
        conditions: of kind text.
        prediction: what `net` predicts.
        pixels: side of a latent pixel in pixels of the picture, for the resolution.
    """

    ends: ClassVar[tuple[str, ...]] = ("norm_out", "proj_out")
    extents: Tensor

    def __init__(
        self,
        net: nn.Module,
        shape: tuple[int, ...],
        conditions: Conditions,
        *,
        prediction: Prediction = "v",
        pixels: int = 8,
    ) -> None:
        settings: Any = net.config
        super().__init__(net, shape, conditions, settings.patch_size, prediction)
        self.keep_null(conditions)
        fit_positions(self.net.pos_embed, self.grid)
        rows, columns = pixels * self.shape[1], pixels * self.shape[2]
        extents = torch.tensor([rows, columns, rows / columns])  # resolution and aspect ratio
        self.register_buffer("extents", extents, persistent=False)

    def prepare(self, x: Tensor, time: Tensor, cond: Cond) -> tuple[Tensor, None, tuple[Any, ...]]:
        assert isinstance(cond, dict)
        net, n = self.net, len(x)
        tokens = self.embed(x, net.pos_embed.pos_embed)
        extents = self.extents.expand(n, 3)
        added = {"resolution": extents[:, :2], "aspect_ratio": extents[:, 2:]}
        modulation, c = net.adaln_single(time, added, batch_size=n, hidden_dtype=tokens.dtype)  # (N, 6 D), (N, D)
        text = cond[TEXT].to(net.pos_embed.proj.weight.dtype)
        if net.caption_projection is not None:
            text = net.caption_projection(text)  # (N, L, D)
        bias = (1 - cond[MASK].to(tokens.dtype)).unsqueeze(dim=1) * MASKED  # (N, 1, L)
        return tokens, None, (text, bias, modulation, c)

    def step(
        self, block: nn.Module, tokens: Tensor, context: Tensor | None, given: tuple[Any, ...]
    ) -> tuple[Tensor, None]:
        text, bias, modulation, _ = given
        return self.run_block(block, tokens, None, text, bias, modulation), None  # type: ignore[arg-type]

    def finish(self, tokens: Tensor, given: tuple[Any, ...]) -> Tensor:
        net, c = self.net, given[-1]
        shift, scale = (net.scale_shift_table[None] + c[:, None]).chunk(2, dim=1)  # (N, 1, D)
        return self.unpatchify(net.proj_out(net.norm_out(tokens) * (1 + scale) + shift))
