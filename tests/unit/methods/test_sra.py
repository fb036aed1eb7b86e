"""SRA against its formula in loops over named axes; its moving average is followed and never trained."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from selftrans import LINEAR, Objective, SiT
from selftrans.methods.sra import SRA, SRAGuidance
from tests.support.stub import Stub, cosine_by_hand, features_by_hand, handmade_draw, mlp_by_hand, numbers
from tests.support.toy import assert_same_run, log, quick, toy  # noqa: F401 - quick is a fixture

TIMES = [0.1, 0.4, 0.55, 0.7, 0.9, 0.3]


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
        # under the condition that the student sees, which may be dropped
        goals = features_by_hand(d, i, 3, t, zt, abc=(1.25, 0.75, -0.5))
        for h, goal in zip(features_by_hand(d, i, 2), goals, strict=True):
            predicted = mlp_by_hand(parameters, h)
            if distance == "cosine":
                errors.append(1 - cosine_by_hand(predicted, goal))
            else:
                errors += [e * e / 0.1 if e < 0.05 else e - 0.025 for e in np.abs(predicted - goal)]
    assert report["sra"].item() == pytest.approx(np.mean(errors), rel=2e-5)
    assert loss.item() == pytest.approx(report["flow"].item() + 0.6 * np.mean(errors), rel=2e-5)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in average.parameters()), "the average is never trained"
    assert sorted({name.split(".")[0] for name in g.state_dict()}) == ["head"], "the guidance does not save the average"


def test_average_is_called_at_an_earlier_time_within_the_span_and_never_below_zero():
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


def test_missing_average_is_an_error_with_the_remedy():
    student, d = Stub(), handmade_draw(TIMES)
    with pytest.raises(ValueError, match=r"Objective\.watch"):
        Objective(student, [SRAGuidance(student, SRA(head_width=4))]).losses(d, 0)


def test_equal_average_at_the_same_time_gives_the_features_of_the_student():
    student = SiT((1, 4, 4), 3, width=16, depth=4, heads=2, patch=2)
    g = SRAGuidance(student, SRA(block=1, target_block=3, head_width=4, span=0.0), LINEAR)
    g.watch(copy.deepcopy(student))
    d = handmade_draw(TIMES, shape=(1, 4, 4), num_classes=3)
    own = student(d.zt, d.t, d.dropped, taps=(3,)).feats[3]
    torch.testing.assert_close(g.teacher(d.zt, d.t, d.dropped)[0].clone(), own.detach(), rtol=1e-5, atol=1e-6)
    assert len(g.teacher.model.blocks) == 4, "the average is not truncated: it is saved and sampled"


@pytest.mark.parametrize(("depth", "blocks"), [(12, (4, 8)), (28, (8, 20))])
def test_default_blocks_are_the_published_ones(depth, blocks):
    g = SRAGuidance(SiT((4, 4, 4), 3, width=16, depth=depth, heads=2, patch=2), SRA(head_width=4))
    assert (g.block, g.target) == blocks


@pytest.mark.parametrize(
    ("config", "message"), [(SRA(span=2), r"\[0, 1\]"), (SRA(target_block=9), "outside the student's 1..3")]
)
def test_impossible_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        SRAGuidance(Stub(), config)
