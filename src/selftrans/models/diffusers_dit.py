"""diffusers' DiTTransformer2DModel (DiT, 2212.09748) as a backbone.

Every block has an embedder of time and label of its own, which in training drops labels at random, differently in each block;
here the objective drops them, for the whole model at once. Shape legend: N batch, T tokens, D width, (C, H, W) latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from selftrans.models.diffusers_backbone import (
    DiffusersBackbone,
    NoiseConfig,
    Prediction,
    fit_positions,
    initialise,
)
from selftrans.models.layers import modulate
from selftrans.models.spec import LABELS_ONLY
from selftrans.types import Cond, Conditions


@dataclass(frozen=True)
class DiffusersDiTConfig(NoiseConfig):
    """diffusers' DiT, conditioned on labels."""

    name: str = "diffusers-dit"
    """diffusers-dit"""

    def arguments(self, shape: tuple[int, ...], conditions: Conditions) -> dict[str, Any]:
        """Arguments of DiTTransformer2DModel."""
        return super().arguments(shape, conditions) | {"num_embeds_ada_norm": conditions.num_classes}


def build(config: DiffusersDiTConfig, shape: tuple[int, ...], conditions: Conditions) -> DiffusersDiT:
    """A freshly initialised one for latents (C, H, W). ValueError for other latents, and for text."""
    from diffusers import DiTTransformer2DModel

    if conditions.kind == "text":
        raise ValueError(f"{config.name} is {LABELS_ONLY}")
    net = DiTTransformer2DModel(**config.arguments(shape, conditions))
    initialise(net, [*(block.norm1.linear for block in net.transformer_blocks), net.proj_out_1, net.proj_out_2])
    return wrap(config, net, shape, conditions)


def wrap(config: DiffusersDiTConfig, net: nn.Module, shape: tuple[int, ...], conditions: Conditions) -> DiffusersDiT:
    """A DiTTransformer2DModel of these sizes, with its weights, as a backbone."""
    return DiffusersDiT(net, shape, config.prediction)


class DiffusersDiT(DiffusersBackbone):
    """diffusers' DiT.

    Args:
        net: a DiTTransformer2DModel.
        shape: (C, H, W) of a latent; H and W may differ, which the original refuses.
        prediction: what `net` predicts.
    """

    ends: ClassVar[tuple[str, ...]] = ("norm_out", "proj_out_1", "proj_out_2")

    def __init__(self, net: nn.Module, shape: tuple[int, ...], prediction: Prediction = "v") -> None:
        settings: Any = net.config
        classes = settings.num_embeds_ada_norm
        conditions = Conditions("labels" if classes else "none", classes)
        super().__init__(net, shape, conditions, settings.patch_size, prediction)
        for block in self.net.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0
        fit_positions(self.net.pos_embed, self.grid)

    def prepare(self, x: Tensor, time: Tensor, cond: Cond) -> tuple[Tensor, None, tuple[Any, ...]]:
        return self.embed(x, self.net.pos_embed.pos_embed), None, (time, cond)

    def step(
        self, block: nn.Module, tokens: Tensor, context: Tensor | None, given: tuple[Any, ...]
    ) -> tuple[Tensor, None]:
        time, labels = given
        # masks, text and further options of the block are not used
        return self.run_block(block, tokens, None, None, None, time, None, labels), None  # type: ignore[arg-type]

    def finish(self, tokens: Tensor, given: tuple[Any, ...]) -> Tensor:
        c = self.net.transformer_blocks[0].norm1.emb(*given, hidden_dtype=tokens.dtype)  # (N, D)
        shift, scale = self.net.proj_out_1(F.silu(c)).chunk(2, dim=-1)
        return self.unpatchify(self.net.proj_out_2(modulate(self.net.norm_out(tokens), shift, scale)))

    def sharded(self) -> list[nn.Module]:
        """All blocks but the first, whose embedder the last layer uses, too: its weights are gathered with the model's."""
        return self.repeated()[1:]
