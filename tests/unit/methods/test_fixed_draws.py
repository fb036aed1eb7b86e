"""The flow loss by fixed draws: closed forms, the same number at every call, and no effect on random numbers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from selftrans.flow import COSINE, LINEAR
from selftrans.library import held_out_loss
from selftrans.methods.fixed_draws import PATH, POSTERIOR, fixed_noise, fixed_times
from selftrans.methods.objective import Objective
from selftrans.types import Batch, Output
from tests.support.stub import Stub


class Best(Stub):
    """The best velocity for normal data of deviation s on the linear path: E[v | zt] = (t - (1 - t) s²) zt / var zt."""

    s = 1.0

    def forward(self, x, t, cond, *, taps=(), stop=False):
        t = t.view(-1, 1, 1, 1)
        return Output((t - (1 - t) * self.s**2) * x / ((1 - t) ** 2 * self.s**2 + t**2), {})


def batch_of(n: int, scale: float = 1.0) -> Batch:
    z0 = torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    return Batch(scale * z0, torch.arange(n) % 7)


@pytest.mark.parametrize("s", [1.0, 0.3])
def test_loss_of_the_best_model_is_the_variance_that_is_left(s: float) -> None:
    """It is the integral over t of s² / ((1 - t)² s² + t²), which is s pi / 2 for every s."""
    model = Best()
    model.s = s
    found = held_out_loss(Objective(model), batch_of(2048, s))
    assert found == pytest.approx(s * math.pi / 2, rel=0.02)


def test_loss_is_that_of_the_true_conditions_computed_by_hand() -> None:
    model, batch = Stub(), batch_of(5)
    objective = Objective(model, drop=1.0, path=LINEAR)
    t, noise = fixed_times(objective, 5).view(-1, 1, 1, 1), fixed_noise(range(5), (2, 4, 4), PATH)
    zt = (1 - t) * batch.z0 + t * noise
    v = 0.5 * zt - 1.5 * t + 0.25 * batch.cond.view(-1, 1, 1, 1)
    expected = float((v - (noise - batch.z0)).square().mean())
    assert held_out_loss(objective, batch) == pytest.approx(expected, rel=1e-5)
    assert held_out_loss(objective, batch, size=2) == pytest.approx(expected, rel=1e-5)
    assert not any(call["graph"] for call in model.calls)


def test_loss_follows_the_options_of_the_objective() -> None:
    batch = batch_of(6)
    velocity = Objective(Stub(), path=COSINE, loss="velocity")
    noise = Objective(Stub(), path=COSINE, loss="noise")
    own = Objective(Stub(), path=COSINE, loss=lambda output, d: (output - d.v).square().mean() + 1)
    assert held_out_loss(own, batch) == pytest.approx(held_out_loss(velocity, batch) + 1, rel=1e-5)
    # on the cosine path the noise's error is alpha / (pi / 2) of the velocity's, and alpha is below 1
    assert held_out_loss(noise, batch) < held_out_loss(velocity, batch) / (math.pi / 2) ** 2


def test_times_are_spread_over_the_distribution_of_the_objective() -> None:
    even = fixed_times(Objective(Stub(), times="systematic"), 64).sort().values
    torch.testing.assert_close(even, (torch.arange(64) + 0.5) / 64, rtol=0, atol=0.5 / 64)
    normal = torch.distributions.Normal(0, 1)
    for times, law in (
        ("uniform", lambda u: u),
        ("logitnormal", lambda u: torch.sigmoid(normal.icdf(u))),
        ("lognormal", lambda u: torch.sigmoid(1.2 * normal.icdf(u) - 1.2)),
    ):
        found = fixed_times(Objective(Stub(), times=times), 1024)
        expected = law((torch.arange(1024) + 0.5) / 1024)
        torch.testing.assert_close(found.sort().values, expected, rtol=0, atol=0.02)
        assert not torch.equal(found, found.sort().values)
    moved = fixed_times(Objective(Stub(), times="uniform", time_shift=3.0), 1024)
    plain = fixed_times(Objective(Stub(), times="uniform"), 1024)
    torch.testing.assert_close(moved, 3 * plain / (1 + 2 * plain))


def test_noise_depends_on_the_draw_alone() -> None:
    found = fixed_noise(range(400), (3, 8), PATH)
    assert torch.equal(fixed_noise([7, 3], (3, 8), PATH), found[[7, 3]])
    both = torch.cat([found, fixed_noise(range(400), (3, 8), POSTERIOR)]).flatten(1)
    assert abs(float(both.mean())) < 0.03 and float(both.std()) == pytest.approx(1, abs=0.03)
    cosine = nn.functional.normalize(both) @ nn.functional.normalize(both).T
    cosine.fill_diagonal_(0)
    assert float(cosine.abs().max()) < 0.95 and float(cosine.std()) == pytest.approx(24**-0.5, rel=0.03)


def test_draws_are_the_same_whatever_the_default_device_and_dtype() -> None:
    expected = fixed_noise([3], (2,), PATH), fixed_times(Objective(Stub()), 4)
    with torch.device("meta"):
        found = fixed_noise([3], (2,), PATH), fixed_times(Objective(Stub()), 4)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(fixed_noise([3], (2,), PATH), expected[0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected)) and found[0].dtype == torch.float32


def test_same_number_at_every_call_and_nothing_is_changed() -> None:
    class Dropping(Stub):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Dropout(0.5)

        def forward(self, x, t, cond, **options):
            return super().forward(self.part(x), t, cond, **options)

    model, batch = Dropping(), batch_of(40)
    model.train()
    objective, average = Objective(model), copy.deepcopy(model)
    average.a.data += 1
    state = torch.get_rng_state()
    first = held_out_loss(objective, batch)
    assert held_out_loss(objective, batch) == first != held_out_loss(objective, batch, average)
    assert torch.equal(torch.get_rng_state(), state) and model.training and model.part.training


def test_wrong_batches_are_refused() -> None:
    objective = Objective(Stub())
    for wrong, message in (
        ((torch.zeros(2, 2, 4, 4), torch.zeros(2).long()), "a batch is selftrans.Batch"),
        (Batch(torch.zeros(2, 2, 4, 4), torch.tensor([0, 7])), "label 7 .* is out of range"),
        (Batch(torch.zeros(2, 3, 4, 4), torch.zeros(2).long()), "latents"),
    ):
        with pytest.raises(ValueError, match=message):
            held_out_loss(objective, wrong)
