"""Probability paths between data and noise: the interpolant exists once, for training and for sampling.

**t = 0 is data, t = 1 is noise**, for every function of the package. A path is four functions of t:
    z_t = alpha(t) z0 + sigma(t) noise          v = alpha'(t) z0 + sigma'(t) noise
Everything else (noise and score from a velocity) is linear algebra on those four.
Shape legend: N batch, (C, *S) latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from selftrans.types import Batch, Cond, Draw, where_cond

HALF_PI = math.pi / 2


#: whose squared error the flow loss is: the velocity's, the noise's, or that of what the network predicts
Loss: TypeAlias = Literal["own", "velocity", "noise"]


class Path(Protocol):
    """A path between data and noise; each function maps t (any shape) to a tensor of that shape."""

    name: str

    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def d_alpha(self, t: Tensor) -> Tensor: ...
    def d_sigma(self, t: Tensor) -> Tensor: ...
    def t_of_ratio(self, ratio: Tensor) -> Tensor:
        """t at which sigma / alpha has this value."""
        ...


class LinearPath:
    """alpha = 1 - t, sigma = t, v = noise - z0."""

    name = "linear"

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def t_of_ratio(self, ratio: Tensor) -> Tensor:
        return ratio / (1 + ratio)


class CosinePath:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    name = "cosine"

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(HALF_PI * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(HALF_PI * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -HALF_PI * torch.sin(HALF_PI * t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return HALF_PI * torch.cos(HALF_PI * t)

    def t_of_ratio(self, ratio: Tensor) -> Tensor:
        return torch.atan(ratio) / HALF_PI


LINEAR: Path = LinearPath()
COSINE: Path = CosinePath()
#: name -> path
PATHS = {path.name: path for path in (LINEAR, COSINE)}


def column(t: Tensor, x: Tensor) -> Tensor:
    """(N,) or scalar t, shaped to broadcast over x (N, ...)."""
    return t if t.dim() == 0 else t.view(-1, *[1] * (x.dim() - 1))


def interpolate(path: Path, z0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Point on the path and its velocity, `(zt, v)`, from data z0 and noise at times t (N,) or (); all others (N, C, *S)."""
    t = column(t, z0)
    zt = path.alpha(t) * z0 + path.sigma(t) * noise
    v = path.d_alpha(t) * z0 + path.d_sigma(t) * noise
    return zt, v


