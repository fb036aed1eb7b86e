"""The adapter of diffusers' PixArt against the original, in float64."""

import pytest
import torch

from selftrans.models.diffusers_pixart import DiffusersPixArtConfig
from selftrans.types import MASK, TEXT
from tests.support.diffusers_models import inputs, original, tiny


@pytest.mark.parametrize(
    "settings",
    [{}, {"learn_sigma": True, "sizes": True}, {"sample_size": 16, "interpolation": 2.0, "sizes": True}],
    ids=["plain", "sizes", "interpolated"],
)
@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 12)], ids=["square", "oblong"])
def test_equals_the_original(settings, shape):
    model = tiny("pixart", shape=shape, **settings).double()
    x, t, cond = inputs(model, "pixart", dtype=torch.float64)
    expected = original(model, "pixart", x, t, cond)
    assert expected.shape[1] == (8 if settings.get("learn_sigma") else 4) and expected.std() > 0.1
    assert torch.equal(model(x, t, cond).v, expected[:, :4])


def test_masked_text_has_no_effect():
    model = tiny("pixart").eval()
    x, t, cond = inputs(model, "pixart")
    other = {TEXT: torch.where(cond[MASK][..., None], cond[TEXT], 7.0), MASK: cond[MASK]}
    assert torch.equal(model(x, t, other).v, model(x, t, cond).v)
    assert not torch.equal(model(x, t, {**cond, MASK: torch.ones_like(cond[MASK])}).v, model(x, t, cond).v)


def test_resolution_and_aspect_ratio_come_from_the_shape():
    model = tiny("pixart", shape=(4, 8, 12), sizes=True, pixels=16)
    assert model.extents.tolist() == pytest.approx([128, 192, 2 / 3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 2, "head_dim": 32, "sizes": True}, "needs a width that divides by 3, not 64"),
        ({"interpolation": 0.0}, "model.interpolation must be above zero"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusersPixArtConfig(**settings).check()
