"""SRA, LayerSync and Dispersive against their formulas in loops over named axes, and what ends, follows and detaches."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from selftrans import LINEAR, Batch, Objective, SiT
from selftrans.methods.dispersive import Dispersive, DispersiveGuidance, squared_distances
from selftrans.methods.layersync import LayerSync, LayerSyncGuidance
from selftrans.methods.registry import METHODS, stages
from selftrans.methods.sra import SRA, SRAGuidance
from selftrans.train.run import train
from tests.support.stub import Stub, handmade_draw, mlp_by_hand, numbers, patches_by_hand
from tests.support.toy import assert_same_run, log, quick, toy  # noqa: F401 - quick is a fixture

TIMES = [0.1, 0.4, 0.55, 0.7, 0.9, 0.3]
A, B, C = 0.5, -1.5, 0.25  # of the stub
NEIGHBOURS = ("sra", "layersync", "dispersive")


def features(d, i, k, t=None, zt=None, cond=None, abc=(A, B, C)):
    """h_k of the stub for sample i, tokens by channels (T, D)."""
    a, b, c = abc
    h = a * patches_by_hand(numbers(d.zt[i] if zt is None else zt), 2)
    h = h + b * (TIMES[i] if t is None else t) if k > 1 else h
    return h + c * (d.dropped[i] if cond is None else cond).item() if k > 2 else h


def cosine(x, y):
    return (x @ y) / math.sqrt((x @ x) * (y @ y))


# ---- LayerSync


def test_squared_distances_are_those_of_pdist_in_any_autocast():
    x = (100 + torch.randn(6, 40)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = squared_distances(x)
    expected = torch.cdist(x.double(), x.double()).square()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert found.dtype == torch.float32 and not found.diagonal().any()
    (slope,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(slope, 4 * (6 * x - x.sum(dim=0)).detach(), rtol=1e-3, atol=1e-3)


def test_layersync_by_hand():
    """Mean over samples and tokens of one minus the cosine over channels."""
    student, d = Stub(), handmade_draw(TIMES, dropped=(2,))
    g = LayerSyncGuidance(student, LayerSync(block=1, target_block=3, weight=0.3))
    expected = np.mean(
        [1 - cosine(x, y) for i in range(6) for x, y in zip(features(d, i, 1), features(d, i, 3), strict=True)]
    )
    loss, report = Objective(student, [g]).losses(d, 0)
    assert report["layersync"].item() == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(report["flow"].item() + 0.3 * expected, rel=1e-5)


def test_layersync_sends_no_gradient_to_the_deeper_block():
    """c reaches the loss by h_3 alone, and h_3 is only followed."""
    student, d = Stub(), handmade_draw(TIMES)
    g = LayerSyncGuidance(student, LayerSync(block=2, target_block=3))
    term, _ = g(d, student(d.zt, d.t, d.dropped, taps=g.taps).feats)
    term.backward()
    assert student.c.grad is None and student.a.grad.abs() > 0 and student.b.grad.abs() > 0


# ---- Dispersive


def test_dispersive_by_hand():
    """log of the mean over all pairs (i, j) of exp(-mean over tokens and channels of the squared difference / tau)."""
    student, d = Stub(), handmade_draw(TIMES)
    g = DispersiveGuidance(student, Dispersive(block=2, temperature=0.7, weight=0.4))
    h = [features(d, i, 2) for i in range(6)]
    expected = math.log(np.mean([math.exp(-((x - y) ** 2).mean() / 0.7) for x in h for y in h]))
    loss, report = Objective(student, [g]).losses(d, 0)
    assert report["dispersive"].item() == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(report["flow"].item() + 0.4 * expected, rel=1e-5)


def test_dispersive_pushes_apart_and_bears_equal_and_single_samples():
    hidden = torch.tensor([[[0.0, 0.0]], [[0.2, 0.0]], [[0.2, 0.0]]], requires_grad=True)  # (N, T, D); two are equal
    g = DispersiveGuidance(Stub(), Dispersive(block=1))
    term, _ = g(None, {1: hidden})
    term.backward()
    assert hidden.grad[0, 0, 0] > 0 > hidden.grad[1, 0, 0], "going downhill moves them away from each other"
    assert torch.isfinite(hidden.grad).all()
    term, _ = g(None, {1: torch.ones(1, 4, 2)})
    assert term.item() == 0, "one sample has no one to be kept from"


# ---- SRA


@pytest.mark.parametrize("distance", ["cosine", "smooth_l1"])
def test_sra_by_hand(distance):
    student, d = Stub(), handmade_draw(TIMES, dropped=(2, 3))
    g = SRAGuidance(student, SRA(block=2, target_block=3, head_width=5, distance=distance, weight=0.6))
    for p in g.head.parameters():
        nn.init.normal_(p, std=0.5)
    parameters = [numbers(p) for p in g.head.parameters()]
    average = Stub(abc=(1.25, 0.75, -0.5))
    objective = Objective(student, [g])
    objective.watch(average)
    torch.manual_seed(3)
    loss, report = objective.losses(d, 0)
    torch.manual_seed(3)
    u = 0.2 * torch.rand(6).double().numpy()
    errors = []
    for i in range(6):
        t = max(0.0, TIMES[i] - u[i])
        zt = (1 - t) * d.z0[i] + t * d.noise[i]
        goals = features(d, i, 3, t, zt, abc=(1.25, 0.75, -0.5))  # under the student's own, perhaps dropped, condition
        for h, goal in zip(features(d, i, 2), goals, strict=True):
            said = mlp_by_hand(parameters, h)
            if distance == "cosine":
                errors.append(1 - cosine(said, goal))
            else:
                errors += [e * e / 0.1 if e < 0.05 else e - 0.025 for e in np.abs(said - goal)]
    assert report["sra"].item() == pytest.approx(np.mean(errors), rel=2e-5)
    assert loss.item() == pytest.approx(report["flow"].item() + 0.6 * np.mean(errors), rel=2e-5)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in average.parameters()), "the average is never trained"
    assert sorted({name.split(".")[0] for name in g.state_dict()}) == ["head"], "nor saved by the guidance"


def test_sra_sees_an_earlier_time_within_its_span_and_never_before_data():
    student, d = Stub(), handmade_draw(TIMES)
    average = Stub()
    g = SRAGuidance(student, SRA(block=1, target_block=2, head_width=5, span=0.25))
    g.watch(average)
    seen = []
    for _ in range(200):
        g(d, student(d.zt, d.t, d.dropped, taps=(1,)).feats)
        seen.append(average.calls[-1]["t"])
    behind = d.t - torch.stack(seen)  # (200, N)
    assert behind.min() >= 0 and (behind <= 0.25 + 1e-6).all() and torch.stack(seen).min() == 0
    assert behind[:, 1:5].mean().item() == pytest.approx(0.125, abs=0.01)
    assert average.calls[-1]["stop"], "nothing is computed after its block"


def test_sra_without_an_average_says_what_to_do():
    student, d = Stub(), handmade_draw(TIMES)
    with pytest.raises(ValueError, match=r"Objective\.watch"):
        Objective(student, [SRAGuidance(student, SRA(head_width=4))]).losses(d, 0)


# ---- all of them


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_neighbour_is_a_method_that_trains_resumes_exactly_and_ends(tmp_path, name):
    options = {"method": name, f"{name}.until_step": 5}
    options |= {f"{name}.head_width": 8} if name == "sra" else {}
    train(toy(options), tmp_path / "whole", quiet=True)
    train(toy(options | {"train.steps": 4}), tmp_path / "parts", quiet=True)
    train(toy(options), tmp_path / "parts", quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", stages=(name,))
    lines = log(tmp_path / "whole", name)
    assert name in lines[0] and name not in lines[-1], "the term is gone after its end"


def test_published_blocks():
    blocks = {}
    for depth in (12, 28):
        student = SiT((4, 4, 4), 3, width=16, depth=depth, heads=2, patch=2)
        sra = SRAGuidance(student, SRA(head_width=4))
        sync = LayerSyncGuidance(student, LayerSync())
        blocks[depth] = (
            sra.block,
            sra.target,
            sync.block,
            sync.target,
            DispersiveGuidance(student, Dispersive()).block,
        )
    assert blocks == {12: (4, 8, 4, 7, 3), 28: (8, 20, 8, 16, 7)}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda s: LayerSyncGuidance(s, LayerSync(block=3, target_block=2)), "must be below"),
        (lambda s: DispersiveGuidance(s, Dispersive(temperature=0)), "above zero"),
        (lambda s: SRAGuidance(s, SRA(span=2)), r"\[0, 1\]"),
        (lambda s: SRAGuidance(s, SRA(target_block=9)), "outside the student's 1..3"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make(Stub())


def test_an_equal_average_at_an_equal_time_gives_the_students_own_features():
    student = SiT((1, 4, 4), 3, width=16, depth=4, heads=2, patch=2)
    g = SRAGuidance(student, SRA(block=1, target_block=3, head_width=4, span=0.0), LINEAR)
    g.watch(copy.deepcopy(student))
    d = handmade_draw(TIMES, shape=(1, 4, 4), num_classes=3)
    own = student(d.zt, d.t, d.dropped, taps=(3,)).feats[3]
    torch.testing.assert_close(g.teacher(d.zt, d.t, d.dropped)[0].clone(), own.detach(), rtol=1e-5, atol=1e-6)
    assert len(g.teacher.model.blocks) == 4, "the average is not cut: it is still to be saved"


def test_every_neighbour_is_in_the_registry():
    assert set(NEIGHBOURS) <= set(METHODS)
    for name in NEIGHBOURS:
        (stage,) = stages(toy({"method": name}))
        student = SiT((1, 4, 4), 3, width=16, depth=4, heads=2, patch=2)
        objective = Objective(student, stage.guide(student, None))
        objective.watch(copy.deepcopy(student))
        loss, report = objective(Batch(torch.randn(4, 1, 4, 4), torch.arange(4) % 3), 0)
        loss.backward()
        assert stage.teacher is None and stage.name == name and math.isfinite(loss.item()) and name in report
