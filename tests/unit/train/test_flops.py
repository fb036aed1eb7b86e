"""Operations of a forward pass, for every dtype of the weights."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from selftrans.methods.guidance import Guidance
from selftrans.methods.objective import Objective
from selftrans.models.lora import add_adapters
from selftrans.models.sit import SIT_SIZES, SiT
from selftrans.train import flops
from selftrans.train.flops import forward_flops, stage_flops, step_flops, training_flops
from selftrans.types import Backbone, Conditions, Output
from tests.support.operations import sit_forward_flops


class Plain(Backbone):
    """A backbone that relies on autocast for its dtypes, as most do."""

    def __init__(self):
        super().__init__()
        self.shape, self.grid, self.width, self.depth = (2, 3), (3,), 4, 1
        self.conditions = Conditions("none")
        self.block = nn.Linear(2, 4)

    def forward(self, x, t, cond, *, taps=(), stop=False):
        return Output(None, {1: self.block(x.transpose(1, 2))})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_teacher_in_reduced_precision_is_counted_without_autocast(dtype):
    model = Plain().to(dtype)
    assert forward_flops(model, torch.zeros(1, dtype=torch.long), (1,), stop=True) == 2 * 3 * 2 * 4
    assert model.block.weight.dtype == dtype and model.block.weight.device.type == "cpu"


def test_counting_copies_no_weights(monkeypatch):
    model = SiT((1, 4, 4), 2, width=8, depth=2, heads=2, patch=2)
    for kind in (nn.Parameter, torch.Tensor):  # parameters and buffers
        monkeypatch.setattr(kind, "__deepcopy__", lambda *_: pytest.fail("a tensor is copied"))
    assert training_flops(model, model.conditions.example()) == 3 * forward_flops(model, model.conditions.example()) > 0
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_forward_operations_equal_the_published_count():
    with torch.device("meta"):
        model = SiT((4, 32, 32), 1000, **SIT_SIZES["SiT-B/2"])
    counted = forward_flops(model, torch.zeros(1, dtype=torch.long))
    assert counted == sit_forward_flops(256, 768, 12, 16)
    assert counted / 2e9 == pytest.approx(23.0, abs=0.05)  # multiply-adds: what the literature calls 23.0 Gflops


class Two(Plain):
    """Two linear layers."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 2)

    def forward(self, x, t, cond, *, taps=(), stop=False):
        return Output(self.last(self.block(x.transpose(1, 2))).transpose(1, 2), {})


def test_frozen_weights_have_no_gradient_to_compute():
    model, labels = Two(), torch.zeros(1, dtype=torch.long)
    layers = 2 * 3 * 2 * 4, 2 * 3 * 4 * 2  # three tokens, 2 -> 4 -> 2 channels
    assert training_flops(model, labels) == 3 * sum(layers)
    add_adapters(model, 1, 1.0, ("block",))
    a, b = 2 * 3 * 2 * 1, 2 * 3 * 1 * 4
    forward = sum(layers) + a + b
    backward = (
        layers[1] + 2 * b + a
    )  # through the last layer; of B its weight and input; of A, first of all, its weight
    assert training_flops(model, labels) == forward + backward


@pytest.mark.parametrize(("until", "guided"), [(None, 6), (4, 4), (9, 6), (0, 0)])
def test_operations_of_a_stage_count_a_guidance_until_it_ends(until, guided, monkeypatch):
    monkeypatch.setattr(flops, "step_flops", lambda *_: {None: 10, 0: 3, 1: 100})
    objective = SimpleNamespace(guidances=[SimpleNamespace(until_step=until), SimpleNamespace(until_step=2)])
    assert stage_flops(objective, None, 8, 6) == 6 * 10 + guided * 3 + 2 * 100


class Own(Guidance):
    name = "own"


def test_each_head_of_a_list_is_counted():
    labels, objective = torch.zeros(1, dtype=torch.long), Objective(Two(), [Own(1.0, (1,))])
    objective.guidances[0].head = nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 6)])
    assert step_flops(objective, labels, 8)[0] == 8 * 3 * 2 * 3 * 4 * (
        5 + 6
    )  # three tokens of 4 channels, backward twice


@pytest.mark.parametrize("head", [nn.Linear(8, 5), nn.Bilinear(4, 4, 5)], ids=lambda head: type(head).__name__)
def test_head_that_does_not_take_tokens_is_refused(head):
    objective = Objective(Two(), [Own(1.0, (1,))])
    objective.guidances[0].head = head
    with pytest.raises(
        ValueError, match=r"the head of the guidance own cannot be called on tokens \(N, 3, 4\) of one block"
    ):
        step_flops(objective, torch.zeros(1, dtype=torch.long), 8)
