"""The optimiser, its schedule, and its state by name."""

import sys

import pytest
import torch
from torch import nn

from selftrans.train.optim import (
    build_optimizer,
    forget,
    learning_rate,
    load_optimizer,
    moment_bytes,
    optimizer_tensors,
    set_learning_rate,
    update,
)
from selftrans.train.run import train
from tests.support import toy
from tests.support.toy import quick  # noqa: F401 - a fixture


def test_learning_rate_warms_up_linearly_and_is_then_constant():
    config = toy.override(toy.toy(), {"train.lr": 0.3, "train.warmup": 3}).train
    assert [learning_rate(step, config) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3])
    assert learning_rate(0, toy.override(toy.toy(), {"train.lr": 0.3, "train.warmup": 0}).train) == 0.3


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_learning_rate_decays_as_torch_schedules_do(shape):
    """Constant until step 4, then to zero at step 10, as LinearLR and CosineAnnealingLR take it there."""
    given = {"lr": 0.3, "warmup": 0, "steps": 10, "lr_decay": (4, 10), "lr_decay_shape": shape}
    config = toy.override(toy.toy(), {f"train.{name}": value for name, value in given.items()}).check().train
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedules = torch.optim.lr_scheduler
    theirs = {
        "linear": lambda: schedules.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=6),
        "cosine": lambda: schedules.CosineAnnealingLR(optimizer, T_max=6),
    }[shape]()
    expected = [0.3] * 4
    for _ in range(7):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert [learning_rate(step, config) for step in range(11)] == pytest.approx(expected, abs=1e-12)


def test_learning_rate_warms_up_and_decays():
    given = {"train.lr": 1.0, "train.warmup": 2, "train.steps": 6, "train.lr_decay": (0, 6)}
    config = toy.override(toy.toy(), given).check().train
    assert [learning_rate(step, config) for step in range(3)] == pytest.approx([0.5, 5 / 6, 4 / 6])


@pytest.mark.parametrize("steps", [(3, 3), (-1, 8)])
def test_decay_between_other_steps_is_refused(steps):
    with pytest.raises(ValueError, match=r"train.lr_decay \(.*\) must be two increasing steps"):
        toy.override(toy.toy(), {"train.lr_decay": steps}).check()


@pytest.mark.parametrize(("stage", "given"), [("stage1", {"stage1.steps": 8}), ("stage2", {"train.steps": 8})])
def test_stage_with_steps_at_a_rate_of_zero_is_refused(tmp_path, stage, given):
    run = toy.toy({"stage1.steps": 4, "train.steps": 6, "train.lr_decay": (0, 6)} | given)
    with pytest.raises(ValueError, match=rf"{stage} has 8 steps, but train.lr_decay ends at step 6"):
        train(run, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "config.json").exists()


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
    with pytest.raises(ValueError, match=r"it holds moments of 1\.\w+, which the settings do not train"):
        load_optimizer(build_optimizer(models[1][:1], config), models[1][:1], named)


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


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_overflow_in_fp16_is_skipped_and_halves_the_scale(kind):
    """Also with an optimiser that does not know the flag: the scaler would refuse the next step if it were not updated."""
    weight, scaler = nn.Parameter(torch.ones(2)), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = kind([weight], lr=0.1)
    for gradient, scale in ((float("inf"), 4.0), (1.0, 4.0)):
        before, weight.grad = weight.detach().clone(), torch.full((2,), gradient)
        scaler.scale(torch.zeros(()))
        scaler.unscale_(optimizer)
        update(optimizer, weight.grad.isfinite().all(), scaler)
        assert torch.equal(weight, before) == (gradient == float("inf")) and scaler.get_scale() == scale


def test_update_leaves_no_flag_behind():
    """It would be a tensor in the memory of a recorded step, all of which could not be freed."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    parameter.grad = torch.ones(3)
    for sound in (True, False):
        update(optimizer, torch.tensor(sound))
    assert not hasattr(optimizer, "found_inf")


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


# ---- 8-bit moments

EIGHT = {"train.optimizer": "adamw8bit", "train.weight_decay": 0.3}


class Listed(torch.optim.SGD):
    """An optimiser that is not torch's AdamW, and whose state has the names and kinds of bitsandbytes'."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            state["state1"] = torch.full_like(p, state["step"], dtype=torch.uint8)


def test_optimiser_that_knows_no_flag_is_skipped_by_the_host_and_restored():
    torch.manual_seed(0)
    models = [nn.Linear(3, 2) for _ in range(2)]
    optimizers = [Listed(model.parameters(), lr=0.1) for model in models]
    before = models[0].weight.detach().clone()
    for sound in (False, True, True, False):
        models[0](torch.ones(1, 3)).sum().backward()
        update(optimizers[0], torch.tensor(sound))
        assert torch.equal(models[0].weight, before) == (not optimizers[0].state[models[0].weight])
    named = optimizer_tensors(optimizers[0], models[0])
    load_optimizer(optimizers[1], models[1], named)
    state = optimizers[1].state[models[1].weight]
    assert state["step"] == 2 and isinstance(state["step"], int) and state["state1"].dtype == torch.uint8
    assert torch.equal(state["state1"], torch.full((2, 3), 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="the moments of weight are those of another optimiser; choose the other"):
        load_optimizer(build_optimizer(models[1], toy.toy().train), models[1], named)


def test_missing_bitsandbytes_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ValueError, match=r"^train.optimizer adamw8bit needs bitsandbytes \(.*pip install 'selftrans\[8bit\]'"
    ):
        build_optimizer(nn.Linear(2, 2), toy.toy(EIGHT).train)
    for other, value in (("shard", True), ("precision", "fp16")):
        with pytest.raises(ValueError, match=f"adamw8bit does not go with train.{other}.*; use adamw$"):
            toy.toy(EIGHT | {f"train.{other}": value}).check()


def test_bytes_of_moments_by_hand():
    large, small = torch.empty(64, 65), torch.empty(4095)  # 4,160 values: 17 blocks, the last one not full
    assert moment_bytes([large, small], "adamw") == 8 * (4160 + 4095)
    assert moment_bytes([large, small], "adamw8bit") == 2 * (4160 + 4 * 17) + 8 * 4095


def test_moments_of_8_bits_follow_those_of_32_bits_and_resume_bit_for_bit(tmp_path):
    """The real library: two toy runs, one of them interrupted, next to AdamW."""
    pytest.importorskip("bitsandbytes", reason="the extra 8bit is not installed")
    wide = {"method": "vanilla", "model.width": 64, "train.keep": 0, "train.checkpoint_every": 4, "train.keep_best": 0}
    whole, short, plain = tmp_path / "whole", tmp_path / "short", tmp_path / "plain"
    train(toy.toy(EIGHT | wide), whole, quiet=True)
    train(toy.toy(EIGHT | wide | {"train.steps": 4}), short, quiet=True)
    train(toy.toy(EIGHT | wide), short, quiet=True)
    toy.assert_same_run(whole, short, ("vanilla",))
    train(toy.toy(EIGHT | wide | {"train.optimizer": "adamw"}), plain, quiet=True)
    losses = [[line["loss"] for line in toy.log(run, "vanilla")] for run in (whole, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
    held = toy.tensors(whole, "vanilla")
    kinds = {name.rpartition(":")[2]: t.dtype for name, t in held.items() if "mlp.fc1.weight:" in name}
    assert kinds["state1"] == kinds["state2"] == torch.uint8
    sizes = (
        sum(t.nbytes for n, t in toy.tensors(run, "vanilla").items() if "optimizer/" in n) for run in (whole, plain)
    )
    assert next(sizes) < 0.5 * next(sizes)
