"""Velocity ⇒ latents: the samplers, and guidance on an interval of t: classifier-free, by a weak model, by an early output.

Time runs from t = 1 (noise) to t = 0 (data). Samplers are plain functions on `velocity(z, t)`, where t is a float64
scalar tensor on the CPU, so that reading t never waits for the GPU. Shape legend: N batch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from selftrans.flow import LINEAR, Path, score_from_v, shifted
from selftrans.messages import plural
from selftrans.types import Backbone, Cond, Output, cat_cond, tensors_of

Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]  #: (z (N, ...), t ()) -> (N, ...)
Noise: TypeAlias = Callable[[], Tensor]  #: the next standard normal (N, ...)
#: (z (N, ...), times (N,), cond, *choices) -> velocity (N, ...): all that the host decides is in the choices, such as whether
#: guidance is on, so that it can be recorded as a graph for each of them
Pass: TypeAlias = Callable[..., Tensor]
Run: TypeAlias = Callable[..., Tensor]  #: (a pass, z, t (), cond, *choices) -> velocity: see `launched`


class Early(NamedTuple):
    """Guidance by the model's second output."""

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)  #: of t


def ode(
    velocity: Velocity, z: Tensor, *, steps: int, method: Literal["euler", "heun"] = "heun", shift: float = 1.0
) -> Tensor:
    """Integrate dz/dt = v from t = 1 to t = 0 on a uniform grid, `shifted`, in the dtype of z (N, ...).

    `euler` is first-order with one evaluation per step; `heun` is second-order with two, also in the last step (the
    velocity is defined at t = 0). Raises ValueError for an unknown method or less than one step.
    """
    if method not in ("euler", "heun"):
        raise ValueError(f"ODE method {method!r} is unknown; choose 'euler' or 'heun'")
    for t, t_next in pairwise(ode_times(steps, shift)):
        dt = t_next - t
        v = velocity(z, t)
        end = z + dt * v
        if method == "heun":
            end = z + dt * (v + velocity(end, t_next)) / 2
        z = end
    return z


def ode_times(steps: int, shift: float = 1.0) -> Tensor:
    """The grid of `ode`: (steps + 1,) float64 from 1 to 0. ValueError for less than one step."""
    _check_steps(steps, least=1)
    return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu"), shift)


def sde(
    velocity: Velocity,
    z: Tensor,
    *,
    steps: int,
    path: Path = LINEAR,
    last: float = 0.04,
    noise: Noise | None = None,
    shift: float = 1.0,
) -> Tensor:
    """Euler–Maruyama on the reverse SDE, as in SiT (2401.08740, eq. 4) and REPA's published sampler.

        dz = (v - w/2 score) dt + sqrt(w) dB,   w(t) = 2 t

    Any w >= 0 gives the same marginals. On the linear path 2 t is 2 sigma; REPA uses 2 t on its cosine path too, and so
    does this function. The grid runs from 1 to `last` in steps - 1 equal noisy steps, followed by one noise-free step
    with the same drift to 0: `steps` evaluations in total.

    Args:
        z: (N, ...) noise at t = 1; its dtype is kept.
        last: t at which the last step starts; below it the score changes too fast for a step of this size.
        noise: returns the next standard normal in the shape of z; default torch.randn_like.
        shift: the noisy steps are equal before they are `shifted`; they still end at `last`.
    Raises ValueError for less than two steps, or `last` outside (0, 1).
    """
    draw = noise or (lambda: torch.randn_like(z))
    for t, t_next in pairwise(sde_times(steps, last, shift)):
        z = sde_step(z, velocity(z, t), t, t_next, path, draw)
    return z


def sde_times(steps: int, last: float = 0.04, shift: float = 1.0) -> Tensor:
    """The grid of `sde`: (steps + 1,) float64 from 1 to 0. Raises ValueError as `sde` does."""
    _check_steps(steps, least=2)
    if not 0 < last < 1:
        raise ValueError(f"the last SDE step starts at t = {last}; choose a value between 0 and 1, such as 0.04")
    lowest = last if shift == 1 else last / (shift - (shift - 1) * last)  # its shifted value is `last`
    noisy = shifted(torch.linspace(1, lowest, steps, dtype=torch.float64, device="cpu"), shift)
    return torch.cat([noisy, noisy.new_zeros(1)])


