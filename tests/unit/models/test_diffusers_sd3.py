"""The adapter of diffusers' SD3 against the original, in float64."""

import pytest
import torch

from selftrans.models.diffusers_sd3 import DiffusersSD3Config
from tests.support.diffusers_models import FAMILIES, TEXTS, inputs, original, tiny

SETTINGS = {
    "sd3": {},
    "sd35": {"qk_norm": True, "dual": (1, 2), "positions": 9, "sample_size": 16},
    "without pooled": {"pooled": "none", "pooled_width": 7},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 12)], ids=["square", "oblong"])
def test_equals_the_original(settings, shape):
    model = tiny("sd3", shape=shape, **settings).double()
    x, t, cond = inputs(model, "sd3", dtype=torch.float64)
    pooled = torch.zeros(2, 7, dtype=torch.float64) if settings.get("pooled") == "none" else None
    expected = original(model, "sd3", x, t, cond, pooled=pooled)
    assert expected.std() > 0.1 and torch.equal(model(x, t, cond).v, expected)


def test_the_last_block_gives_no_text():
    model = tiny("sd3")
    assert [block.context_pre_only for block in model.repeated()] == [False, False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dual": (0,)}, r"model\.dual lists blocks from 1 to 3, not \(0,\)"),
        ({"dual": (4,)}, r"model\.dual lists blocks from 1 to 3, not \(4,\)"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusersSD3Config(layers=3, **settings).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooled_width": 7}, r"has 7 channels and a text token 24.*set model\.pooled none"),
        (
            {"positions": 3},
            r"latents of 8x8 have more than the 3 positions per side of the model; raise model\.positions",
        ),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(settings, message):
    module, kind = FAMILIES["sd3"]
    with pytest.raises(ValueError, match=message):
        module.build(kind(**settings), (4, 8, 8), TEXTS)
