"""Conditions of one and of several tensors, and the defaults of a backbone."""

import dataclasses

import pytest
import torch
from torch import nn

from selftrans.types import Backbone, Conditions, cat_cond, check_takes, eval_mode, map_cond, take_cond, where_cond
from tests.support.stub import Stub

LABELS = torch.tensor([3, 1, 2])
NAMED = {"tokens": torch.arange(12.0).view(3, 2, 2), "mask": torch.tensor([[True, False]] * 3)}


def test_condition_functions_on_a_label_tensor():
    assert cat_cond(LABELS, LABELS[:1]).tolist() == [3, 1, 2, 3]
    assert take_cond(LABELS, torch.tensor([2, 0])).tolist() == [2, 3]
    assert where_cond(torch.tensor([True, False, True]), LABELS, -LABELS).tolist() == [3, -1, 2]
    assert map_cond(lambda x: x + 1, LABELS).tolist() == [4, 2, 3]


def test_condition_functions_on_named_tensors():
    both = cat_cond(NAMED, NAMED)
    assert both["tokens"].shape == (6, 2, 2) and torch.equal(both["mask"][3:], NAMED["mask"])
    assert torch.equal(take_cond(NAMED, torch.tensor([1]))["tokens"], NAMED["tokens"][1:2])
    null = {"tokens": torch.zeros(3, 2, 2), "mask": torch.zeros(3, 2, dtype=torch.bool)}
    mixed = where_cond(torch.tensor([False, True, False]), null, NAMED)
    assert mixed["tokens"].flatten(1).any(dim=1).tolist() == [True, False, True]
    assert mixed["mask"].tolist() == [[True, False], [False, False], [True, False]]


@pytest.mark.parametrize(
    ("conditions", "text"),
    [
        (Conditions("none"), "no condition"),
        (Conditions("labels", 7), "7 classes"),
        (Conditions("text", tokens=77, width=768, encoder="owner/clip"), "text of 77x768 by owner/clip"),
    ],
)
def test_conditions_name_themselves(conditions, text):
    assert str(conditions) == text


def test_example_is_a_condition_of_one_sample():
    assert Conditions("labels", 7).example().tolist() == [0] == Conditions("none").example().tolist()
    text = Conditions("text", tokens=5, width=3).example()
    assert text["text"].shape == (1, 5, 3) and text["mask"].tolist() == [[True] * 5]


def test_text_of_the_same_encoder_is_the_same_wherever_it_is_stored():
    one = Conditions("text", tokens=5, width=3, encoder="/a/clip", sha256="1")
    assert one == dataclasses.replace(one, encoder="owner/clip") != dataclasses.replace(one, sha256="2")


def test_labels_are_checked_on_the_cpu_alone():
    conditions = Conditions("labels", 4)
    conditions.check_labels(torch.full((2,), 9, device="meta"), 2)  # has no values to read
    conditions.check_labels(torch.tensor([0, 4]), 2, null=True)
    Conditions("text", tokens=2, width=2).check_labels(NAMED, 5)
    Conditions("none").check_labels(torch.zeros(3), 3)
    with pytest.raises(ValueError, match="label 5 is out of range: the model has 4 classes, so labels are 0 to 3"):
        conditions.check_labels(torch.tensor([0, 5]), 2, null=True)


def test_condition_of_another_type_is_refused():
    for cond in (None, [0], 3):
        with pytest.raises(
            ValueError, match=f"not {type(cond).__name__}; without classes every label is 0: torch.zeros"
        ):
            Conditions("none").check_labels(cond, 1)
    with pytest.raises(ValueError, match="conditioned on text of 2x2 by an unnamed encoder, not on labels"):
        Conditions("text", tokens=2, width=2).check_labels(torch.zeros(1, dtype=torch.long), 1)


def test_default_backbone_is_one_part_and_is_not_truncated():
    model = Stub((2, 4, 8), patch=2)
    assert model.tokens == 8 and model.repeated() == [] and not model.recompute
    shallow = model.truncated(1)
    assert shallow is not model and shallow.depth == model.depth
    assert all(torch.equal(p, q) for p, q in zip(shallow.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["forward", "patchify"])
def test_backbone_without_an_implementation_raises(name):
    arguments = (None, None, None) if name == "forward" else (None,)
    with pytest.raises(NotImplementedError):
        getattr(Backbone(), name)(*arguments)


def test_eval_mode_restores_the_mode_of_every_part():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model[1].eval()
    modes = [module.training for module in model.modules()]
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
    with pytest.raises(RuntimeError), eval_mode(model):
        raise RuntimeError
    assert [module.training for module in model.modules()] == modes


def test_shape_that_a_backbone_does_not_take_is_refused_even_if_it_has_as_many_numbers():
    stub = Stub(shape=(2, 4, 4))
    check_takes(stub, (2, 4, 4))
    assert stub.training and not stub.calls[0]["graph"]
    with pytest.raises(ValueError, match=r"takes latents of \(2, 4, 4\) only, not of \(2, 2, 8\)"):
        check_takes(stub, (2, 2, 8))
    with pytest.raises(ValueError, match=r"does not take latents of \(2, 6, 4\): shape .* is invalid") as error:
        check_takes(stub, (2, 6, 4))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shape", "grid", "sides", "expected"),
    [((4, 8, 8), (4, 4), (6, 12), (3, 6)), ((1, 4, 8, 8), (4, 2, 2), (2, 8, 16), (2, 2, 4))],
)
def test_grid_of_latents_of_another_size(shape, grid, sides, expected):
    model = Backbone()
    model.shape, model.grid = shape, grid
    assert model.grid_of(sides) == expected
