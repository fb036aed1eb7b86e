"""diffusers' SD3Transformer2DModel (Stable Diffusion 3, 2403.03206) as a backbone.

Blocks attend to latent and text tokens jointly and change both; the last one gives no text. As in the original, padding is
attended to: the mask is used for the pooled vector alone, which is made of the text tokens.
Shape legend: N batch, T tokens, D width, L text tokens of E channels, (C, H, W) latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from selftrans.models.diffusers_backbone import (
    DiffusersBackbone,
    DiffusersConfig,
    Pooled,
    check_pooled,
    initialise,
    pooled_text,
    unrounded,
)
from selftrans.models.text_null import TextNull, check_text
from selftrans.types import TEXT, Cond, Conditions


@dataclass(frozen=True)
class DiffusersSD3Config(DiffusersConfig):
    """diffusers' SD3, conditioned on text."""

    name: str = "diffusers-sd3"
    """diffusers-sd3"""
    qk_norm: bool = False
    """RMSNorm on queries and keys, as in SD3.5"""
    dual: tuple[int, ...] = ()
    """blocks (1-based) with a second attention, of the latent tokens alone, as in SD3.5 medium"""
    sample_size: int | None = None
    """side of the latents that the positions are scaled to; None: the longer side of the data's"""
    positions: int | None = None
    """side of the table of positions in tokens, whose centre is used; None: as large as the data need"""
    pooled: Pooled = "mean"
    """vector added to the time: mean, that of the text tokens; last, the last one (CLIP's pooled output); none, zeros"""
    pooled_width: int | None = None
    """channels of that vector; None: those of a text token"""

    def check(self) -> None:
        super().check()
        if any(not 1 <= k <= self.layers for k in self.dual):
            raise ValueError(f"model.dual lists blocks from 1 to {self.layers}, not {self.dual}")

    def arguments(self, shape: tuple[int, ...], conditions: Conditions) -> dict[str, Any]:
        """Arguments of SD3Transformer2DModel."""
        side = max(shape[1:])
        return {
            "sample_size": self.sample_size or side,
            "patch_size": self.patch,
            "in_channels": shape[0],
            "num_layers": self.layers,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.heads,
            "joint_attention_dim": conditions.width,
            "caption_projection_dim": self.heads * self.head_dim,
            "pooled_projection_dim": self.pooled_width or conditions.width,
            "out_channels": shape[0],
            "pos_embed_max_size": self.positions or side // self.patch,
            "dual_attention_layers": tuple(k - 1 for k in self.dual),
            "qk_norm": "rms_norm" if self.qk_norm else None,
        }


def build(config: DiffusersSD3Config, shape: tuple[int, ...], conditions: Conditions) -> DiffusersSD3:
    """A freshly initialised one for latents (C, H, W). ValueError for other latents, and for data without text."""
    from diffusers import SD3Transformer2DModel

    check_text(config.name, conditions)
    net = SD3Transformer2DModel(**config.arguments(shape, conditions))
    gates = [part.linear for block in net.transformer_blocks for part in (block.norm1, block.norm1_context)]
    initialise(net, [*gates, net.norm_out.linear, net.proj_out])
    return wrap(config, net, shape, conditions)


def wrap(config: DiffusersSD3Config, net: nn.Module, shape: tuple[int, ...], conditions: Conditions) -> DiffusersSD3:
    """An SD3Transformer2DModel of these sizes, with its weights, as a backbone."""
    return DiffusersSD3(net, shape, conditions, pooled=config.pooled)


class DiffusersSD3(TextNull, DiffusersBackbone):
    """diffusers' SD3.

    Args:
        net: an SD3Transformer2DModel.
        shape: (C, H, W) of a latent, not larger than the table of positions.
        conditions: of kind text.
        pooled: what replaces the pooled vector of the text encoder, see `pooled_text`.
    """

    ends: ClassVar[tuple[str, ...]] = ("norm_out", "proj_out")

    def __init__(
        self, net: nn.Module, shape: tuple[int, ...], conditions: Conditions, *, pooled: Pooled = "mean"
    ) -> None:
        settings: Any = net.config
        super().__init__(net, shape, conditions, settings.patch_size)
        self.keep_null(conditions)
        self.pooled, self.pooled_width = pooled, settings.pooled_projection_dim
        check_pooled(pooled, self.pooled_width, conditions)
        if max(self.grid) > settings.pos_embed_max_size:
            raise ValueError(
                f"latents of {self.shape[1]}x{self.shape[2]} have more than the {settings.pos_embed_max_size} positions per "
                "side of the model; raise model.positions"
            )

    def prepare(self, x: Tensor, time: Tensor, cond: Cond) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        assert isinstance(cond, dict)
        net = self.net
        tokens = self.embed(x, net.pos_embed.cropped_pos_embed(*self.shape[1:]))
        text = cond[TEXT].to(net.context_embedder.weight.dtype)
        c = net.time_text_embed(time, pooled_text({**cond, TEXT: text}, self.pooled, self.pooled_width))  # (N, D)
        return tokens, unrounded(net.context_embedder(text)), (c,)

    def finish(self, tokens: Tensor, given: tuple[Any, ...]) -> Tensor:
        return self.unpatchify(self.net.proj_out(self.net.norm_out(tokens, *given)))
