"""What SiT, DiT and LightningDiT share: a transformer on patches, conditioned by time and label.

Shape legend: N batch, T tokens, D width, (C, *S) latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from selftrans.models.layers import LABEL_STD, FinalLayer, LabelEmbedder, TimestepEmbedder, initialise
from selftrans.models.patch_transformer import PatchTransformer, SizedConfig
from selftrans.models.routing import Route, Routed, chosen_route
from selftrans.sections import setting
from selftrans.types import Cond, Conditions, Output

LARGEST_STD = 100.0
Model = TypeVar("Model", bound="LabelTransformer")


@dataclass(frozen=True)
class LabelledConfig(SizedConfig):
    """Settings of a family with published sizes and a table of labels."""

    label_std: float = LABEL_STD
    """deviation of the label table before training. With the published 0.02 a short run hardly learns to read its labels:
    0.5 is much faster on small data (docs/results.md)"""
    route: float = setting(0.0, resume="consent")
    """share of the tokens that skip the middle blocks in training (TREAD: 0.5), others at each step; fewer operations"""
    route_blocks: tuple[int, int] | None = setting(None, resume="consent")
    """first and last block that they skip (1-based); None: all but the first two and the last four, as published"""

    def check(self) -> None:
        super().check()
        self.chosen_route()
        if not 0 <= self.label_std <= LARGEST_STD:
            raise ValueError(f"model.label_std must be between 0 and {LARGEST_STD:g}, not {self.label_std}")

    def chosen_route(self) -> Route | None:
        """What the model's tokens skip in training. ValueError for blocks that it does not have."""
        return chosen_route(self.route, self.route_blocks, self.blocks())

    def ineffective(self) -> dict[str, str]:
        return {} if self.route else {"route_blocks": "without model.route no token skips a block"}

    def build(self, kind: type[Model], shape: tuple[int, ...], conditions: Conditions, options: Iterable[str]) -> Model:
        """A freshly initialised `kind` for latents (C, *S); `options` are settings that it has besides those of all kinds.

        ValueError for shapes that it cannot take, and for text.
        """
        own: dict[str, Any] = {key: getattr(self, key) for key in ("patch_frames", "label_std", *options)}
        model = kind(shape, self.num_classes(conditions), **own | self.sizes())
        model.route = self.chosen_route()
        return model


class LabelTransformer(PatchTransformer):
    """A class-conditional (or, with num_classes = 0, unconditional) diffusion transformer.

    Args:
        shape: (C, L), (C, H, W) or (C, F, H, W) of a latent; L, H, W multiples of `patch`, F of `patch_frames`.
        num_classes: labels 0 .. num_classes - 1; the null label is num_classes.
        block: makes a block, a module that maps tokens (N, T, D), condition (N, D) and `block_inputs` to tokens.
        learn_sigma: the output layer carries a second, unused half, as in the original DiT and SiT checkpoints.
        norm: the norm of the last layer; None: LayerNorm.
        label_std: deviation of the label table before training.
    Raises ValueError when the sizes do not fit each other.
    """

    route: Route | None = None  #: what a part of the tokens skips in training; set it after the model is made

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
        label_std: float = LABEL_STD,
    ) -> None:
        super().__init__()
        if num_classes < 0 or min(width, depth, patch, patch_frames) < 1:
            sizes = f"width {width}, depth {depth}, patch {patch}, patch_frames {patch_frames}"
            raise ValueError(f"sizes must be 1 or more ({sizes}), and num_classes 0 or more, not {num_classes}")
        self.cut(shape, width=width, patch=patch, patch_frames=patch_frames)
        self.conditions = Conditions("labels" if num_classes else "none", num_classes)
        self.depth, self.num_classes = depth, num_classes
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        out = math.prod(self.cells) * shape[0] * (2 if learn_sigma else 1)
        self.final_layer = FinalLayer(width, out, norm)
        initialise(self, label_std)

    def block_inputs(self, grid: tuple[int, ...]) -> tuple[Tensor, ...]:
        """What each block is called with besides tokens and condition."""
        return ()

    def kept_inputs(self, inputs: tuple[Tensor, ...], kept: Tensor) -> tuple[Tensor, ...]:
        """`block_inputs` of a part of the tokens: `kept` (N, K) are their positions."""
        return inputs

    def forward(self, x: Tensor, t: Tensor, cond: Cond, *, taps: tuple[int, ...] = (), stop: bool = False) -> Output:
        """x (N, C, *S), t (N,), labels (N,) -> velocity (N, C, *S) and the features of blocks `taps` (1-based).

        S may be another than the model's own. ValueError when patches do not divide it. In training, with a `route`, the
        feature of a token that skips a block is the token as it left.
        """
        if not isinstance(cond, Tensor) or t.dim() != 1:
            found = f"{type(cond).__name__} and t of shape {tuple(t.shape)}"
            raise ValueError(f"{type(self).__name__} takes labels (N,), a tensor, and times t (N,), not {found}")
        assert all(1 <= k <= self.depth for k in taps)
        tokens, grid = self.embed(x)  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(cond)  # (N, D)
        inputs = self.block_inputs(grid)
        routed = Routed(self.route, tokens) if self.route and self.training else None
        feats: dict[int, Tensor] = {}
        for k, block in enumerate(self.blocks, start=1):
            if routed is None:
                tokens = self.run_block(block, tokens, c, *inputs)
            else:
                tokens = routed.before(k, tokens)
                given = self.kept_inputs(inputs, routed.kept) if routed.away else inputs
                tokens = routed.after(k, self.run_block(block, tokens, c, *given))
            if k in taps:
                feats[k] = tokens if routed is None else routed.every(tokens)
            if stop and len(feats) == len(set(taps)):
                return Output(None, feats)
        return Output(self.velocity(tokens, c, grid), feats)

    def extra_repr(self) -> str:
        return "" if self.route is None else str(self.route)

    def repeated(self) -> list[nn.Module]:
        return list(self.blocks)

    def truncate(self, block: int) -> None:
        del self.blocks[block:]
        self.final_layer = None
