"""Every built-in family of models is built once at its own defaults; unknown names suggest the nearest."""

import pytest
import torch

from selftrans.models.registry import MODELS, find
from selftrans.types import Backbone, Conditions, cat_cond, map_cond

#: families whose condition is text
OF_TEXT = {"mmdit"}


def check_shape(null, cond):
    assert null.shape == cond.shape and null.dtype == cond.dtype
    return null


@pytest.mark.parametrize("name", MODELS)
def test_every_family_builds_a_backbone(name):
    family = find(name) if not MODELS[name].names else find(MODELS[name].names[0])
    assert family is MODELS[name]
    config = family.Config()
    config.check()
    conditions = Conditions("text", tokens=77, width=768) if name in OF_TEXT else Conditions("labels", 10)
    one = conditions.example()
    with torch.device("meta"):
        model = family.build(config, (4, 32, 32), conditions)
        x, t, cond = torch.empty(2, 4, 32, 32), torch.empty(2), map_cond(lambda c: c.to("meta"), cat_cond(one, one))
        out = model(x, t, cond, taps=(model.depth,))
        model.use_null(map_cond(lambda c: c.to("meta"), one))
        assert model.patchify(x).shape[:2] == (2, model.tokens)
        map_cond(check_shape, model.null(cond), cond)
    assert isinstance(model, Backbone) and model.depth == config.blocks()
    assert out.v.shape == x.shape and out.feats[model.depth].shape == (2, model.tokens, model.width)


def test_names_of_a_family_find_it():
    for family in MODELS.values():
        assert all(find(name) is family for name in family.names or (family.name,))


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"model\.name 'SiT-XL/3' is unknown; did you mean SiT-XL/"):
        find("SiT-XL/3")