def sde_step(z: Tensor, v: Tensor, t: Tensor, t_next: Tensor, path: Path, noise: Noise) -> Tensor:
    """One step of `sde` from t to t_next, with the velocity v at z (N, ...); the step to 0 draws no noise."""
    w = 2 * t
    z = z + (t_next - t) * (v - w / 2 * score_from_v(path, z, v, t))
    return z + torch.sqrt(w * (t - t_next)) * noise() if t_next > 0 else z


def _check_steps(steps: int, least: int) -> None:
    if not math.isfinite(steps) or int(steps) != steps:
        raise ValueError(f"{steps} sampling steps are no whole number; give one")
    if steps < least:
        raise ValueError(f"{steps} sampling steps are too few; use at least {least}")


def _ode(method: Literal["euler", "heun"]) -> Callable[..., Tensor]:
    """The ODE sampler with the signature of SAMPLERS; it ignores the path and the noise."""
    return lambda velocity, z, *, steps, path, noise, shift=1.0: ode(
        velocity, z, steps=steps, method=method, shift=shift
    )


#: name -> sampler(velocity, z, *, steps, path, noise, shift); `ode` is another name for Heun's method
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": _ode("euler"),
    "heun": _ode("heun"),
    "ode": _ode("heun"),
    "sde": sde,
}
EVALUATIONS = {"euler": 1, "heun": 2, "ode": 2, "sde": 1}  #: of the velocity, per step


def launched(compute: Pass, z: Tensor, t: Tensor, cond: Cond, *choices: Any) -> Tensor:
    """The velocity (N, ...) of a pass at t (), computed at once."""
    return compute(z, torch.full((z.shape[0],), float(t), device=z.device, dtype=time_dtype(z)), cond, *choices)


def time_dtype(z: Tensor) -> torch.dtype:
    """The dtype of a model's times: float32 at least, since half precision would round times of 250 steps together."""
    return torch.promote_types(z.dtype, torch.float32)


def scaled(velocity: Velocity, factor: float) -> Velocity:
    """The velocity times a factor; 1 leaves it as it is.

    For data of mean zero it is guidance by the weakest model of all, whose velocity is zero; training by Contrastive Flow
    Matching (2506.05350) has the same effect, with the factor 1 / (1 - c).
    """
    return velocity if factor == 1 else lambda z, t: factor * velocity(z, t)


def guided(
    model: Backbone,
    cond: Cond,
    *,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
    early: Early | None = None,
    run: Run = launched,
) -> Velocity:
    """Velocity of a model with classifier-free guidance, v_u + scale (v_c - v_u), for interval[0] <= t <= interval[1].

    Both halves are computed as one batch of 2 N. Outside the interval (Kynkäänniemi et al., 2404.07724), or with
    scale 1, the unconditional half is not computed. A model without conditions is not guided, with a warning. ValueError
    for labels of no class.
    With `channels`, only the first so many of the C channels are guided, and the others are those of v_c (as in the published
    sampling code of DiT, SiT and LightningDiT, with 3). With `early`, v_c and v_u are those of `early_guided`. `run` computes
    the passes.
    """
    if isinstance(model, Backbone):
        model.conditions.check_labels(cond, cond.shape[0] if isinstance(cond, Tensor) and cond.dim() else 1, null=True)
    if not math.isfinite(scale):
        raise ValueError(f"guidance scale {scale} is not finite; give a number, 1 for none")
    first = tensors_of(cond)[0]
    rows = first.shape[0] if first.dim() else 1
    null = model.null(cond) if scale != 1 else cond  # an imported model of text may not know it
    if scale != 1 and all(torch.equal(a, b) for a, b in zip(tensors_of(cond), tensors_of(null), strict=True)):
        warnings.warn(f"guidance scale {scale} is ignored: the condition is the null condition", stacklevel=2)
        scale = 1.0
    both = cat_cond(cond, null) if scale != 1 else cond

    def compute(z: Tensor, times: Tensor, cond: Cond, halves: bool, weight: float) -> Tensor:
        if not halves:
            return early_guided(model, z, times, cond, weight)
        z, times = torch.cat([z, z], dim=0), torch.cat([times, times], dim=0)
        conditional, unconditional = early_guided(model, z, times, cond, weight).chunk(2, dim=0)
        v = unconditional + scale * (conditional - unconditional)
        return v if channels is None else torch.cat([v[:, :channels], conditional[:, channels:]], dim=1)

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        if z.shape[0] != rows and not (rows == 1 and scale == 1):  # one condition holds for all
            raise ValueError(f"{plural(z.shape[0], 'latent')} but conditions of {rows}; give one for each")
        halves = scale != 1 and inside(t, interval)
        return run(compute, z, t, both if halves else cond, halves, early_weight(early, t))

    return velocity


