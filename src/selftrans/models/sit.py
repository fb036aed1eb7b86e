"""SiT, the scalable interpolant transformer (Ma et al., 2401.08740): DiT's architecture, predicting a velocity.

Parameter names are those of the published checkpoints. Shape legend: N batch, T tokens, D width, (C, *S) latent.
"""

from __future__ import annotations

from dataclasses import dataclass

from selftrans.models.label_transformer import LabelledConfig, LabelTransformer
from selftrans.models.layers import LABEL_STD, Block
from selftrans.models.patch_transformer import published_sizes
from selftrans.types import Conditions

#: published sizes: width, depth, heads (SiT, table 1)
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
SIT_SIZES = published_sizes("SiT", SIZES, patches=(1, 2, 4, 8))


@dataclass(frozen=True)
class SiTConfig(LabelledConfig):
    """The student. A field left at None comes from the published size `name`."""

    published = SIT_SIZES

    name: str = "SiT-S/2"
    """published size, SiT-{S,B,L,XL}/{1,2,4,8}"""
    qk_norm: bool = True
    """LayerNorm on queries and keys, as in the released models"""


def build(config: SiTConfig, shape: tuple[int, ...], conditions: Conditions) -> SiT:
    """A freshly initialised SiT for latents (C, *S). ValueError for shapes that it cannot take, and for text."""
    return config.build(SiT, shape, conditions, ("qk_norm",))


class SiT(LabelTransformer):
    """A `LabelTransformer` of DiT's blocks. The published models take square pictures."""

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
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        learn_sigma: bool = False,
        label_std: float = LABEL_STD,
    ) -> None:
        super().__init__(
            shape,
            num_classes,
            lambda: Block(width, heads, mlp_ratio, qk_norm),
            width=width,
            depth=depth,
            patch=patch,
            patch_frames=patch_frames,
            learn_sigma=learn_sigma,
            label_std=label_std,
        )
