"""A backbone that is not a transformer: gated dilated convolutions, as in WaveNet (1609.03499), on 1-D latents (C, L).

Shape legend: N batch, T tokens of `patch` positions each, D width, (C, L) latent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from own_method.gated_block import GatedBlock
from own_method.wave_settings import SIZES, WaveConfig
from selftrans.models.layers import FinalLayer, LabelEmbedder, TimestepEmbedder
from selftrans.models.spec import ModelSpec
from selftrans.types import Backbone, Cond, Conditions, Output, map_cond


class Wave(Backbone):
    """Convolutions along one axis, conditioned on labels (unconditional for data without classes)."""

    def __init__(self, shape: tuple[int, ...], conditions: Conditions, config: WaveConfig) -> None:
        super().__init__()
        if len(shape) != 2 or shape[1] % config.patch or conditions.kind == "text":
            raise ValueError(
                f"wave takes latents (C, L), L a multiple of {config.patch}, not {shape} with {conditions}"
            )
        self.shape, self.grid, self.conditions = tuple(shape), (shape[1] // config.patch,), conditions
        self.width, self.depth, self.patch = config.sizes()["width"], config.sizes()["depth"], config.patch
        self.embed = nn.Linear(shape[0] * self.patch, self.width)
        self.time, self.label = TimestepEmbedder(self.width), LabelEmbedder(conditions.num_classes, self.width)
        blocks = [GatedBlock(self.width, config.kernel, 2 ** (k % 4)) for k in range(self.depth)]
        self.layers = nn.ModuleList(blocks)
        self.final: FinalLayer | None = FinalLayer(self.width, shape[0] * self.patch)
        for module in (*(block.modulation for block in blocks), self.final):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, *, taps: tuple[int, ...] = (), stop: bool = False) -> Output:
        assert isinstance(cond, Tensor)  # kinds none and labels
        tokens = self.embed(self.patchify(x))  # (N, T, D)
        c = self.time(t) + self.label(cond)  # (N, D)
        feats: dict[int, Tensor] = {}
        for k, block in enumerate(self.layers, start=1):
            tokens = self.run_block(block, tokens, c)
            if k in taps:
                feats[k] = tokens
            if stop and len(feats) == len(set(taps)):
                return Output(None, feats)
        assert self.final is not None, "a truncated model has no velocity; call it with stop=True"
        patches = self.final(tokens, c).unflatten(2, (x.shape[1], self.patch))  # (N, T, C, patch)
        return Output(patches.transpose(1, 2).flatten(2), feats)

    def null(self, cond: Cond) -> Cond:
        return map_cond(lambda labels: torch.full_like(labels, self.conditions.num_classes), cond)

    def patchify(self, x: Tensor) -> Tensor:
        """(N, C, L) -> (N, T, C * patch)."""
        return x.unflatten(2, (-1, self.patch)).transpose(1, 2).flatten(2)

    def repeated(self) -> list[nn.Module]:
        return list(self.layers)

    def truncate(self, block: int) -> None:
        del self.layers[block:]
        self.final = None


WAVE = ModelSpec("wave", WaveConfig, lambda config, shape, conditions: Wave(shape, conditions, config), tuple(SIZES))
