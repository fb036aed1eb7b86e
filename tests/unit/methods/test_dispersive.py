"""The dispersive loss against its formula in loops over named axes."""

import math

import numpy as np
import pytest
import torch

from selftrans import Objective, SiT
from selftrans.methods.dispersive import Dispersive, DispersiveGuidance, squared_distances
from tests.support.stub import Stub, features_by_hand, handmade_draw
from tests.support.toy import assert_same_run, log, quick, toy  # noqa: F401 - quick is a fixture

TIMES = [0.1, 0.4, 0.55, 0.7, 0.9, 0.3]


def test_squared_distances_equal_cdist_also_under_autocast():
    x = (100 + torch.randn(6, 40)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = squared_distances(x)
    expected = torch.cdist(x.double(), x.double()).square()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert found.dtype == torch.float32 and not found.diagonal().any()
    (slope,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(slope, 4 * (6 * x - x.sum(dim=0)).detach(), rtol=1e-3, atol=1e-3)


def test_dispersive_by_hand():
    """log of the mean over all pairs (i, j) of exp(-mean over tokens and channels of the squared difference / tau)."""
    student, d = Stub(), handmade_draw(TIMES)
    g = DispersiveGuidance(student, Dispersive(block=2, temperature=0.7, weight=0.4))
    h = [features_by_hand(d, i, 2) for i in range(6)]
    expected = math.log(np.mean([math.exp(-((x - y) ** 2).mean() / 0.7) for x in h for y in h]))
    loss, report = Objective(student, [g]).losses(d, 0)
    assert report["dispersive"].item() == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(report["flow"].item() + 0.4 * expected, rel=1e-5)


def test_dispersive_moves_samples_apart_and_is_finite_for_equal_and_single_samples():
    hidden = torch.tensor([[[0.0, 0.0]], [[0.2, 0.0]], [[0.2, 0.0]]], requires_grad=True)  # (N, T, D); two are equal
    g = DispersiveGuidance(Stub(), Dispersive(block=1))
    term, _ = g(None, {1: hidden})
    term.backward()
    assert hidden.grad[0, 0, 0] > 0 > hidden.grad[1, 0, 0], "a gradient step moves them away from each other"
    assert torch.isfinite(hidden.grad).all()
    term, _ = g(None, {1: torch.ones(1, 4, 2)})
    assert term.item() == 0, "one sample has no other to move away from"


@pytest.mark.parametrize(("depth", "block"), [(12, 3), (28, 7)])
def test_default_block_is_the_published_one(depth, block):
    student = SiT((4, 4, 4), 3, width=16, depth=depth, heads=2, patch=2)
    assert DispersiveGuidance(student, Dispersive()).block == block


def test_weight_is_refused_without_a_word_of_a_head():
    with pytest.raises(ValueError, match=r"^dispersive\.weight must be a number from 0, not -1$"):
        Dispersive(weight=-1.0).check()


def test_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="above zero"):
        DispersiveGuidance(Stub(), Dispersive(temperature=0))
