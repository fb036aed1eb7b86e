"""What the adapters of diffusers' transformers share: their settings, the loop over the blocks, and initialisation.

An adapter holds the original module as `net` and runs its blocks one by one, so that features are read between them and
computation can stop. Parameters keep diffusers' names behind `net.`. The original's own forward is not used: in DiT it drops
labels, in Flux it rounds the time to the precision of the latents, and none of them returns features.

Time: every embedding expects 0 .. 1000, and gets 1000 t. DiT and PixArt were released as predictors of the noise of a DDPM
schedule (`prediction = noise`, see `dit`); trained here from scratch their output is our velocity. SD3 and Flux are rectified
flows with our path and sign: diffusers' FlowMatchEulerDiscreteScheduler has x = (1 - sigma) data + sigma noise and steps by
(sigma' - sigma) output, so its sigma is our t, and the output is noise - data.
Shape legend: N batch, T tokens, D width, L text tokens of E channels, (C, H, W) latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from selftrans.flow import LINEAR, PATHS
from selftrans.models.dit import from_noise, log_ratios, to_schedule
from selftrans.models.layers import patchify, unpatchify
from selftrans.models.patch_transformer import LARGEST
from selftrans.models.spec import ModelConfig
from selftrans.types import MASK, TEXT, Backbone, Cond, Conditions, Output

TIMES = 1000.0  #: of diffusers' embeddings, per unit of our time
Prediction = Literal["v", "noise"]
Pooled = Literal["mean", "last", "none"]
#: settings of the models that are whole numbers above zero
COUNTS = {"layers", "heads", "head_dim", "patch", "sample_size", "positions", "pooled_width", "pixels"}


@dataclass(frozen=True)
class DiffusersConfig(ModelConfig):
    """A transformer of diffusers."""

    layers: int = 12
    """number of blocks"""
    heads: int = 6
    """attention heads"""
    head_dim: int = 64
    """channels of an attention head; the width of a token is heads times this"""
    patch: int = 2
    """side of a token in latent pixels"""

    def check(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.name in COUNTS and value is not None and not 1 <= value <= LARGEST:
                raise ValueError(f"model.{each.name} must be from 1 to {LARGEST}, not {value}")

    def blocks(self) -> int:
        return self.layers


@dataclass(frozen=True)
class NoiseConfig(DiffusersConfig):
    """A transformer that was released as a predictor of noise."""

    learn_sigma: bool = False
    """the output has a second half, the variance, as in the released models; it is neither used nor trained"""
    prediction: Prediction = "v"
    """v: the velocity; noise: that of the DDPM schedule of the released models"""
    sample_size: int | None = None
    """side of the latents that the positions are scaled to; None: the longer side of the data's"""

    @property
    def predicts(self) -> Literal["velocity", "noise"]:
        return "noise" if self.prediction == "noise" else "velocity"

    def arguments(self, shape: tuple[int, ...], conditions: Conditions) -> dict[str, Any]:
        """Arguments of diffusers' class."""
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "in_channels": shape[0],
            "out_channels": shape[0] * (2 if self.learn_sigma else 1),
            "num_layers": self.layers,
            "sample_size": self.sample_size or max(shape[1:]),
            "patch_size": self.patch,
        }


