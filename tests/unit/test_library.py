"""What `import selftrans` offers."""

import pytest
import torch

import selftrans
from selftrans import library


def test_star_import_gives_every_name_of_the_library():
    names: dict[str, object] = {}
    exec("from selftrans import *", names)
    assert {name: names[name] for name in library.__all__} == {name: getattr(library, name) for name in library.__all__}
    assert set(library.__all__) <= set(dir(selftrans)) and issubclass(selftrans.HookedBackbone, selftrans.Backbone)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'selftrans' has no attribute 'Sit'"):
        selftrans.Sit  # noqa: B018


def test_objective_of_the_library_is_a_module():
    model = selftrans.SiT((1, 4, 4), 3, width=8, depth=2, heads=2, patch=2)
    objective = selftrans.Objective(model)
    assert isinstance(objective, torch.nn.Module) and objective.student is model
