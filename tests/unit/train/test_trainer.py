"""The training step: compared with a plain loop; micro-batches, the end of guidance, precision and compilation."""

import copy
import dataclasses
import json
import math
import shutil
import weakref

import numpy as np
import pytest
import torch

from selftrans.data.dataset import Dataset
from selftrans.flow import LINEAR, interpolate
from selftrans.methods import objective
from selftrans.methods.layersync import LayerSync, LayerSyncGuidance
from selftrans.methods.registry import METHODS
from selftrans.methods.self_transcendence import SELF_TRANSCENDENCE
from selftrans.train import processes
from selftrans.train.batches import Loaded, seed_step, to_batch
from selftrans.train.run import train
from selftrans.train.trainer import Trainer
from selftrans.types import Conditions, Draw
from tests.support import toy
from tests.support.memory import freed
from tests.support.toy import quick  # noqa: F401 - a fixture

# ---- the step


def watch(monkeypatch, look):
    """Call `look(trainer)` before every training step."""
    original = Trainer.train_step

    def step(self, *args):
        look(self)
        return original(self, *args)

    monkeypatch.setattr(Trainer, "train_step", step)


@pytest.mark.parametrize("method", ["vanilla", "structure"])
def test_training_equals_a_plain_loop(tmp_path, monkeypatch, method):
    """Micro-batches, clipping, AdamW with weight decay, warm-up and EMA, written as a loop."""
    config = toy.toy(
        {"method": method, "train.steps": 4, "train.weight_decay": 0.1, "train.checkpoint_every": 1, "train.keep": 0}
    )
    start = []
    watch(monkeypatch, lambda trainer: start.append((copy.deepcopy(trainer.objective), trainer.stage, trainer.stream)))
    train(config, tmp_path, quiet=True)
    expected, stage, stream = start[0]
    shards, lr, (beta1, beta2) = Dataset.open(toy.digits()), 1e-3, (0.9, 0.999)
    parameters = dict(expected.named_parameters())
    average = {name: p.detach().clone() for name, p in expected.student.named_parameters()}
    m, v = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
    for step in range(4):
        expected.zero_grad(set_to_none=True)
        for micro in range(2):
            seed_step(config.train.seed, stage.stream, step, micro, 0)
            rows = stream.indices(step, micro)
            loss, _ = expected(to_batch(Loaded(rows, shards.read(rows)), shards, torch.device("cpu")), step)
            (loss / 2).backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters.values()))
        assert norm > 1  # so that clipping has an effect
        rate = lr * min(1, (step + 1) / 3)
        with torch.no_grad():
            for name, p in parameters.items():
                gradient = p.grad / (norm + 1e-6)
                m[name] = beta1 * m[name] + (1 - beta1) * gradient
                v[name] = beta2 * v[name] + (1 - beta2) * gradient**2
                m_hat, v_hat = m[name] / (1 - beta1 ** (step + 1)), v[name] / (1 - beta2 ** (step + 1))
                p.copy_(p * (1 - rate * 0.1) - rate * m_hat / (v_hat.sqrt() + 1e-8))
            decay = (1 + step + 1) / (10 + step + 1)
            for name, p in expected.student.named_parameters():
                average[name] = decay * average[name] + (1 - decay) * p
        saved = toy.tensors(tmp_path, stage.name, step + 1)
        for name, p in expected.student.named_parameters():
            torch.testing.assert_close(saved[f"student/{name}"], p.detach(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(saved[f"ema/{name}"], average[name], rtol=1e-4, atol=1e-5)


def test_stages_differ_in_weights_noise_and_order_under_one_seed(tmp_path, monkeypatch):
    seen = {}

    def look(trainer):
        if trainer.step == 0:
            weight = trainer.objective.student.x_embedder.proj.weight
            seen[trainer.stage.name] = (weight.detach().clone(), trainer.stream.indices(0, 0))

    watch(monkeypatch, look)
    train(toy.toy(), tmp_path, quiet=True)
    (weight1, rows1), (weight2, rows2) = seen["stage1"], seen["stage2"]
    assert not torch.equal(weight1, weight2) and not np.array_equal(rows1, rows2)


def by_index(batch, null, *, path=LINEAR, times="", time_shift=1.0, drop=0.0, t=None, noise=None):
    """A draw that is a function of each sample alone, so that it does not depend on the division into batches."""
    z0, cond, _ = batch
    rows = (1000 * z0.flatten(1).abs().sum(dim=1)).long()
    t = (rows * 37 % 101).float() / 101
    noise = torch.stack([torch.randn(z0.shape[1:], generator=torch.Generator().manual_seed(int(i))) for i in rows])
    zt, v = interpolate(path, z0, noise, t)
    return Draw(z0, noise, t, zt, v, cond, null, torch.where(rows % 5 == 0, null, cond))


def test_accumulated_micro_batches_equal_one_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(objective, "draw", by_index)
    results = {}
    for parts in (1, 2, 4):
        small = {"train.accumulate": parts, "data.path": None, "method": "structure", "train.steps": 2, "log.every": 1}
        train(toy.toy(small), tmp_path / str(parts), quiet=True)
        results[parts] = toy.tensors(tmp_path / str(parts), "stage1"), toy.log(tmp_path / str(parts), "stage1")
    for parts in (2, 4):
        for name, value in results[1][0].items():
            if not name.startswith("optimizer"):
                torch.testing.assert_close(results[parts][0][name], value, rtol=1e-4, atol=2e-5)
        for key in ("loss", "flow", "structure", "grad_norm"):
            means = [[line[key] for line in results[n][1]] for n in (1, parts)]
            assert means[0] == pytest.approx(means[1], rel=1e-4)


# ---- the end of guidance


def test_heads_and_teacher_are_freed_when_guidance_ends(tmp_path, monkeypatch):
    seen, teachers = [], []

    def look(trainer):
        if trainer.stage.name == "stage2":
            if trainer.teacher is not None and not teachers:
                teachers.append(weakref.ref(trainer.teacher))
            held = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
            moments = len(trainer.optimizer.state)
            alive = not freed(teachers[0], seconds=0 if trainer.teacher is not None else 30)
            seen.append((trainer.step, len(trainer.objective.guidances), held, moments, alive))

    watch(monkeypatch, look)
    train(toy.toy({"train.keep": 0, "train.checkpoint_every": 1}), tmp_path, quiet=True)
    with torch.device("meta"):
        student = sum(p.numel() for p in toy.toy().build_model((1, 8, 8), Conditions("labels", 10)).parameters())
    head = 32 * 16 + 16 + 16 * 16 + 16 + 16 * 32 + 32
    assert [s[1:3] for s in seen] == 5 * [(1, student + head)] + 3 * [(0, student)]
    assert [s[4] for s in seen] == 5 * [True] + 3 * [False]  # and the memory is free
    assert seen[4][3] == seen[5][3] + 6
    for step in range(1, 9):
        names = toy.tensors(tmp_path, step=step)
        assert any(name.startswith("heads/") for name in names) == (step < 5)
        assert any("optimizer/guidances" in name for name in names) == (step < 5)
        assert not any("head" in name for name in names if name.startswith(("student/", "ema/")))
        state = json.loads((toy.checkpoint(tmp_path, step=step) / "state.json").read_text())
        assert (state["teacher"] is not None) == (step < 5)


@pytest.mark.parametrize("what", ["data", "teacher weights"])
def test_processes_compare_what_they_have_read(tmp_path, monkeypatch, what):
    """Of copies on each machine, or of a teacher's run that is still being trained, each might have read another state."""
    compare = processes.check_same

    def one_differs(name, value):
        with monkeypatch.context() as patch:
            patch.setattr(processes, "gather_object", lambda mine: [*mine, "another" if name == what else mine[0]])
            compare(name, value)

    monkeypatch.setattr("selftrans.train.run.check_same", one_differs)
    monkeypatch.setattr("selftrans.train.trainer.check_same", one_differs)
    with pytest.raises(ValueError, match=f"process 1 of 2 reads other {what} than process 0"):
        train(toy.toy(), tmp_path, quiet=True)
    assert (tmp_path / "stage1").exists() == (what == "teacher weights")


def test_teacher_is_freed_when_its_guidance_ends_and_another_stays(tmp_path, monkeypatch):
    def both(config):
        first, second = SELF_TRANSCENDENCE.stages(config)
        other = LayerSync(block=1, target_block=2)
        guide = lambda student, teacher: [*second.guide(student, teacher), LayerSyncGuidance(student, other)]  # noqa: E731
        return [first, dataclasses.replace(second, guide=guide)]

    seen = []
    watch(monkeypatch, lambda trainer: seen.append((trainer.teacher is not None, len(trainer.objective.guidances))))
    spec = dataclasses.replace(SELF_TRANSCENDENCE, stages=both)
    monkeypatch.setitem(METHODS, spec.name, spec)
    train(toy.toy({"stage1.steps": 1}), tmp_path, quiet=True)
    assert seen == [(False, 1), *5 * [(True, 2)], *3 * [(False, 1)]]


@pytest.mark.parametrize("until", [0, 1, 8, 20, None])
def test_guidance_may_end_at_any_step_or_never(tmp_path, until):
    train(toy.toy({"stage2.until_step": until, "log.every": 1}), tmp_path, quiet=True)
    assert [("self" in line) for line in toy.log(tmp_path)] == [until is None or step < until for step in range(8)]


# ---- precision and speed


def test_bf16_keeps_float32_weights_and_a_bf16_teacher(tmp_path, monkeypatch):
    kinds = []
    watch(monkeypatch, lambda t: kinds.append(next(t.teacher.model.parameters()).dtype if t.teacher else None))
    train(toy.toy({"train.precision": "bf16"}), tmp_path / "bf16", quiet=True)
    assert kinds == 4 * [None] + 5 * [torch.bfloat16] + 3 * [None]
    assert {t.dtype for t in toy.tensors(tmp_path / "bf16").values()} == {torch.float32}
    half, full = ([line["loss"] for line in toy.log(out)] for out in (tmp_path / "bf16", toy.finished()))
    assert half == pytest.approx(full, rel=0.02) and half != full
    train(toy.toy(), tmp_path / "fp32", quiet=True)  # the earlier precision in this process has no effect
    toy.assert_same_run(tmp_path / "fp32", toy.finished())


def test_recomputed_activations_change_nothing(tmp_path):
    train(toy.toy({"train.recompute": True, "train.compile": False}), tmp_path, quiet=True)
    toy.assert_same(toy.tensors(tmp_path), toy.tensors(toy.finished()))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a C compiler")
def test_compiled_training_equals_eager_training(tmp_path):
    train(toy.toy({"train.compile": True}), tmp_path, quiet=True)
    for compiled, plain in zip(toy.log(tmp_path), toy.log(toy.finished()), strict=True):
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    assert toy.tensors(tmp_path).keys() == toy.tensors(toy.finished()).keys()


def test_bar_says_that_the_first_step_compiles_and_how_long_it_took(tmp_path, monkeypatch):
    shown = []

    class Bar:
        def __init__(self, **_):
            pass

        def update(self, count=1):
            shown.append("step")

        def set_postfix(self, values, **_):
            shown.append(next(iter(values)))

        def close(self):
            pass

    monkeypatch.setattr(Trainer, "_compile", lambda self: None)
    train(toy.toy({"method": "vanilla", "train.steps": 2, "train.compile": True}), tmp_path, bar=Bar, quiet=True)
    assert shown == ["compiling", "first step, compiled", "step", "step", "loss"]
