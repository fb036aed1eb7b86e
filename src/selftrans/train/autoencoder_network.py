"""The variational autoencoder that `selftrans autoencoder` trains: settings, network (diffusers' `AutoencoderKL`) and loss.

    loss = |x - y| + kl_weight * KL / (C H W) + perceptual_weight * distance of features of x and y

y is the decoded posterior sample. The terms are divided by the numbers of a picture, so `kl_weight` is that of latent
diffusion's code (Rombach et al. 2022, arXiv 2112.10752), which sums both.
Shape legend: N batch, (C, H, W) picture in [-1, 1], D channels of a latent, (h, w) its sides, F channels of features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from selftrans.evaluate.classifier import SmallClassifier

GROUPS, PER_GROUP = 32, 4  #: most groups of a group norm; fewest channels in one


@dataclass(frozen=True)
class AutoencoderSettings:
    """How an autoencoder is built and trained. ValueError from `check`."""

    channels: int = 4  #: D
    factor: int = 4  #: side of a picture / side of its latent
    widths: tuple[int, ...] = ()  #: channels of the network at each resolution; (): 64, doubled up to 256
    depth: int = 1  #: residual blocks of the encoder at each resolution; the decoder has one more
    attention: bool = True  #: at the lowest resolution
    loss: Literal["l1", "l2"] = "l1"
    kl_weight: float = 1e-3
    perceptual: str | None = None  #: sha256 of the extractor's weights
    perceptual_weight: float = 1.0
    batch_size: int = 32
    steps: int = 20_000
    lr: float = 5e-4
    warmup: int = 200
    ema: float = 0.999
    clip: float = 1.0
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    held_out: int = 1000

    def check(self) -> AutoencoderSettings:
        """The settings with their widths; ValueError names the option that is wrong."""
        if self.factor not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"--factor {self.factor} is not a power of two up to 32; choose 2, 4 or 8")
        levels = self.factor.bit_length()
        widths = self.widths or tuple(min(64 << level, 256) for level in range(levels))
        if len(widths) != levels:
            raise ValueError(
                f"--widths has {len(widths)} numbers; factor {self.factor} needs {levels}, one per resolution"
            )
        if any(width < 4 or width % 4 for width in widths):
            raise ValueError(f"--widths {' '.join(map(str, widths))}: each should be a multiple of 4")
        for name, low in {"channels": 1, "depth": 1, "batch_size": 1, "steps": 1, "warmup": 0, "held_out": 1}.items():
            if getattr(self, name) < low:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} should be at least {low}")
        for name in ("lr", "clip", "kl_weight", "perceptual_weight"):
            value = getattr(self, name)
            above = name in ("lr", "clip")
            if not math.isfinite(value) or value < 0 or (above and not value):
                expected = "above zero" if above else "zero or above"
                raise ValueError(f"--{name.replace('_', '-')} {value} should be a finite number, {expected}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema {self.ema} should be in [0, 1)")
        return replace(self, widths=widths)

    def learning_rate(self, step: int) -> float:
        """Rate of the 0-based step: linear warm-up, then half a cosine down to zero at the last step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))


def build_autoencoder(settings: AutoencoderSettings, picture_channels: int, side: int) -> Any:
    """Diffusers' AutoencoderKL for these (checked) settings, drawn by torch's RNG. `side`: the larger one of the pictures."""
    from diffusers import AutoencoderKL

    levels = len(settings.widths)
    groups = math.gcd(GROUPS, *(width // PER_GROUP for width in settings.widths))
    return AutoencoderKL(
        in_channels=picture_channels,
        out_channels=picture_channels,
        latent_channels=settings.channels,
        block_out_channels=settings.widths,
        layers_per_block=settings.depth,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=groups,
        mid_block_add_attention=settings.attention,
        sample_size=side,
        scaling_factor=1.0,
    )


def posterior(vae: Any, pixels: Tensor) -> Any:
    """Diffusers' DiagonalGaussianDistribution over latents (N, D, h, w), in float32, also under autocast."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    return DiagonalGaussianDistribution(vae.encode(pixels).latent_dist.parameters.float())


class PerceptualDistance(nn.Module):
    """Distance of pictures in a middle layer of one of our classifiers, frozen.

    At every position features (F,) are divided by their length, as in LPIPS (Zhang et al. 2018, arXiv 1801.03924, without its
    learned weights); the squared differences are summed over F and averaged over positions.
    """

    def __init__(self, classifier: SmallClassifier, picture_channels: int) -> None:
        super().__init__()
        if classifier.arrays or classifier.channels != picture_channels:
            kind = "arrays" if classifier.arrays else f"pictures of {classifier.channels} channels"
            raise ValueError(f"--perceptual: the classifier is of {kind}, the pictures have {picture_channels}")
        self.trunk = middle(classifier.trunk).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stays in eval mode: its batch norms are frozen."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(N,) distances of pictures (N, C, H, W) in [-1, 1], from 0 to 4."""
        a, b = (F.normalize(self.trunk(each).float(), dim=1) for each in (x, y))
        return (a - b).square().sum(dim=1).mean(dim=(1, 2))


def middle(trunk: Iterable[nn.Module]) -> nn.Sequential:
    """The first half of the convolutions of a classifier's trunk, each with its norm and activation."""
    layers = list(trunk)
    ends = [i + 3 for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    return nn.Sequential(*layers[: ends[(len(ends) - 1) // 2]])


class AutoencoderLoss(nn.Module):
    """The network and its loss. `distance` is no submodule: never optimised, never saved."""

    distance: PerceptualDistance | None

    def __init__(
        self, vae: nn.Module, settings: AutoencoderSettings, distance: PerceptualDistance | None = None
    ) -> None:
        super().__init__()
        self.vae, self.settings = vae, settings
        self.__dict__["distance"] = distance

    def forward(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of pictures (N, C, H, W), and its parts, 0-d; noise is drawn by torch's default generator."""
        vae, settings = cast(Any, self.vae), self.settings
        found = posterior(vae, pixels)
        decoded = vae.decode(found.sample()).sample.float()
        difference = decoded - pixels
        l1, kl = difference.abs().mean(), found.kl().mean()
        error = l1 if settings.loss == "l1" else difference.square().mean()
        loss = error + settings.kl_weight * kl / pixels[0].numel()
        report = {"l1": l1, "kl": kl}
        if self.distance is not None:
            distance = self.distance(pixels, decoded).mean()
            loss, report = loss + settings.perceptual_weight * distance, report | {"perceptual": distance}
        return loss, {name: value.detach() for name, value in ({"loss": loss} | report).items()}
