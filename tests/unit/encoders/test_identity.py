"""Autoencoders without a network: exact round trips at any scale, names that hold the scale, and names that cannot be."""

from __future__ import annotations

import re

import pytest
import torch

from selftrans.encoders.autoencoder import autoencoder_name, from_uint8, load_autoencoder, to_uint8
from selftrans.encoders.identity import (
    IdentityAutoencoder,
    check_scale,
    identity,
    identity_kind,
    same_latents,
    scales_differ,
    standardised_name,
)
from selftrans.encoders.latent_space import UNSCALED, LatentSpace

SHIFT, SCALE = (-0.053, 0.4, -0.997), (1.62, 31.7, 0.013)
NAME = "pixel(shift=-0.053:0.4:-0.997,scale=1.62:31.7:0.013)"


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_every_grey_level_of_every_channel_is_decoded_exactly(stored: torch.dtype) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, -1, -1, 3)
    autoencoder = load_autoencoder(NAME)
    moments = autoencoder.encode(from_uint8(images)).stack().to(stored)
    latents = autoencoder.latent_space.sample(moments)
    assert torch.equal(to_uint8(autoencoder.decode(latents)), images)
    by_hand = torch.stack([(from_uint8(images)[:, c] - SHIFT[c]) * SCALE[c] for c in range(3)], dim=1)
    torch.testing.assert_close(latents, by_hand, rtol=0, atol=0.02 if stored == torch.float16 else 1e-5)


def test_pixels_are_clamped_and_values_are_not() -> None:
    far, space = torch.full((1, 1, 2, 2), 9.0), LatentSpace((0.5,), (2.0,), stochastic=False)
    assert IdentityAutoencoder("pixel", space).decode(far).unique().tolist() == [1.0]
    assert IdentityAutoencoder("values", space).decode(far).unique().tolist() == [5.0]  # 9 / 2 + 0.5


def test_name_holds_the_scale_and_is_read_again() -> None:
    space = LatentSpace(SHIFT, SCALE, stochastic=False)
    made = IdentityAutoencoder("pixel", space)
    assert made.name == NAME and identity_kind(NAME) == "pixel" and autoencoder_name(NAME) == NAME
    assert (
        load_autoencoder(NAME).latent_space == LatentSpace(SHIFT, SCALE, stochastic=False)
        and load_autoencoder(NAME).name == NAME
    )
    assert identity("pixel").name == "pixel" and load_autoencoder("values").latent_space == UNSCALED
    assert identity_kind("values(shift=0.0,scale=1.0)") == "values"
    assert [identity_kind(name) for name in ("pixels", "pixel(", "owner/pixel", "mel(rate=8000)")] == [None] * 4


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ("", r"expected shift=NUMBER:\.\.\.,scale=NUMBER"),
        ("shift=0.1", "expected shift"),
        ("shift=0.1,scale=x", "could not convert"),
        ("shift=0.1:0.2,scale=1.0", "it has 2 shifts and 1 scales"),
        ("shift=nan,scale=1.0", "shifts should be finite, scales above zero"),
        ("shift=0.0,scale=0.0", "shifts should be finite, scales above zero"),
        ("shift=0.0,scale=-2.0", "shifts should be finite, scales above zero"),
        ("shift=0.0,scale=inf", "shifts should be finite, scales above zero"),
        ("shift=" + "0:" * 5000 + "0,scale=" + "1:" * 5000 + "1", "it has 5001 shifts"),
    ],
)
def test_impossible_numbers_are_refused(numbers: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"autoencoder 'pixel\(.*cannot be read \(.*{message}"):
        load_autoencoder(f"pixel({numbers})")


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        ("pixel", "pixel", False),
        ("pixel", "pixel(shift=-0.4,scale=1.33)", True),
        ("pixel(shift=0.1,scale=2.0)", "pixel(shift=0.11,scale=2.05)", False),  # 0.02 deviations, 2.5 %
        ("pixel(shift=0.1,scale=2.0)", "pixel(shift=0.15,scale=2.0)", True),  # 0.1 deviations
        ("pixel(shift=0.1,scale=2.0)", "pixel(shift=0.1,scale=2.2)", True),  # 10 %
        ("pixel(shift=0:0:0,scale=1:1:1)", "pixel", False),
        ("pixel(shift=0:0:0,scale=1:1:2)", "pixel", True),
        ("pixel", "values(shift=0.4,scale=9.0)", False),  # other kinds are compared by name, elsewhere
        ("owner/vae", "pixel", False),
    ],
)
def test_scales_that_differ(one: str, other: str, differ: bool) -> None:
    assert scales_differ(one, other) is differ and scales_differ(other, one) is differ
    alike = identity_kind(one) is not None and identity_kind(one) == identity_kind(other)
    assert same_latents(one, other) is same_latents(other, one) is (alike and not differ)


def test_another_scale_is_refused_with_the_options_that_prepare_it() -> None:
    check_scale("the run", "owner/vae", "pixel")
    many = standardised_name("values", LatentSpace((0.123456,) * 64, (7.65432,) * 64, stochastic=False))
    with pytest.raises(ValueError, match=re.escape(f"--autoencoder '{many}', or train on these")):
        check_scale("the run", many, "values")
    with pytest.raises(
        ValueError, match=r"trained on pixel, the data are pixel\(.*prepare .* with --no-standardise, or"
    ):
        check_scale("the run", "pixel", "pixel(shift=-0.4,scale=1.33)")
    with pytest.raises(
        ValueError, match=r"prepare the data with --autoencoder 'pixel\(shift=-0.4,scale=1.33\)', or train on"
    ):
        check_scale("the run", "pixel(shift=-0.4,scale=1.33)", "pixel")