def autoguided(
    model: Backbone,
    weak: Backbone,
    cond: Cond,
    *,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    early: Early | None = None,
    run: Run = launched,
) -> Velocity:
    """Velocity of a model guided by a weaker one, v_weak + scale (v - v_weak), for interval[0] <= t <= interval[1].

    Autoguidance (Karras et al., 2406.02507): both get the same condition, so the extrapolation reduces errors that are larger
    in the weak model. Outside the interval the weak model is not computed. With `early`, v is that of `early_guided`. `run`
    computes the passes.
    """

    def compute(z: Tensor, times: Tensor, cond: Cond, both: bool, weight: float) -> Tensor:
        v = early_guided(model, z, times, cond, weight)
        if not both:
            return v
        v_weak = early_guided(weak, z, times, cond, 1.0)
        return v_weak + scale * (v - v_weak)

    return lambda z, t: run(compute, z, t, cond, inside(t, interval), early_weight(early, t))


def early_weight(early: Early | None, t: Tensor) -> float:
    """The scale of guidance by the second output at t: 1 outside its interval, and without `early`."""
    return early.scale if early is not None and inside(t, early.interval) else 1.0


def early_guided(model: Backbone, z: Tensor, times: Tensor, cond: Cond, scale: float) -> Tensor:
    """Velocity at times (N,) of a model guided by its own second output, v_early + scale (v - v_early).

    Internal Guidance (Zhou et al., 2512.24176), of one pass; both halves of classifier-free guidance are so, as released.
    With scale 1 the second output is not computed.
    """
    if scale != 1:
        return extrapolated(model, z, times, cond, scale)
    return velocity_of(model, model(z, times, cond), z)


def extrapolated(model: Backbone, z: Tensor, times: Tensor, cond: Cond, scale: float) -> Tensor:
    """v_early + scale (v - v_early) at times (N,), from one pass of a model that has a second output."""
    out = model(z, times, cond, taps=(model.early_block,))
    v = velocity_of(model, out, z)
    weak = model.from_tokens(model.early_cells(out.feats[model.early_block]), tuple(z.shape[1:])).to(z.dtype)
    return weak + scale * (v - weak)


def velocity_of(model: Backbone, out: Output, z: Tensor) -> Tensor:
    """The velocity that a model returned at z (N, ...), in the dtype of z. ValueError for one of another shape."""
    assert out.v is not None
    if out.v.shape != z.shape:  # else a prediction of other channels would be broadcast
        raise ValueError(
            f"{type(model).__name__} returned {tuple(out.v.shape)}; expected a velocity of shape {tuple(z.shape)}"
        )
    return out.v.to(z.dtype)


def inside(t: Tensor, interval: tuple[float, float]) -> bool:
    """Whether t lies in a closed interval; times of a grid have rounding errors, and 0.65 must count as 0.65."""
    return interval[0] - 1e-9 <= float(t) <= interval[1] + 1e-9