class DiffusersBackbone(Backbone):
    """A transformer of diffusers as a backbone. A subclass implements the calls of its blocks (`prepare`, `step`, `finish`).

    Args:
        net: the module; it becomes a part of this one.
        shape: (C, H, W) of a latent, H and W multiples of `patch`.
        conditions: what it is conditioned on.
        patch: side of a token.
        prediction: v, our velocity; noise, that of a DDPM schedule with linear betas.
    Raises ValueError when the sizes do not fit each other.
    """

    ends: ClassVar[tuple[str, ...]]  #: names of the modules after the blocks
    net: Any
    ratios: Tensor

    def __init__(
        self, net: nn.Module, shape: tuple[int, ...], conditions: Conditions, patch: int, prediction: Prediction = "v"
    ) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(
                f"{type(self).__name__} takes latents of pictures (C, H, W), not {tuple(shape)}; choose another model"
            )
        channels, rows, columns = shape
        if rows % patch or columns % patch:
            raise ValueError(
                f"a latent of {rows}x{columns} does not divide into patches of {patch}; change model.patch, or take latents "
                f"whose sides are multiples of {patch}"
            )
        self.net, self.shape, self.patch, self.conditions = net, (channels, rows, columns), patch, conditions
        self.grid: tuple[int, int] = (rows // patch, columns // patch)
        self.width, self.depth = self.net.inner_dim, len(self.repeated())
        self.prediction, self.path = prediction, LINEAR
        self.predicts = "noise" if prediction == "noise" else "velocity"
        # as bits: a model that is cast to half precision must keep its schedule
        self.register_buffer("ratios", log_ratios().float().view(torch.int32), persistent=False)

    def prepare(self, x: Tensor, time: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None, tuple[Any, ...]]:
        """Latent tokens (N, T, D), text tokens (N, L, D) if the blocks change them, and the further inputs of every block.

        `time` (N,) is in the range of the embedding, 0 .. 1000.
        """
        raise NotImplementedError

    def step(
        self, block: nn.Module, tokens: Tensor, context: Tensor | None, given: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """Latent and text tokens after one block. Default: a joint block, which takes both and returns the text first."""
        context, tokens = self.run_block(block, tokens, context, *given)  # type: ignore[arg-type]
        return tokens, context

    def finish(self, tokens: Tensor, given: tuple[Any, ...]) -> Tensor:
        """(N, C or 2 C, H, W) of the tokens after the last block."""
        raise NotImplementedError

    def forward(self, x: Tensor, t: Tensor, cond: Cond, *, taps: tuple[int, ...] = (), stop: bool = False) -> Output:
        """As `Backbone`; where the original's output has a second half (variances), it is left out."""
        assert all(1 <= k <= self.depth for k in taps)
        table, time = self.ratios.view(torch.float32), TIMES * t
        if self.prediction == "noise":
            x, time = to_schedule(self.path, x, t, table)
        tokens, context, given = self.prepare(x, time, cond)
        feats: dict[int, Tensor] = {}
        for k, block in enumerate(self.repeated(), start=1):
            tokens, context = self.step(block, tokens, context, given)
            if k in taps:
                feats[k] = tokens
            if stop and len(feats) == len(set(taps)):
                return Output(None, feats)
        assert len(self.repeated()) == self.depth, "a truncated model has no velocity; call it with stop=True"
        out = self.finish(tokens, given)[:, : self.shape[0]]
        if self.prediction == "noise":
            out = from_noise(self.path, x, out, t, table)
        return Output(out, feats)

    def use_path(self, path: str) -> None:
        self.path = PATHS[path]

    def patchify(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, T, C patch²), row by row; inside a token: channel, row, column."""
        return patchify(x, (self.patch, self.patch))

    def repeated(self) -> list[nn.Module]:
        return list(self.net.transformer_blocks)

    def truncate(self, block: int) -> None:
        del self.net.transformer_blocks[block:]
        for name in self.ends:
            setattr(self.net, name, None)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Latents (N, C, H, W) through diffusers' PatchEmbed => (N, T, D).

        In autocast this sum stays in float32, and so do the residual sums over the blocks; diffusers rounds it.
        """
        layer = self.net.pos_embed.proj
        return (layer(x.to(layer.weight.dtype)).flatten(start_dim=2).transpose(1, 2) + positions).contiguous()

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(N, T, patch² c) -> (N, c, H, W); inside a token: row, column, channel."""
        return unpatchify(tokens, self.patch, tokens.shape[-1] // self.patch**2, self.grid)


def unrounded(tokens: Tensor) -> Tensor:
    """Tokens from a linear layer, in float32 also in autocast: the residual sums over the blocks start from them."""
    device = tokens.device.type
    rounded = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return tokens.float() if rounded else tokens


def pooled_text(cond: Cond, pooled: Pooled, width: int) -> Tensor:
    """(N, width), in place of the pooled vector of the text encoder, which is not stored with text conditions.

    mean: the mean of the tokens (N, L, E = width) without padding. last: the last token without padding; for CLIP this is its
    pooled output (before the projection that SD3 applies to it). none: zeros.
    """
    assert isinstance(cond, dict)
    text = cond[TEXT]
    if pooled == "none":
        return text.new_zeros(len(text), width)
    if pooled == "last":
        end = (cond[MASK].sum(dim=1) - 1).clamp(min=0)  # (N,)
        return text[torch.arange(len(text), device=text.device), end]
    kept = cond[MASK].to(text.dtype).unsqueeze(dim=-1)  # (N, L, 1)
    return (text * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)


def fit_positions(embed: Any, grid: tuple[int, int]) -> None:
    """Store the positions of a grid in diffusers' PatchEmbed, which would compute those of other grids in each call."""
    if (embed.height, embed.width) == grid:
        return
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    positions = get_2d_sincos_pos_embed(
        embed.pos_embed.shape[-1],
        grid,
        base_size=embed.base_size,
        interpolation_scale=embed.interpolation_scale,
        output_type="pt",
    )
    embed.pos_embed = positions.float().unsqueeze(dim=0)
    embed.height, embed.width = grid


def initialise(net: nn.Module, zero: Iterable[nn.Module], small: Iterable[nn.Module] = ()) -> None:
    """DiT's initialisation: Xavier; embedders of time and the modules in `small` normal with deviation 0.02; the modules in
    `zero` (gates and output) zero, so that each block starts as the identity."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            if "_embedder.linear_" in name:
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for part in small:
        nn.init.normal_(part.weight, std=0.02)  # type: ignore[arg-type]
    for part in zero:
        for parameter in part.parameters():
            nn.init.zeros_(parameter)


def check_pooled(pooled: Pooled, width: int, conditions: Conditions) -> None:
    """ValueError unless text tokens have as many channels as the pooled vector."""
    if pooled != "none" and width != conditions.width:
        raise ValueError(
            f"the pooled vector has {width} channels and a text token {conditions.width}, so model.pooled {pooled} cannot take "
            "its place; set model.pooled none"
        )
