"""The adapter of diffusers' Flux against the original, in float64."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from selftrans.models.diffusers_flux import DiffusersFlux, DiffusersFluxConfig
from tests.support.diffusers_models import TEXTS, inputs, original, pack, tiny


@pytest.mark.parametrize("settings", [{}, {"guidance": 2.0}, {"axes": (8, 6, 10)}, {"single_layers": 0}], ids=str)
@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 12)], ids=["square", "oblong"])
def test_equals_the_original(settings, shape):
    if settings == {"single_layers": 0}:
        config = DiffusersFluxConfig(layers=2, single_layers=0, heads=2, head_dim=24)
        model = DiffusersFlux(FluxTransformer2DModel(**config.arguments(shape, TEXTS)), shape, TEXTS).double()
    else:
        model = tiny("flux", shape=shape, **settings).double()
    x, t, cond = inputs(model, "flux", dtype=torch.float64)
    guidance = torch.full((2,), 2.0, dtype=torch.float64) if "guidance" in settings else None
    expected = original(model, "flux", x, t, cond, guidance=guidance)
    v = model(x, t, cond).v
    assert v.shape == x.shape and expected.std() > 0.1 and torch.equal(pack(v), expected)


def test_patchify_is_the_packing():
    model = tiny("flux", shape=(4, 8, 12))
    x = torch.randn(2, 4, 8, 12)
    assert torch.equal(model.patchify(x), pack(x))


def test_time_is_not_rounded_to_the_precision_of_the_latents():
    model = tiny("flux").to(torch.bfloat16)
    x, _, cond = inputs(model, "flux")
    seen = []
    model.net.time_text_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    t = torch.tensor([0.7001, 0.7004])  # one number in bfloat16
    model(x, t, cond)
    original(
        model,
        "flux",
        *inputs(model, "flux", dtype=torch.bfloat16)[:1],
        t,
        inputs(model, "flux", dtype=torch.bfloat16)[2],
    )
    assert seen[0].tolist() == pytest.approx([700.1, 700.4]) and seen[1][0] == seen[1][1]


@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 64, 96, 128])
def test_default_axes_divide_a_head(head_dim):
    config = DiffusersFluxConfig(head_dim=head_dim)
    config.check()
    assert sum(config.axes_dims()) == head_dim
    assert head_dim != 128 or config.axes_dims() == (16, 56, 56)  # as published


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axes": (8, 8, 6)}, r"whose sum is model\.head_dim 24, not \(8, 8, 6\)"),
        ({"axes": (9, 8, 7)}, "three even numbers"),
        ({"head_dim": 7}, "three even numbers"),
        ({"single_layers": -1}, r"model\.single_layers must be from 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusersFluxConfig(**{"head_dim": 24, **settings}).check()


def test_a_network_of_other_channels_is_refused():
    net = tiny("flux").net
    with pytest.raises(ValueError, match="a Flux of 16 input channels does not take latents"):
        DiffusersFlux(net, (3, 8, 8), TEXTS)
