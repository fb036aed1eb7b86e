"""The variational autoencoder that `selftrans autoencoder` trains: network (diffusers' `AutoencoderKL`) and loss.

    loss = |x - y| + kl_weight * KL / (C H W) + perceptual_weight * distance of features of x and y

y is the decoded posterior sample. Both terms are means over the numbers of a picture. Latent diffusion's code (Rombach et al.
2022, arXiv 2112.10752) sums both instead, so its `kl_weight` can be used here.
Shape legend: N batch, (C, H, W) picture in [-1, 1], D channels of a latent, (h, w) its sides, F channels of features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from selftrans.evaluate.classifier import SmallClassifier
from selftrans.train.autoencoder_settings import AutoencoderSettings

GROUPS, PER_GROUP = 32, 4  #: most groups of a group norm; fewest channels in one


def build_autoencoder(settings: AutoencoderSettings, picture_channels: int, side: int) -> Any:
    """Diffusers' AutoencoderKL for these (checked) settings, with weights drawn by torch's RNG. `side`: longer side of a
    picture."""
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
