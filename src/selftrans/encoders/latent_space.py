"""Moments, what an encoder returns and the disk stores, and latents, what a model is trained on.

Shape legend: N batch, (C, *S) latent with one to three spatial dimensions S, M moments channels (2C when stochastic,
else C).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from selftrans.plain_json import Number


class Moments(NamedTuple):
    """The raw output of an encoder for a batch, not yet scaled."""

    mean: Tensor  #: (N, C, *S)
    std: Tensor | None  #: (N, C, *S); None when the autoencoder is deterministic

    def stack(self) -> Tensor:
        """(N, M, *S): mean, then std if there is one, concatenated along the channels."""
        return self.mean if self.std is None else torch.cat([self.mean, self.std], dim=1)


@dataclass(frozen=True)
class LatentSpace:
    """Conversion between stored moments and the latents of a model: latents = (sample - shift) * scale."""

    shift: Number | tuple[Number, ...]  #: one number, or one per channel
    scale: Number | tuple[Number, ...]  #: likewise
    stochastic: bool  #: moments hold the mean and then a standard deviation

    def of_channels(self, count: int) -> LatentSpace:
        """With a number for each of `count` channels, where there is one for all. Raises ValueError for another count."""
        if not isinstance(self.shift, tuple) or not isinstance(self.scale, tuple):
            return self
        if len(self.shift) not in (1, count):
            raise ValueError(f"has a shift for {len(self.shift)} channels, but the data have {count}")
        return self if len(self.shift) == count else replace(self, shift=self.shift * count, scale=self.scale * count)

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Stored moments (N, M, *S) to scaled float32 latents (N, C, *S). If stochastic, sampled with `noise`, standard normal
        and of the latents' shape; None: drawn by torch's default RNG."""
        if not self.stochastic:
            return self.mean(moments)
        assert moments.shape[1] % 2 == 0, "stochastic moments are mean and std stacked along the channels"
        mean, std = moments.float().chunk(2, dim=1)
        drawn = torch.addcmul(mean, std, torch.randn_like(mean) if noise is None else noise)
        return drawn.sub_(_per_channel(self.shift, drawn)).mul_(_per_channel(self.scale, drawn))

    def mean(self, moments: Tensor) -> Tensor:
        """Scaled float32 latents (N, C, *S) of the posterior mean, without sampling."""
        mean = moments.float().chunk(2, dim=1)[0] if self.stochastic else moments.float()
        return (mean - _per_channel(self.shift, mean)) * _per_channel(self.scale, mean)

    def unscale(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, C, *S) to the raw float32 latents that the decoder reads."""
        raw = latents.float()
        return raw / _per_channel(self.scale, raw) + _per_channel(self.shift, raw)


UNSCALED = LatentSpace(0.0, 1.0, stochastic=False)  #: latents are the moments


def _per_channel(value: float | tuple[float, ...], like: Tensor) -> float | Tensor:
    """A single number unchanged; numbers per channel as a tensor that broadcasts along dim 1 of `like` (N, C, *S)."""
    return _column(value, like.dim() - 2, like.device) if isinstance(value, tuple) else value


@lru_cache(maxsize=16)  # copied to a GPU only once, since a training step would wait for the copy
def _column(values: tuple[float, ...], spatial: int, device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(-1, *[1] * spatial)  # (C, 1, ...)
