"""Velocity ⇒ latents ⇒ images: the samplers, guidance on an interval, and one random stream per image.

Time runs from t = 1 (noise) to t = 0 (data). Samplers are plain functions on `velocity(z, t)`, where t is a float64
scalar tensor on the CPU, so that asking where t lies never waits for an accelerator. Image k is a function of the
model, the settings, the seed and k alone: not of batch size, process count, order or device of its noise.
Shape legend: N batch, (C, H, W) latent, (R, R, C) image.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from selftrans.config import Labels, SampleConfig
from selftrans.encoders.autoencoder import Autoencoder, to_uint8
from selftrans.flow import LINEAR, Path, score_from_v
from selftrans.precision import PRECISIONS
from selftrans.types import Backbone, Cond, cat_cond

Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]  #: (z (N, ...), t ()) -> (N, ...)
Noise: TypeAlias = Callable[[], Tensor]  #: the next standard normal (N, ...)

#: separate random streams of one image: a new use takes a new number, and leaves the others as they are
NOISE_STREAM, LABEL_STREAM = 1, 2


def ode(velocity: Velocity, z: Tensor, *, steps: int, method: Literal["euler", "heun"] = "heun") -> Tensor:
    """Integrate dz/dt = v from t = 1 to t = 0 on a uniform grid, in the dtype of z (N, ...).

    `euler` is first-order with one evaluation a step; `heun` is second-order, the last step included (a velocity
    exists at t = 0), with two. Raises ValueError for an unknown method or less than one step.
    """
    if method not in ("euler", "heun"):
        raise ValueError(f"ODE method {method!r} is unknown; choose 'euler' or 'heun'")
    _check_steps(steps, least=1)
    for t, t_next in pairwise(torch.linspace(1, 0, steps + 1, dtype=torch.float64)):
        dt = t_next - t
        v = velocity(z, t)
        end = z + dt * v
        if method == "heun":
            end = z + dt * (v + velocity(end, t_next)) / 2
        z = end
    return z


def sde(
    velocity: Velocity, z: Tensor, *, steps: int, path: Path = LINEAR, last: float = 0.04, noise: Noise | None = None
) -> Tensor:
    """Euler–Maruyama on the reverse SDE, as SiT (2401.08740, eq. 4) and REPA's published sampler use it.

        dz = (v - w/2 score) dt + sqrt(w) dB,   w(t) = 2 t

    Any w >= 0 leaves the marginals as they are; on the linear path 2 t is 2 sigma, and REPA keeps 2 t on its
    cosine path too, as does this function. The grid runs from 1 to `last` in steps - 1 equal noisy steps, then one
    noise-free step of the same drift reaches 0: `steps` evaluations in all.

    Args:
        z: (N, ...) noise at t = 1; its dtype is kept.
        last: t from which the last step goes; below it the score is too steep for a step of this size.
        noise: the next standard normal in the shape of z; default torch.randn_like.
    Raises ValueError for less than two steps, or `last` outside (0, 1).
    """
    _check_steps(steps, least=2)
    if not 0 < last < 1:
        raise ValueError(f"the last SDE step starts at t = {last}; choose it between 0 and 1, as 0.04")
    draw = noise or (lambda: torch.randn_like(z))
    times = torch.cat([torch.linspace(1, last, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    for t, t_next in pairwise(times):
        v = velocity(z, t)
        w = 2 * t
        z = z + (t_next - t) * (v - w / 2 * score_from_v(path, z, v, t))
        if t_next > 0:
            z = z + torch.sqrt(w * (t - t_next)) * draw()
    return z


def _check_steps(steps: int, least: int) -> None:
    if steps < least:
        raise ValueError(f"{steps} sampling steps are too few; use at least {least}")


def _ode(method: Literal["euler", "heun"]) -> Callable[..., Tensor]:
    """The ODE sampler in the signature of SAMPLERS: it has no use for a path or for noise."""
    return lambda velocity, z, *, steps, path, noise: ode(velocity, z, steps=steps, method=method)


#: name -> sampler(velocity, z, *, steps, path, noise); `ode` is another name of Heun's method
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": _ode("euler"),
    "heun": _ode("heun"),
    "ode": _ode("heun"),
    "sde": sde,
}
EVALUATIONS = {"euler": 1, "heun": 2, "ode": 2, "sde": 1}  #: of the velocity, in each step


def guided(model: Backbone, cond: Cond, *, scale: float = 1.0, interval: tuple[float, float] = (0.0, 1.0)) -> Velocity:
    """Velocity of a model under classifier-free guidance, v_u + scale (v_c - v_u), for interval[0] <= t <= interval[1].

    Both halves go through the model as one batch of 2 N; outside the interval (Kynkäänniemi et al., 2404.07724), or
    with scale 1, the unconditional half is not computed. A model without conditions is not guided, with a warning.
    """
    null = model.null(cond)
    if scale != 1 and all(torch.equal(a, b) for a, b in zip(_tensors(cond), _tensors(null), strict=True)):
        warnings.warn(f"guidance scale {scale} is ignored: the condition is the null condition", stacklevel=2)
        scale = 1.0
    both = cat_cond(cond, null) if scale != 1 else cond
    low, high = interval[0] - 1e-9, interval[1] + 1e-9  # grid times carry rounding: 0.65 must count as 0.65

    def evaluate(z: Tensor, t: Tensor, c: Cond) -> Tensor:
        v = model(z, torch.full((z.shape[0],), float(t), device=z.device, dtype=z.dtype), c).v
        assert v is not None
        return v.to(z.dtype)

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        if scale == 1 or not low <= float(t) <= high:
            return evaluate(z, t, cond)
        conditional, unconditional = evaluate(torch.cat([z, z], dim=0), t, both).chunk(2, dim=0)
        return unconditional + scale * (conditional - unconditional)

    return velocity


def _tensors(cond: Cond) -> list[Tensor]:
    return list(cond.values()) if isinstance(cond, dict) else [cond]


def _stream(seed: int, index: int, stream: int) -> np.random.Generator:
    """Random generator of image `index` alone.

    NumPy's, as torch's CPU generator keeps 32 bits of its seed, where two of 50,000 images are likely to collide.
    The seed comes last: SeedSequence pads with zeros, so that in front a long seed could equal another (seed, index).
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((stream, index, seed))))


