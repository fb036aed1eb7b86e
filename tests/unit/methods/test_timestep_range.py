"""The gain of each sample by its time, against the formulas and the released code's arithmetic."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from selftrans import flow
from selftrans.flow import LINEAR
from selftrans.methods.objective import Objective
from selftrans.methods.timestep_range import TimestepRange
from tests.support.guidances import RANGE, TIMES, Ridge, data, frozen_stub, stage1, stage2
from tests.support.stub import Stub, handmade_draw


def test_gain_of_each_sample_in_each_mode():
    d, n = handmade_draw(TIMES), len(TIMES)
    every = TimestepRange(None, "select").gate(d)
    assert every.rows is None and every.gain.tolist() == pytest.approx([1 / n] * n)
    scaled = TimestepRange(RANGE, "scale").gate(d)
    assert scaled.rows is None and scaled.gain.tolist() == pytest.approx([4 / n / n] * n)
    chosen = TimestepRange(RANGE, "select").gate(d)
    assert sorted(chosen.rows.tolist()) == [1, 2, 3, 6], "0.4 <= t <= 0.7, edges included"
    assert chosen.gain.tolist() == pytest.approx([1 / n] * 4)


def test_scale_is_the_arithmetic_of_the_released_code():
    """The released code multiplies a mask of shape (B, 1, 1, 1) by losses of shape (B,), which gives (B, 1, 1, B)."""
    d, error = handmade_draw(TIMES), torch.rand(len(TIMES))
    t = d.t.view(-1, 1, 1, 1)
    mask = ((t >= 0.4) & (t <= 0.7)).float()
    product = mask * error
    assert product.shape == (7, 1, 1, 7)
    assert TimestepRange(RANGE, "scale").gate(d).mean(error).item() == pytest.approx(product.mean().item(), rel=1e-6)


def stratified(n, u):
    """One time per nth of [0, 1], at the offset u of each, in float32."""
    return ((torch.arange(n) + torch.tensor(u)) / n).tolist()


@pytest.mark.parametrize(
    "span", [(0.4, 0.7), (0.0, 1.0), (0.0, 0.3), (0.65, 1.0), (0.5, 0.51), (0.1, 0.95), (1 / 3, 2 / 3)]
)
def test_computed_samples_hold_every_one_inside_and_at_most_one_more(span):
    (a, b), selected = span, TimestepRange(span, "select")
    offsets = [0.0, 2**-24, 1e-3, 0.2, 0.35, 0.5, 0.8, 0.999, 1 - 2**-24]
    for n in [*range(1, 24), 31, 64, 100, 255, 256]:
        for u in offsets:
            d = handmade_draw(stratified(n, u), (1, 1, 1), even=True)
            picked = selected.gate(d)
            inside = {i for i, t in enumerate(d.t.tolist()) if np.float32(a) <= np.float32(t) <= np.float32(b)}
            assert len(picked.rows) == selected.computed(n) == max(1, math.ceil(n * (b - a) - 1e-6)), "a static shape"
            assert len(set(picked.rows.tolist())) == len(picked.rows)
            counted = {r for r, g in zip(picked.rows.tolist(), picked.gain.tolist(), strict=True) if g}
            on_edge = min(u, 1 - u) < 1e-6 and abs(n * (b - a) - round(n * (b - a))) < 1e-6
            assert counted == inside or (on_edge and counted < inside and len(inside - counted) == 1), f"n={n}, u={u}"
            assert len(picked.rows) - len(inside) <= 1
            assert all(g in (0.0, pytest.approx(1 / n)) for g in picked.gain.tolist())


def test_times_on_both_edges_lose_at_most_one_sample():
    """Where n (b - a) is an integer and the offset is exactly zero, one time more is inside than is computed."""
    for n in (10, 300, 3000):
        for start in range(0, n - 1, max(1, n // 50)):
            for k in (1, 2):
                if start + k > n:
                    continue
                span = (start / n, (start + k) / n)
                d = handmade_draw(stratified(n, 0.0), (1, 1, 1), even=True)
                assert round(TimestepRange(span, "select").gate(d).gain.sum().item() * n) == k
                d = handmade_draw(stratified(n, 0.5), (1, 1, 1), even=True)
                assert round(TimestepRange(span, "select").gate(d).gain.sum().item() * n) == k, (
                    "no sample is lost elsewhere"
                )


@pytest.mark.parametrize("span", [(0.7, 0.4), (0.5, 0.5), (-0.1, 0.5), (0.4, 1.1)])
def test_impossible_ranges_are_refused(span):
    with pytest.raises(ValueError, match="timestep_range"):
        stage1(Stub(), timestep_range=span)
    with pytest.raises(ValueError, match="timestep_range"):
        stage2(Stub(), frozen_stub(), timestep_range=span)


def test_unknown_range_modes_are_refused():
    with pytest.raises(ValueError, match="'mask' is unknown; choose one of select, scale"):
        TimestepRange(RANGE, "mask")
    with pytest.raises(ValueError, match=r"stage1.range_mode should be one of 'select', 'scale', not 'mask'"):
        stage1(Stub(), range_mode="mask")


@pytest.mark.parametrize(
    ("span", "mode", "expected"), [(None, "select", 10), (RANGE, "scale", 10), (RANGE, "select", 3)]
)
def test_number_of_computed_samples(span, mode, expected):
    assert TimestepRange(span, mode).computed(10) == expected


def test_share_of_a_logitnormal_range_by_hand():
    """The logits of 0.4 and 0.7 are -0.405 and 0.847: 0.8016 - 0.3426 = 0.459 of the times are between, and not 0.3."""
    found = TimestepRange((0.4, 0.7), "select").under(flow.TIMES["logitnormal"], LINEAR)
    assert found.share == pytest.approx(0.459, abs=1e-3)
    assert found.computed(100) == 46 and found.computed(256) == 118


@pytest.mark.parametrize("span", [(0.4, 0.7), (0.0, 1.0), (0.0, 0.3), (0.65, 1.0), (0.5, 0.51), (0.1, 0.95)])
def test_even_times_of_another_distribution_have_a_static_shape(span):
    """Every time inside is computed, and at most one more. Also where no objective has said how times are drawn."""
    law, (a, b) = flow.TIMES["systematic_logitnormal"], span
    alone = TimestepRange(span, "select")
    selected = alone.under(law, LINEAR)
    torch.manual_seed(0)
    for n in (1, 2, 7, 64, 255, 256):
        for _ in range(20):
            times = law.draw(n, LINEAR, torch.device("cpu"))
            d = handmade_draw(times.tolist(), (1, 1, 1), even=True)._replace(share=partial(law.share, path=LINEAR))
            picked = alone.gate(d)
            assert torch.equal(picked.rows, selected.gate(d).rows)
            inside = set(((times >= a) & (times <= b)).nonzero().flatten().tolist())
            assert len(picked.rows) == selected.computed(n) and len(picked.rows) - len(inside) <= 1
            assert {r for r, g in zip(picked.rows.tolist(), picked.gain.tolist(), strict=True) if g} == inside


@pytest.mark.parametrize("times", flow.TIMES)
def test_guidance_without_an_objective_computes_every_sample_inside(times):
    """Of logit-normal times 0.459 lie in [0.4, 0.7], more than b - a = 0.3 of them."""
    batch = data(256)
    d = flow.draw(batch, torch.full_like(batch.cond, 7), times=times)
    for guidance in (
        stage1(Stub(), timestep_range=(0.4, 0.7)),
        stage2(Stub(), frozen_stub(), timestep_range=(0.4, 0.7)),
    ):
        inside = ((d.t >= 0.4) & (d.t <= 0.7)).float().mean()
        assert float(guidance.acts_in.gate(d).gain.sum()) == pytest.approx(float(inside), abs=1e-6)


def test_objective_tells_its_guidances_how_times_are_drawn():
    guidance = stage2(Stub(), frozen_stub(), timestep_range=(0.4, 0.7))
    Objective(Stub(), [guidance], times="logitnormal")
    assert guidance.cost(100) == {"head": 46, "teacher": 92}


def test_range_of_shifted_times_by_hand():
    """With k = 2 uniform times t / (2 - t) are between 0.4 / 1.6 and 0.7 / 1.3: 0.288 of them, and each one is computed."""
    guidance = stage2(Stub(), frozen_stub(), timestep_range=(0.4, 0.7))
    objective = Objective(Stub(), [guidance], time_shift=2.0)
    assert guidance.acts_in.share == pytest.approx(0.7 / 1.3 - 0.4 / 1.6)
    assert guidance.cost(100) == {"head": 29, "teacher": 58}
    for seed in range(20):
        torch.manual_seed(seed)
        d = objective.draw(data(100))
        inside = ((d.t >= 0.4) & (d.t <= 0.7)).float().mean()
        assert d.even and guidance.acts_in.gate(d).gain.sum().item() == pytest.approx(inside.item(), abs=1e-6)


@pytest.mark.parametrize("times", flow.TIMES)
def test_guidance_that_does_not_take_times_computes_every_one_inside(times):
    """Guidances of other packages, from before there were other even times than uniform ones: of systematic logit-normal times
    up to 118 of 256 lie in a range of which they expect 77."""

    class Selects(Ridge):
        selects = True

        def forward(self, draw, feats):
            term, _ = super().forward(draw, feats)
            return term, {"inside": TimestepRange(RANGE, "select").gate(draw).gain.sum()}

    guidance = Selects()
    objective = Objective(Stub(), [guidance], times=times)
    _, report = objective(data(256), 0)
    seen = guidance.seen[0]
    inside = ((seen.t >= RANGE[0]) & (seen.t <= RANGE[1])).float().mean()
    assert report["ridge/inside"].item() == pytest.approx(inside.item(), abs=1e-6)
    assert seen.even == objective.even == (times == "systematic")
    assert not Objective(Stub(), [Selects()], times=times, time_shift=2.0).even
    assert Objective(Stub(), [stage1(Stub(), timestep_range=RANGE)], times=times).even == times.startswith("systematic")
