"""The optimiser, its schedule, and its state by name."""

import pytest
import torch
from torch import nn

from selftrans.train.optim import (
    build_optimizer,
    forget,
    learning_rate,
    load_optimizer,
    optimizer_tensors,
    set_learning_rate,
    update,
)
from tests.support import toy
from tests.support.toy import quick  # noqa: F401 - a fixture


def test_learning_rate_warms_up_linearly_and_is_then_constant():
    config = toy.override(toy.toy(), {"train.lr": 0.3, "train.warmup": 3}).train
    assert [learning_rate(step, config) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3])
    assert learning_rate(0, toy.override(toy.toy(), {"train.lr": 0.3, "train.warmup": 0}).train) == 0.3


def test_optimizer_state_is_restored_by_name():
    config = toy.toy().train
    models = [nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(model, config) for model in models]
    x = torch.randn(5, 3)
    for _ in range(3):
        models[0](x).square().mean().backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    named = optimizer_tensors(optimizers[0], models[0])
    moments = ("step", "exp_avg", "exp_avg_sq")
    assert set(named) == {f"{i}.{p}:{moment}" for i in (0, 1) for p in ("weight", "bias") for moment in moments}
    models[1].load_state_dict(models[0].state_dict())
    load_optimizer(optimizers[1], models[1], named)
    for model, optimizer in zip(models, optimizers, strict=True):
        model(x).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


BAD = float("nan")


def test_update_with_flag_equals_plain_update_or_does_nothing():
    def trained(flags):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        optimizer = build_optimizer(model, toy.toy().train)
        for i, sound in enumerate(flags):
            model(torch.randn(4, 5, generator=torch.Generator().manual_seed(i))).square().mean().backward()
            if sound is None:
                optimizer.step()
            else:
                if not sound:
                    for p in model.parameters():
                        p.grad.fill_(BAD)
                update(optimizer, torch.tensor(sound))
            optimizer.zero_grad()
        return [*model.state_dict().values(), *(v for p in model.parameters() for v in optimizer.state[p].values())]

    plain = trained([None, None])
    assert all(torch.equal(a, b) for a, b in zip(plain, trained([True, True]), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, trained([True, True, False]), strict=True))


def test_optimizer_has_the_settings_and_only_trainable_parameters():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1).requires_grad_(False))
    config = toy.override(toy.toy(), {"train.betas": (0.8, 0.95), "train.weight_decay": 0.3, "train.lr": 0.2}).train
    (group,) = build_optimizer(model, config).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.2, (0.8, 0.95), 0.3)
    assert [id(p) for p in group["params"]] == [id(p) for p in model[0].parameters()]


def test_removed_parameters_and_their_moments_are_forgotten():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = build_optimizer(model, toy.toy().train)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    del model[1]
    forget(optimizer, model)
    staying = {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in optimizer.state} == staying


def test_rate_is_set_for_every_group():
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)], lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