def image_noise(indices: Sequence[int] | np.ndarray, shape: tuple[int, ...], seed: int, device: Any = "cpu") -> Noise:
    """Endless float32 standard normals (N, *shape), row i drawn from the stream of (seed, indices[i]) alone.

    Drawn on the CPU whatever the device, so that an image is the same on each; global generators stay untouched.
    """
    streams = [_stream(seed, int(k), NOISE_STREAM) for k in indices]

    def noise() -> Tensor:
        rows = np.empty((len(streams), *shape), dtype=np.float32)
        for row, generator in zip(rows, streams, strict=True):
            generator.standard_normal(dtype=np.float32, out=row)
        drawn = torch.from_numpy(rows)
        if torch.device(device).type == "cuda":  # page-locked, so that the host goes on to the passes
            return drawn.pin_memory().to(device, non_blocking=True)
        return drawn.to(device)

    return noise


def labels_for(indices: Sequence[int] | np.ndarray, num_classes: int, mode: Labels, seed: int) -> np.ndarray:
    """Label of each image (int64), from its index and the seed alone.

    `balanced` counts through the classes, `random` draws them uniformly, a tuple of classes is repeated (there,
    `num_classes` is the null label). A model without classes has label 0 everywhere. Raises ValueError otherwise.
    """
    indices = np.asarray(indices, dtype=np.int64)
    if not isinstance(mode, str):
        wrong = [label for label in mode if not 0 <= label <= num_classes]
        if wrong or not mode:
            raise ValueError(f"labels {list(mode)} do not fit a model of {num_classes} classes; use 0 to {num_classes}")
        return np.asarray(mode, dtype=np.int64)[indices % len(mode)]
    if mode not in ("balanced", "random"):
        raise ValueError(f"labels {mode!r} are unknown; use 'balanced', 'random' or a list of classes")
    if num_classes == 0:
        return np.zeros_like(indices)
    if mode == "balanced":
        return indices % num_classes
    draws = [_stream(seed, int(k), LABEL_STREAM).integers(num_classes) for k in indices]
    return np.asarray(draws, dtype=np.int64)


@contextmanager
def _evaluating(model: Backbone) -> Iterator[None]:
    """Eval mode for a while; afterwards exactly those modules train that did before."""
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def sample_images(
    model: Backbone,
    autoencoder: Autoencoder,
    config: SampleConfig,
    *,
    num_classes: int,
    device: torch.device | str,
    path: Path = LINEAR,
    indices: Sequence[int] | np.ndarray | None = None,
    condition: Callable[[Tensor], Cond] = lambda labels: labels,
    progress: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Images in batches: `(indices (n,), labels (n,), images uint8 (n, R, R, C))`.

    Args:
        model: on `device`, predicting the velocity of `path`; in eval mode meanwhile, restored after each batch.
        indices: which images; default 0 .. config.num - 1. The last batch may be smaller.
        condition: what the model is given for a batch of labels (N,); default the labels themselves.
        progress: show the evaluations of each batch, on a terminal.
    """
    config.check()
    todo = np.arange(config.num) if indices is None else np.asarray(indices, dtype=np.int64)
    for start in range(0, len(todo), config.batch_size):
        chunk = todo[start : start + config.batch_size]
        labels = labels_for(chunk, num_classes, config.labels, config.seed)
        cond = condition(torch.from_numpy(labels).to(device))
        yield (
            chunk,
            labels,
            _sample_batch(model, autoencoder, config, chunk, cond, path, torch.device(device), progress),
        )


@torch.inference_mode()
def _sample_batch(
    model: Backbone,
    autoencoder: Autoencoder,
    config: SampleConfig,
    indices: np.ndarray,
    cond: Cond,
    path: Path,
    device: torch.device,
    progress: bool,
) -> np.ndarray:
    from tqdm import tqdm

    noise = image_noise(indices, model.shape, config.seed, device)
    velocity = guided(model, cond, scale=config.guidance_scale, interval=config.guidance_interval)
    total, precision = config.steps * EVALUATIONS[config.sampler], PRECISIONS[config.precision]
    # autocast casts weights anew in each pass, inference mode or compiled: `generate.cast_products` does so once before
    amp = torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)
    hidden = None if progress else True  # None hides it where there is no terminal
    with _evaluating(model), amp, tqdm(total=total, desc="batch", unit="pass", leave=False, disable=hidden) as bar:

        def counted(z: Tensor, t: Tensor) -> Tensor:
            bar.update()
            return velocity(z, t)

        z0 = SAMPLERS[config.sampler](counted, noise(), steps=config.steps, path=path, noise=noise)
    return to_uint8(autoencoder.decode(z0)).cpu().numpy()  # outside autocast: a VAE can overflow in fp16
