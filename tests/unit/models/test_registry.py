"""Every built-in family of models is built once at its own defaults; unknown names suggest the nearest."""

from pathlib import Path

import pytest
import torch

from selftrans.models.registry import MODELS, find
from selftrans.types import Backbone, Conditions, cat_cond, map_cond

#: families that are conditioned on text alone
OF_TEXT = {"mmdit", "diffusers-pixart", "diffusers-sd3", "diffusers-flux"}
TEXTS = Conditions("text", tokens=7, width=48)


def same_shape(given, null):
    assert null.shape == given.shape and null.dtype == given.dtype
    return given


@pytest.mark.parametrize("name", MODELS)
def test_every_family_builds_a_backbone(name):
    family = find(name) if not MODELS[name].names else find(MODELS[name].names[0])
    assert family is MODELS[name]
    config = family.Config()
    config.check()
    with torch.device("meta"):
        conditions = TEXTS if name in OF_TEXT else Conditions("labels", 10)
        model = family.build(config, (4, 32, 32), conditions)
        x, t, cond = torch.empty(2, 4, 32, 32), torch.empty(2), cat_cond(*[conditions.example()] * 2)
        out = model(x, t, cond, taps=(model.depth,))
        assert model.patchify(x).shape[:2] == (2, model.tokens) and model.conditions == conditions
        model.use_null(conditions.example())
        map_cond(same_shape, cond, model.null(cond))
    assert isinstance(model, Backbone) and model.depth == config.blocks()
    assert out.v.shape == x.shape and out.feats[model.depth].shape == (2, model.tokens, model.width)


def test_names_of_a_family_find_it():
    for family in MODELS.values():
        assert all(find(name) is family for name in family.names or (family.name,))


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"model\.name 'SiT-XL/3' is unknown; did you mean SiT-XL/"):
        find("SiT-XL/3")


def test_the_page_of_backbones_lists_every_family():
    page = (Path(__file__).parents[3] / "docs" / "backbones.md").read_text(encoding="utf-8")
    assert [name for name in MODELS if f"`{name}`" not in page] == []
