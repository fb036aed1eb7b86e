"""Autoencoders without a network: pixels, and values that are not pictures, as they are or standardised per channel.

The name of one holds its shift and scale, such as `pixel(shift=-0.053:-0.07:-0.107,scale=1.62:1.59:1.5)`, so that a
manifest or a weights file records it as any other name. Without brackets latents are the values themselves.
Shape legend: N batch, (C, *S) values, (C, H, W) pixels.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from selftrans.encoders.latent_space import UNSCALED, LatentSpace, Moments
from selftrans.messages import printable

MOST = 4096  #: channels in a name
KINDS = ("pixel", "values")  #: pictures, and values of any range that are not pictures


class IdentityAutoencoder:
    """Moments are the values; latents are (values - shift) * scale. `kind` is one of KINDS; pixels are clamped to [-1, 1]."""

    channels, downsample = 0, 1

    def __init__(self, kind: str, latent_space: LatentSpace = UNSCALED) -> None:
        self.pictures, self.latent_space = kind == "pixel", latent_space
        self.name = kind if latent_space == UNSCALED else standardised_name(kind, latent_space)

    def encode(self, pixels: Tensor) -> Moments:
        return Moments(pixels.float(), None)

    def decode(self, latents: Tensor) -> Tensor:
        values = self.latent_space.unscale(latents)
        return values.clamp(-1, 1) if self.pictures else values


def identity_kind(name: str) -> str | None:
    """`pixel` or `values`, with or without numbers in brackets; None for the name of any other autoencoder."""
    kind, bracket, _ = name.partition("(")
    return kind if kind in KINDS and (not bracket or name.endswith(")")) else None


def standardised_name(kind: str, space: LatentSpace) -> str:
    """The name of `kind` with this shift and scale; `identity` reads it."""
    return f"{kind}(shift={_text(space.shift)},scale={_text(space.scale)})"


def identity(name: str) -> IdentityAutoencoder:
    """The autoencoder of a name for which `identity_kind` is not None. ValueError for numbers that cannot be read."""
    kind, bracket, text = name.removesuffix(")").partition("(")
    if not bracket:
        return IdentityAutoencoder(kind)
    try:
        found = re.fullmatch(r"shift=([^,]*),scale=([^,]*)", text)
        if found is None:
            raise ValueError("expected shift=NUMBER:...,scale=NUMBER:..., one for each channel")
        shift, scale = (tuple(map(float, group.split(":"))) for group in found.groups())
        if len(shift) != len(scale) or len(shift) > MOST:
            raise ValueError(f"it has {len(shift)} shifts and {len(scale)} scales")
        if not all(abs(number) < 1e30 for number in (*shift, *scale)) or min(scale) <= 0:  # also NaN
            raise ValueError("shifts should be finite, scales above zero")
    except ValueError as error:
        raise ValueError(f"autoencoder {printable(name, 200)!r} cannot be read ({error})") from None
    return IdentityAutoencoder(kind, LatentSpace(shift, scale, stochastic=False))


def scales_differ(one: str, other: str, tolerance: float = 0.05) -> bool:
    """Whether two names are of the same kind of values at different scales, so that a model of one does not fit the other.

    Shifts are compared in units of the standard deviation, scales by their ratio. False where either is not an identity, or
    their channels differ: other checks report that.
    """
    if identity_kind(one) is None or identity_kind(one) != identity_kind(other):
        return False
    spaces = [identity(name).latent_space for name in (one, other)]
    # (2, C), or (2, 1) where one number is for all channels
    first, second = (torch.tensor([space.shift, space.scale], dtype=torch.float64).view(2, -1) for space in spaces)
    if len({first.shape[1], second.shape[1]} - {1}) > 1:
        return False
    (shift1, scale1), (shift2, scale2) = first, second
    far = ((shift1 - shift2) * scale1).abs() > tolerance
    return bool((far | ((scale1 / scale2).log().abs() > tolerance)).any())


def check_scale(what: str, trained: str, data: str) -> None:
    """ValueError where `what` was trained on pixels or values of another scale than that of the data."""
    if scales_differ(trained, data):
        # complete, to be copied: values may have many channels
        remedy = "--no-standardise" if trained in KINDS else f"--autoencoder '{printable(trained, None)}'"
        raise ValueError(
            f"{what} was trained on {printable(trained, 200)}, the data are {printable(data, 200)}, latents of another scale; "
            f"prepare the data with {remedy}, or train on these"
        )


def same_latents(one: str, other: str) -> bool:
    """Whether latents of two autoencoders are the same: by their names, or pixels (or values) of about the same scale."""
    alike = identity_kind(one) is not None and identity_kind(one) == identity_kind(other)
    return one == other or (alike and not scales_differ(one, other))


def _text(value: float | tuple[float, ...]) -> str:
    return ":".join(repr(number) for number in (value if isinstance(value, tuple) else (value,)))
