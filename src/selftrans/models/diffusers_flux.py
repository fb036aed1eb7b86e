"""diffusers' FluxTransformer2DModel (FLUX.1) as a backbone.

Its input is packed: patches of 2 x 2 latent pixels (channel, row, column) are the channels of a token; positions are rotary,
by (0, row, column), and (0, 0, 0) for text. Double blocks (a stream each for latent and text) come first, then single blocks
(one stream, text first); they are numbered in this order, and features hold the latent tokens alone. As in the original,
padding is attended to: the mask is used for the pooled vector alone, which is made of the text tokens.
The original rounds the time to the data type of its input before it multiplies by 1000; here the time stays as it is given.
Shape legend: N batch, T tokens, D width, L text tokens of E channels, (C, H, W) latent.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selftrans.models.diffusers_backbone import (
    TIMES,
    DiffusersBackbone,
    DiffusersConfig,
    Pooled,
    check_pooled,
    initialise,
    pooled_text,
    unrounded,
)
from selftrans.models.layers import RMSNorm
from selftrans.models.patch_transformer import LARGEST
from selftrans.models.text_null import TextNull, check_text
from selftrans.types import TEXT, Cond, Conditions

GUIDANCE = 3.5  #: guidance scale that a distilled model is asked for; diffusers' default


@dataclass(frozen=True)
class DiffusersFluxConfig(DiffusersConfig):
    """diffusers' Flux, conditioned on text."""

    name: str = "diffusers-flux"
    """diffusers-flux"""
    layers: int = 4
    """number of double blocks"""
    single_layers: int = 8
    """number of single blocks, which follow"""
    axes: tuple[int, int, int] | None = None
    """channels of a head that turn with (0, row, column); None: about an eighth for the first, as published"""
    guidance: float | None = None
    """value given to the embedding of the guidance scale, which guidance-distilled models have (dev); None: no embedding"""
    pooled: Pooled = "mean"
    """vector added to the time: mean, that of the text tokens; last, the last one (CLIP's pooled output); none, zeros"""
    pooled_width: int | None = None
    """channels of that vector; None: those of a text token"""

    def check(self) -> None:
        super().check()
        if not 0 <= self.single_layers <= LARGEST:
            raise ValueError(f"model.single_layers must be from 0 to {LARGEST}, not {self.single_layers}")
        axes = self.axes_dims()
        if sum(axes) != self.head_dim or any(n < 2 or n % 2 for n in axes):
            raise ValueError(
                f"model.axes must be three even numbers above zero whose sum is model.head_dim {self.head_dim}, not {axes}"
            )

    def blocks(self) -> int:
        return self.layers + self.single_layers

    def axes_dims(self) -> tuple[int, int, int]:
        """Channels of a head for each coordinate."""
        if self.axes is not None:
            return self.axes
        first = max(2, self.head_dim // 16 * 2)
        first += (self.head_dim - first) % 4  # so that both halves of the rest are even
        return first, (self.head_dim - first) // 2, (self.head_dim - first) // 2

    def arguments(self, shape: tuple[int, ...], conditions: Conditions) -> dict[str, Any]:
        """Arguments of FluxTransformer2DModel."""
        return {
            "patch_size": 1,
            "in_channels": shape[0] * self.patch**2,
            "num_layers": self.layers,
            "num_single_layers": self.single_layers,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.heads,
            "joint_attention_dim": conditions.width,
            "pooled_projection_dim": self.pooled_width or conditions.width,
            "guidance_embeds": self.guidance is not None,
            "axes_dims_rope": self.axes_dims(),
        }


def build(config: DiffusersFluxConfig, shape: tuple[int, ...], conditions: Conditions) -> DiffusersFlux:
    """A freshly initialised one for latents (C, H, W). ValueError for other latents, and for data without text."""
    from diffusers import FluxTransformer2DModel

    check_text(config.name, conditions)
    net = FluxTransformer2DModel(**config.arguments(shape, conditions))
    gates = [part.linear for block in net.transformer_blocks for part in (block.norm1, block.norm1_context)]
    gates += [block.norm.linear for block in net.single_transformer_blocks]
    initialise(net, [*gates, net.norm_out.linear, net.proj_out])
    return wrap(config, net, shape, conditions)


def wrap(config: DiffusersFluxConfig, net: nn.Module, shape: tuple[int, ...], conditions: Conditions) -> DiffusersFlux:
    """A FluxTransformer2DModel of these sizes, with its weights, as a backbone."""
    return DiffusersFlux(net, shape, conditions, guidance=config.guidance, pooled=config.pooled)


class DiffusersFlux(TextNull, DiffusersBackbone):
    """diffusers' Flux.

    Args:
        net: a FluxTransformer2DModel whose in_channels are C * patch².
        shape: (C, H, W) of a latent.
        conditions: of kind text.
        guidance: value for the embedding of the guidance scale, if `net` has one (None: `GUIDANCE`).
        pooled: what replaces the pooled vector of the text encoder, see `pooled_text`.
    """

    ends: ClassVar[tuple[str, ...]] = ("norm_out", "proj_out")

    def __init__(
        self,
        net: nn.Module,
        shape: tuple[int, ...],
        conditions: Conditions,
        *,
        guidance: float | None = None,
        pooled: Pooled = "mean",
    ) -> None:
        settings: Any = net.config
        patch = next((n for n in range(1, 65) if shape[0] * n * n == settings.in_channels), None)
        if patch is None or settings.patch_size != 1:
            raise ValueError(
                f"a Flux of {settings.in_channels} input channels does not take latents {tuple(shape)}: its tokens are square "
                "patches with all their channels"
            )
        super().__init__(net, shape, conditions, patch)
        self.keep_null(conditions)
        self.pooled, self.pooled_width = pooled, settings.pooled_projection_dim
        check_pooled(pooled, self.pooled_width, conditions)
        self.guidance = (GUIDANCE if guidance is None else guidance) if settings.guidance_embeds else None
        for part in self.net.modules():
            if type(part) is nn.RMSNorm:
                part.__class__ = RMSNorm  # in autocast torch's has no fused kernel, and warns
        singles = self.net.single_transformer_blocks
        if len(singles) and "encoder_hidden_states" not in inspect.signature(singles[0].forward).parameters:
            raise ValueError("this version of diffusers has other single blocks of Flux; update diffusers")
        # the last text tokens are not used then: DDP would wait for gradients of the layers that make them
        if not len(singles):
            last = self.net.transformer_blocks[-1]
            for part in (last.attn.to_add_out, last.ff_context):
                part.requires_grad_(False)

    def prepare(self, x: Tensor, time: Tensor, cond: Cond) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        assert isinstance(cond, dict)
        net = self.net
        tokens = unrounded(net.x_embedder(self.patchify(x.to(net.x_embedder.weight.dtype)).contiguous()))
        text = cond[TEXT].to(net.context_embedder.weight.dtype)
        pooled = pooled_text({**cond, TEXT: text}, self.pooled, self.pooled_width)
        guidance = () if self.guidance is None else (torch.full_like(time, TIMES * self.guidance),)
        c = net.time_text_embed(time, *guidance, pooled)  # (N, D)
        rotations = net.pos_embed(self.positions(text.shape[1], x.device))
        return tokens, unrounded(net.context_embedder(text)), (c, rotations)

    def positions(self, text: int, device: torch.device) -> Tensor:
        """(L + T, 3): zeros for the text, (0, row, column) of each latent token."""
        rows, columns = (torch.arange(n, dtype=torch.float32, device=device) for n in self.grid)
        cells = torch.cartesian_prod(torch.zeros(1, device=device), rows, columns)
        return torch.cat([cells.new_zeros(text, 3), cells], dim=0)

    def finish(self, tokens: Tensor, given: tuple[Any, ...]) -> Tensor:
        out = self.net.proj_out(self.net.norm_out(tokens, given[0]))  # (N, T, C patch²): channel, row, column
        return F.fold(out.transpose(1, 2), self.shape[1:], kernel_size=self.patch, stride=self.patch)

    def repeated(self) -> list[nn.Module]:
        return [*self.net.transformer_blocks, *self.net.single_transformer_blocks]

    def truncate(self, block: int) -> None:
        double = len(self.net.transformer_blocks)
        del self.net.single_transformer_blocks[max(0, block - double) :]
        super().truncate(block)
