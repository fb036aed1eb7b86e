"""DiT (Peebles and Xie, 2212.09748) as it is released: SiT's network, trained to predict the noise of a discrete DDPM schedule.

The schedule has 1000 steps x_k = sqrt(abar_k) z0 + sqrt(1 - abar_k) noise: that of DDPM (2006.11239), beta from 1e-4 to 0.02
linearly, which all released models have, or the cosine schedule (2102.09672).
A point of our path, z_t = alpha z0 + sigma noise, is a point of the schedule up to a scale:
    z_t / sqrt(alpha² + sigma²) = x_k    where    sqrt((1 - abar_k) / abar_k) = sigma / alpha
so the network predicts the noise at that x_k and k, and the prediction is turned into the velocity of our path:
    z0 = (x_k - sqrt(1 - abar_k) noise) / sqrt(abar_k)        v = alpha' z0 + sigma' noise
k lies between two steps; the logarithm of the noise-to-signal ratio is interpolated (as in k-diffusion). The same weights serve
both paths, so the path is no setting of the model; the run's `train.path` sets it (`use_path`).
Shape legend: N batch, (C, *S) latent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from selftrans.flow import LINEAR, PATHS, Path, column
from selftrans.models.patch_transformer import published_sizes
from selftrans.models.sit import SIZES, SiT, SiTConfig
from selftrans.types import Cond, Conditions, Output

STEPS, BETAS = 1000, (1e-4, 0.02)  #: the schedule of all released models
OFFSET, LARGEST_BETA = 0.008, 0.999  #: of the cosine schedule
Schedule: TypeAlias = Literal["linear", "cosine"]
DIT_SIZES = published_sizes("DiT", SIZES, patches=(2, 4, 8))


@dataclass(frozen=True)
class DiTConfig(SiTConfig):
    """A DiT: SiT's network, which predicts noise."""

    published = DIT_SIZES

    name: str = "DiT-S/2"
    """published size, DiT-{S,B,L,XL}/{2,4,8}"""
    qk_norm: bool = False
    """LayerNorm on queries and keys; the released models have none"""
    learn_sigma: bool = True
    """the output has a second half, the variance, as in the released models; it is neither used nor trained"""
    schedule: Schedule = "linear"
    """of the noise: linear betas, as in the released models, or cosine"""

    @property
    def predicts(self) -> Literal["velocity", "noise"]:
        return "noise"


def build(config: DiTConfig, shape: tuple[int, ...], conditions: Conditions) -> DiT:
    """A freshly initialised DiT for latents (C, *S). ValueError for shapes that it cannot take, and for text."""
    return config.build(DiT, shape, conditions, ("qk_norm", "learn_sigma", "schedule"))


def log_ratios(schedule: Schedule = "linear") -> Tensor:
    """(K,) float64, increasing: log of the noise-to-signal ratio sqrt((1 - abar_k) / abar_k) of each step.

    K is 1000. Of the cosine schedule only the steps are kept with a ratio up to the largest of the linear one (157): at larger
    ratios z0 is lost in the noise in float32.
    """
    # passed explicitly: after transformers has loaded a model, `with torch.device(...)` may no longer apply to torch.linspace
    device = torch.get_default_device()
    beta = torch.linspace(*BETAS, STEPS, dtype=torch.float64, device=device)
    linear = _log_ratios(beta)
    if schedule == "linear":
        return linear
    level = torch.cos(
        (torch.linspace(0, 1, STEPS + 1, dtype=torch.float64, device=device) + OFFSET) / (1 + OFFSET) * math.pi / 2
    ).square()
    cosine = _log_ratios((1 - level[1:] / level[:-1]).clamp(max=LARGEST_BETA))
    return cosine[cosine <= linear[-1]]


def _log_ratios(beta: Tensor) -> Tensor:
    log_abar = torch.log1p(-beta).cumsum(dim=0)
    return 0.5 * (torch.log(-torch.expm1(log_abar)) - log_abar)


def timestep(log_ratio: Tensor, table: Tensor) -> Tensor:
    """(N,) position between 0 and 999 at which the schedule has these log ratios, clamped to its first and last step."""
    inside = log_ratio.clamp(table[0], table[-1])
    above = torch.searchsorted(table, inside).clamp(1, len(table) - 1)
    low, high = table.gather(0, above - 1), table.gather(0, above)
    return above - 1 + (inside - low) / (high - low)


def velocity(path: Path, x: Tensor, noise: Tensor, ratio: Tensor, t: Tensor) -> Tensor:
    """Velocity of the path at t, from x of variance-preserving scale with this noise-to-signal ratio and its noise.

    All of x's shape, or broadcasting over it. With ratio = sigma / alpha it is exact.
    """
    z0 = torch.sqrt(1 + ratio.square()) * x - ratio * noise
    return path.d_alpha(t) * z0 + path.d_sigma(t) * noise


def to_schedule(path: Path, x: Tensor, t: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """A point x (N, C, *S) of our path at t (N,) => (the schedule's x_k, (N,) its step k). `table`: see `log_ratios`."""
    alpha, sigma = path.alpha(t).clamp(min=0), path.sigma(t)  # rounded, the cosine of pi / 2 is negative
    step = timestep(torch.log(sigma / alpha).to(table.dtype), table)
    return x * column(torch.rsqrt(alpha.square() + sigma.square()), x), step


def from_noise(path: Path, scaled: Tensor, noise: Tensor, t: Tensor, table: Tensor) -> Tensor:
    """Velocity of our path at t (N,), from the network's noise (N, C, *S) at `scaled`, which `to_schedule` gave."""
    ratio = path.sigma(t) / path.alpha(t).clamp(min=0)
    ratio = column(torch.minimum(ratio, table[-1].exp().to(t.dtype)), scaled)
    return velocity(path, scaled, noise.to(scaled.dtype), ratio, column(t, scaled))


class DiT(SiT):
    """A SiT whose output is the noise of the DDPM schedule; called in our time, it returns the velocity of `path`.

    Times beyond the schedule's last step (linear path: t > 0.9937, cosine betas t > 0.9923) are treated as that step: alpha
    vanishes at t = 1, and z0 would be the quotient of two small numbers. Those before its first step (t < 0.0099, 0.0064) get
    that step's noise.
    """

    predicts = "noise"
    ratios: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        *,
        path: Path = LINEAR,
        learn_sigma: bool = True,
        schedule: Schedule = "linear",
        **sizes: int,
    ) -> None:
        super().__init__(shape, num_classes, learn_sigma=learn_sigma, **sizes)  # type: ignore[arg-type]
        self.path, self.learn_sigma = path, learn_sigma
        # as bits: a model that is cast to half precision must keep its schedule
        self.register_buffer("ratios", log_ratios(schedule).float().view(torch.int32), persistent=False)

    def use_path(self, path: str) -> None:
        self.path = PATHS[path]

    def forward(self, x: Tensor, t: Tensor, cond: Cond, *, taps: tuple[int, ...] = (), stop: bool = False) -> Output:
        """As `SiT`; features are those of the network at the matching step of the schedule."""
        table = self.ratios.view(torch.float32)
        scaled, step = to_schedule(self.path, x, t, table)
        found = super().forward(scaled, step, cond, taps=taps, stop=stop)
        if found.v is None:
            return found
        return Output(from_noise(self.path, scaled, found.v, t, table), found.feats)
