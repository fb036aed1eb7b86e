"""Which blocks are recomputed, that no number depends on it, and what a block stores."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selftrans.models.compiling import compile_model
from selftrans.models.routing import Route
from selftrans.train.recompute import chosen_blocks
from tests.support.diffusers_blocks import randomised
from tests.support.label_models import inputs, tiny


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [(True, True), (False, False), (0, frozenset()), (2, {1, 2}), (12, set(range(1, 13))), ((3, 7), {3, 7})],
)
def test_blocks_of_a_setting(wanted, expected):
    assert chosen_blocks(wanted, 12) == expected


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (13, "train.recompute names block 13, but the model has blocks 1 to 12"),
        ((3, 0), "names block 0, but the model has blocks 1 to 12"),
        (-1, "train.recompute -1 is no number of blocks; the model has 12"),
    ],
)
def test_blocks_that_a_model_does_not_have(wanted, message):
    with pytest.raises(ValueError, match=message):
        chosen_blocks(wanted, 12)


def model_of(family="SiT"):
    return randomised(tiny(family, shape=(2, 8, 8), qk_norm=True)).train()


def gradients(model, recompute, route=None):
    model.recompute, model.route = recompute, route
    model.zero_grad()
    torch.manual_seed(4)
    v, feats = model(*inputs(model), taps=(2,))
    (v.square().mean() + feats[2].square().mean()).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("family", ["SiT", "LightningDiT"])
@pytest.mark.parametrize("route", [None, Route(0.5, 2, 3)])
def test_chosen_blocks_run_again_and_gradients_are_equal_bit_for_bit(family, route):
    model, ran = model_of(family), []
    expected = gradients(model, False, route)
    for k, block in enumerate(model.blocks, start=1):
        block.register_forward_pre_hook(lambda *_, k=k: ran.append(k))
    found = gradients(model, frozenset({2, 3}), route)
    assert all(map(torch.equal, expected, found))
    assert sorted(ran) == [1, 2, 2, 3, 3, 4]


def test_compiled_blocks_are_recomputed_to_the_same_gradients(monkeypatch):
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compile_module(self, backend="aot_eager", **options)
    )
    model = model_of()
    torch.compiler.reset()
    compile_model(model)
    kept, again = (gradients(model, recompute) for recompute in (False, frozenset({1, 3})))
    torch.compiler.reset()
    assert all(map(torch.equal, kept, again))


def saved_bytes(run: Callable[[], Any], kept: nn.Module) -> int:
    """Bytes that autograd stores for the backward pass of `run()`, without the parameters and buffers of `kept`.

    Each storage counts once, so views of one tensor are one. Compiled code decides by itself what it stores.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*kept.parameters(), *kept.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept_alive = run()  # noqa: F841 - so that no storage is freed, and its place taken by another, while it counts
    return sum(found.values())


def test_saved_bytes_of_a_linear_layer_and_its_activation():
    layer = nn.Linear(6, 10)
    x = torch.randn(4, 6, requires_grad=True)
    assert saved_bytes(lambda: layer(x), layer) == 4 * 4 * 6  # its input; weights are no activations
    assert saved_bytes(lambda: layer(x).relu().relu(), layer) == 4 * 4 * (6 + 10 + 10)
    with torch.no_grad():
        assert saved_bytes(lambda: layer(x), layer) == 0


def test_a_recomputed_block_stores_its_input_alone():
    model = model_of()
    x, t, y = inputs(model)

    def stored(recompute):
        model.recompute = recompute
        return saved_bytes(lambda: model(x, t, y), model)

    sizes = [stored(frozenset(range(1, k + 1))) for k in range(5)]
    saved = {a - b for a, b in itertools.pairwise(sizes)}
    assert len(saved) == 1 and saved.pop() > 8 * 4 * 3 * 16 * 48  # per block: far more than eight tensors (N, T, D)
    inside = sizes[4] - 4 * 4 * 3 * 16 * 48  # without what four blocks store of their inputs
    assert 0 < inside < 4 * 4 * 3 * 16 * 48  # embeddings, and the norm and input of the last layer
