"""Network, loss and settings of an autoencoder of one's own: closed forms, torch.distributions, hand-computed values."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from selftrans.evaluate.classifier import SmallClassifier
from selftrans.train.autoencoder_network import (
    AutoencoderLoss,
    AutoencoderSettings,
    PerceptualDistance,
    build_autoencoder,
    middle,
    posterior,
)

SMALL = {"factor": 2, "widths": (8, 8)}
PIXELS = torch.rand(3, 1, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1


def settings(**options):
    return AutoencoderSettings(**SMALL | options).check()


def network(chosen, channels=1):
    torch.manual_seed(0)
    return build_autoencoder(chosen, channels, 12)


def distance(seed=0, channels=1):
    torch.manual_seed(seed)
    return PerceptualDistance(SmallClassifier((8, 12), channels, 3, width=8), channels)


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("perceptual", [False, True])
def test_loss_is_the_sum_of_its_terms(loss, perceptual):
    chosen = settings(loss=loss, kl_weight=0.5, perceptual_weight=3.0)
    vae, extra = network(chosen), distance() if perceptual else None
    torch.manual_seed(7)
    value, report = AutoencoderLoss(vae, chosen, extra)(PIXELS)
    mean, log_variance = vae.encode(PIXELS).latent_dist.parameters.chunk(2, dim=1)
    found = Normal(mean, (0.5 * log_variance).exp())
    torch.manual_seed(7)
    decoded = vae.decode(found.mean + found.stddev * torch.randn(found.mean.shape)).sample
    errors = {"l1": nn.L1Loss()(decoded, PIXELS), "l2": nn.MSELoss()(decoded, PIXELS)}
    kl = kl_divergence(found, Normal(0.0, 1.0)).sum() / 3
    expected = errors[loss] + 0.5 * kl / (8 * 12)
    assert report.keys() == {"loss", "l1", "kl"} | ({"perceptual"} if perceptual else set())
    if extra:
        expected = expected + 3 * extra(PIXELS, decoded).mean()
        torch.testing.assert_close(report["perceptual"], extra(PIXELS, decoded).mean().detach())
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(report["l1"], errors["l1"].detach())
    torch.testing.assert_close(report["kl"], kl.detach())
    value.backward()
    assert all(p.grad is not None for p in vae.parameters())


def test_posterior_is_computed_in_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = posterior(network(settings()), PIXELS)
    assert found.mean.dtype == found.std.dtype == found.kl().dtype == torch.float32


@pytest.mark.parametrize(("factor", "latent"), [(1, (8, 24)), (2, (4, 12)), (4, (2, 6)), (8, (1, 3))])
def test_latents_are_smaller_by_the_factor(factor, latent):
    chosen = AutoencoderSettings(factor=factor, widths=(8,) * factor.bit_length(), channels=3).check()
    vae = build_autoencoder(chosen, 3, 24)
    x = torch.zeros(1, 3, 8, 24)
    z = posterior(vae, x).mean
    assert z.shape == (1, 3, *latent) and vae.decode(z).sample.shape == x.shape


@pytest.mark.parametrize(
    ("widths", "groups"), [((32, 64), 8), ((128, 256), 32), ((64, 128), 16), ((8, 24), 2), ((4, 4), 1), ((12, 20), 1)]
)
def test_groups_divide_every_width_and_have_four_channels_or_more(widths, groups):
    vae = build_autoencoder(settings(widths=widths), 1, 8)
    assert vae.config.norm_num_groups == groups
    assert all(width % groups == 0 and width // groups >= 4 for width in widths)


def test_options_of_the_network():
    plain, deep = (build_autoencoder(settings(**o), 1, 8) for o in ({"attention": False}, {"depth": 2}))
    assert not [name for name, _ in plain.named_parameters() if "attentions" in name]
    assert [name for name, _ in deep.named_parameters() if "attentions" in name]
    assert (len(plain.encoder.down_blocks[0].resnets), len(deep.encoder.down_blocks[0].resnets)) == (1, 2)


def test_perceptual_distance_is_twice_one_minus_the_cosine():
    measure, other = distance(), torch.rand(3, 1, 8, 12) * 2 - 1
    a, b = measure.trunk(PIXELS), measure.trunk(other)
    expected = (2 - 2 * torch.cosine_similarity(a, b, dim=1)).mean(dim=(1, 2))
    torch.testing.assert_close(measure(PIXELS, other), expected)
    assert measure(PIXELS, PIXELS).abs().max() < 1e-6 and measure(PIXELS, other).min() > 1e-3


def test_classifier_of_the_perceptual_term_is_not_trained():
    measure = distance()
    before = {name: tensor.clone() for name, tensor in measure.state_dict().items()}
    chosen = settings()
    objective = AutoencoderLoss(network(chosen), chosen, measure).train()
    objective(PIXELS)[0].backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in measure.state_dict().items())
    assert all(p.grad is None for p in measure.parameters())
    assert not {id(p) for p in measure.parameters()} & {id(p) for p in objective.parameters()}
    assert all(name.startswith("vae.") for name in objective.state_dict())


@pytest.mark.parametrize(("side", "kept"), [(4, 1), (8, 2), (16, 3), (32, 4)])
def test_the_middle_layer_is_half_way_through_the_convolutions(side, kept):
    """Convolutions of a classifier: one, and two more for every halving."""
    part = middle(SmallClassifier(side, 1, 2).trunk)
    assert sum(isinstance(layer, nn.Conv2d) for layer in part) == kept and isinstance(part[-1], nn.ReLU)


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        (SmallClassifier(8, 3, 2), "the classifier is of pictures of 3 channels, the pictures have 1"),
        (SmallClassifier(8, 1, 2, arrays=True), "the classifier is of arrays, the pictures have 1"),
    ],
)
def test_classifier_of_other_pictures_is_refused(classifier, message):
    with pytest.raises(ValueError, match=message):
        PerceptualDistance(classifier, 1)


def test_learning_rate_warms_up_and_ends_at_zero():
    chosen = settings(lr=2.0, warmup=4, steps=12)
    rates = [chosen.learning_rate(step) for step in range(12)]
    assert (
        rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and math.isclose(rates[8], 1.0) and rates[4:] == sorted(rates[4:])[::-1]
    )
    assert 0 < rates[11] < 0.1 and math.isclose(chosen.learning_rate(12), 0, abs_tol=1e-9)
    assert settings(lr=1.0, warmup=0, steps=1).learning_rate(0) == 1.0


def test_widths_are_doubled_up_to_256():
    assert AutoencoderSettings(factor=16).check().widths == (64, 128, 256, 256, 256)
    assert AutoencoderSettings(factor=1).check().widths == (64,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 3}, "--factor 3 is not a power of two up to 32; choose 2, 4 or 8"),
        ({"factor": 4}, "--widths has 2 numbers; factor 4 needs 3, one per resolution"),
        ({"widths": (6, 8)}, "--widths 6 8: each should be a multiple of 4"),
        ({"widths": (0, 8)}, "--widths 0 8: each should be a multiple of 4"),
        ({"channels": 0}, "--channels 0 should be at least 1"),
        ({"batch_size": 0}, "--batch-size 0 should be at least 1"),
        ({"held_out": 0}, "--held-out 0 should be at least 1"),
        ({"lr": 0.0}, "--lr 0.0 should be a finite number, above zero"),
        ({"kl_weight": math.nan}, "--kl-weight nan should be a finite number, zero or above"),
        ({"perceptual_weight": -1.0}, "--perceptual-weight -1.0 should be a finite number, zero or above"),
        ({"ema": 1.0}, r"--ema 1.0 should be in \[0, 1\)"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        settings(**options)