def noise_from_v(path: Path, zt: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Noise that the velocity points to."""
    t = column(t, zt)
    return (path.alpha(t) * v - path.d_alpha(t) * zt) / _determinant(path, t)


def noise_per_velocity(path: Path, t: Tensor) -> Tensor:
    """The error of the noise that a velocity points to, as a multiple of the velocity's error; in the shape of t."""
    return path.alpha(t) / _determinant(path, t)


def _determinant(path: Path, t: Tensor) -> Tensor:
    return path.alpha(t) * path.d_sigma(t) - path.d_alpha(t) * path.sigma(t)  # linear: 1; cosine: pi / 2


def score_from_v(path: Path, zt: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Gradient of log p_t at zt; defined for t > 0 (sigma must not vanish)."""
    return -noise_from_v(path, zt, v, t) / path.sigma(column(t, zt))


def equal_snr(t: float, std: float, path: Path) -> float:
    """The time at which data of standard deviation `std` have the signal-to-noise ratio that unit data have at `t`.

    The ratio is (std alpha / sigma)², so sigma / alpha must be `std` times as large. The ends t = 0 and t = 1 stay.
    """
    if std == 1 or t in (0, 1):
        return t
    time = torch.tensor(t, dtype=torch.float64, device="cpu")
    return float(path.t_of_ratio(std * path.sigma(time) / path.alpha(time)))


def equal_snr_range(span: tuple[float, float] | None, std: float, path: Path) -> tuple[float, float] | None:
    """`equal_snr` of both ends of a range; None stays None."""
    return None if span is None else (equal_snr(span[0], std, path), equal_snr(span[1], std, path))


def uniform_times(n: int, path: Path, device: torch.device) -> Tensor:
    """(n,) independent times, uniform on [0, 1]."""
    return torch.rand(n, device=device)


def systematic_times(n: int, path: Path, device: torch.device) -> Tensor:
    """(n,) shuffled times (i + u) / n with one u: each uniform on [0, 1], one in each nth of it.

    Any range [a, b] then holds at most floor(n (b - a)) + 1 of them, which gives static shapes (see `Draw.even`).
    """
    u = torch.rand((), device=device)
    return (torch.randperm(n, device=device) + u) / n


def lognormal_times(n: int, path: Path, device: torch.device) -> Tensor:
    """(n,) times whose noise-to-signal ratio is log-normal with EDM's mean -1.2 and deviation 1.2 (2206.00364, table 1)."""
    return path.t_of_ratio(torch.exp(torch.randn(n, device=device) * 1.2 - 1.2))


def lognormal_standard_times(n: int, path: Path, device: torch.device) -> Tensor:
    """(n,) times whose noise-to-signal ratio is log-normal with mean 0 and deviation 1 (REPA's "lognormal", in its loss.py).

    On the linear path the same density as `logitnormal_times`.
    """
    return path.t_of_ratio(torch.exp(torch.randn(n, device=device)))


def logitnormal_times(n: int, path: Path, device: torch.device) -> Tensor:
    """(n,) times whose logit is standard normal (SD3, 2403.03206, section 3.1; LightningDiT's "lognorm")."""
    return torch.sigmoid(torch.randn(n, device=device))


def systematic_logitnormal_times(n: int, path: Path, device: torch.device) -> Tensor:
    """(n,) shuffled times of the distribution of `logitnormal_times`, one in each of n parts of equal probability."""
    # the quantile of a normal distribution; torch's ndtri runs on a CPU and on CUDA devices only
    return torch.sigmoid(math.sqrt(2) * torch.erfinv(2 * systematic_times(n, path, device) - 1))


def _normal_share(x: float) -> float:
    """Share of a standard normal distribution below x."""
    return (1 + math.erf(x / math.sqrt(2))) / 2


def _log_ratio(t: float, path: Path) -> float:
    """Logarithm of sigma / alpha at a time between the ends."""
    time = torch.tensor(t, dtype=torch.float64, device="cpu")
    return float(torch.log(path.sigma(time) / path.alpha(time)))


class Times(NamedTuple):
    """How the times of a batch are drawn."""

    draw: Callable[[int, Path, torch.device], Tensor]  #: (n,) times in [0, 1]
    below: Callable[[float, Path], float]  #: the share of them, on average, below a time between 0 and 1
    even: bool = False  #: one in each of n parts of equal probability: a range holds a bounded number of them

    def share(self, span: tuple[float, float], path: Path) -> float:
        """The share of the times, on average, in a range."""
        a, b = (t if t in (0, 1) else self.below(t, path) for t in span)
        return b - a


def _logitnormal_below(t: float, path: Path) -> float:
    return _normal_share(math.log(t / (1 - t)))


TIMES = {
    "systematic": Times(systematic_times, lambda t, path: t, even=True),
    "uniform": Times(uniform_times, lambda t, path: t),
    "lognormal": Times(lognormal_times, lambda t, path: _normal_share((_log_ratio(t, path) + 1.2) / 1.2)),
    "lognormal_standard": Times(lognormal_standard_times, lambda t, path: _normal_share(_log_ratio(t, path))),
    "logitnormal": Times(logitnormal_times, _logitnormal_below),
    "systematic_logitnormal": Times(systematic_logitnormal_times, _logitnormal_below, even=True),
}


def shifted(times: Tensor, shift: float) -> Tensor:
    """t -> k t / (1 + (k - 1) t) for k = `shift`, which keeps 0 and 1 (SD3, 2403.03206, section 5.3.2); its inverse is 1 / k.

    On the linear path it makes the noise-to-signal ratio k times as large. LightningDiT's `timestep_shift` s, where t = 0 is
    noise, is k = 1 / s.
    """
    return times if shift == 1 else shift * times / (1 + (shift - 1) * times)


def times_of(name: str, shift: float = 1.0) -> Times:
    """How times are drawn: as `TIMES[name]` says, and then `shifted`.

    ValueError for a name that is not in `TIMES`, and for a shift that is not above zero.
    """
    if name not in TIMES:
        raise ValueError(f"times {name!r} is unknown; choose one of {', '.join(TIMES)}")
    if not 0 < shift < math.inf:
        raise ValueError(f"time_shift {shift} must be a finite number above zero; 1 leaves the times as they are drawn")
    plain = TIMES[name]
    if shift == 1:
        return plain

    def below(t: float, path: Path) -> float:
        return plain.below(t / (shift - (shift - 1) * t), path)

    return Times(lambda n, path, device: shifted(plain.draw(n, path, device), shift), below, plain.even)


def own_times(t: Tensor, n: int) -> Tensor:
    """Times that a caller gives, in float32. ValueError unless they are (n,) floats in [0, 1]; of times on a GPU the device
    checks the range."""
    if not isinstance(t, Tensor) or t.shape != (n,) or not t.is_floating_point():
        found = f"a {type(t).__name__}"
        if isinstance(t, Tensor):
            found = f"{str(t.dtype).removeprefix('torch.')} of shape {tuple(t.shape)}"
        raise ValueError(f"times must be floats of shape ({n},) in [0, 1], one per sample, not {found}")
    inside = ((t >= 0) & (t <= 1)).all()
    if t.device.type == "cuda":
        torch._assert_async(inside, "times must be in [0, 1], of which 0 is data and 1 is noise")
    elif not torch.compiler.is_compiling() and not inside:
        raise ValueError(f"times must be in [0, 1], of which 0 is data and 1 is noise, not {t.min():g} to {t.max():g}")
    return t.float()


def draw(
    batch: Batch,
    null: Cond,
    *,
    path: Path = LINEAR,
    times: str = "systematic",
    time_shift: float = 1.0,
    drop: float = 0.1,
    t: Tensor | None = None,
    noise: Tensor | None = None,
) -> Draw:
    """Draw time, noise and the dropped condition of a step from torch's default generator, once for all losses.

    Args:
        batch: latents z0 (N, C, *S) and their true condition.
        null: the model's null condition for this batch, `model.null(batch.cond)`.
        path: on which the points lie. times, time_shift: how t is drawn, see `times_of`.
        drop: probability in [0, 1] that a sample's condition is replaced by the null one, in `Draw.dropped`.
        t: times (N,) in [0, 1] that are used in place of drawn ones. noise: likewise, in the shape of z0.
    Raises ValueError as `times_of`, and for times and noise of another shape.
    """
    law = times_of(times, time_shift)
    n, device = batch.z0.shape[0], batch.z0.device
    even, share = False, None
    if t is None:
        drawn, even, share = law.draw(n, path, device), law.even, partial(law.share, path=path)
    else:
        drawn = own_times(t, n)
    noise = torch.randn_like(batch.z0) if noise is None else noise
    if noise.shape != batch.z0.shape:
        raise ValueError(f"noise must have the latents' shape {tuple(batch.z0.shape)}, not {tuple(noise.shape)}")
    zt, v = interpolate(path, batch.z0, noise, drawn)
    dropped = where_cond(torch.rand(n, device=device) < drop, null, batch.cond)
    return Draw(batch.z0, noise, drawn, zt, v, batch.cond, null, dropped, even, batch.features, share=share)
