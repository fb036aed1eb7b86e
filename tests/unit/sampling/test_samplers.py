"""Samplers on Gaussian data, whose velocity and flow are known in closed form; guidance.

For z0 ~ N(m, s²): z_t ~ N(alpha m, V) with V = alpha² s² + sigma², and regression of data and noise on z_t gives
    v(z, t) = alpha' m + V' / (2 V) (z - alpha m),        V' / 2 = alpha alpha' s² + sigma sigma'.
The probability flow keeps (z - alpha m) / sqrt(V) constant, so noise z at t = 1 arrives at m + s z.
"""

import math

import numpy as np
import pytest
import torch

from selftrans.flow import COSINE, LINEAR, PATHS, shifted
from selftrans.sampling.captured_passes import CapturedPasses
from selftrans.sampling.samplers import (
    EVALUATIONS,
    SAMPLERS,
    Early,
    autoguided,
    guided,
    launched,
    ode,
    ode_times,
    scaled,
    sde,
    sde_times,
)
from selftrans.types import Output

M, S = 0.7, 0.4
both_paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def gaussian(path):
    """The exact velocity, and a list of the times of its evaluations."""
    asked = []

    def velocity(z, t):
        asked.append(float(t))
        alpha, sigma, d_alpha, d_sigma = (f(t) for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
        variance = alpha**2 * S**2 + sigma**2
        return d_alpha * M + (alpha * d_alpha * S**2 + sigma * d_sigma) / variance * (z - alpha * M)

    return velocity, asked


def order(steps, errors):
    """Slope of log error over log step size."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


# ---- ODE


@both_paths
@pytest.mark.parametrize(("method", "expected"), [("euler", 1), ("heun", 2)])
def test_ode_converges_to_the_exact_flow_with_its_order(path, method, expected):
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    steps = (40, 80, 160, 320)
    ends = [ode(gaussian(path)[0], z, steps=n, method=method) for n in steps]
    errors = [(end - (M + S * z)).abs().max().item() for end in ends]
    assert order(steps, errors) == pytest.approx(expected, abs=0.12), errors
    assert ends[0].dtype == torch.float64 and errors[-1] < {"euler": 0.02, "heun": 1e-4}[method]


def test_ode_grid_is_uniform_and_heun_evaluates_both_ends_of_each_step():
    for method, expected in (("euler", [1, 0.75, 0.5, 0.25]), ("heun", [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0])):
        velocity, asked = gaussian(LINEAR)
        ode(velocity, torch.zeros(1), steps=4, method=method)
        assert asked == pytest.approx(expected, abs=1e-15)


def test_ode_equals_hand_computed_steps():
    """dz/dt = z from 1 to 0 in two steps: Euler multiplies by (1 - h), Heun by (1 - h + h² / 2)."""
    z = torch.tensor([1.0], dtype=torch.float64)
    assert ode(lambda z, t: z, z, steps=2, method="euler").item() == pytest.approx(0.25, abs=1e-15)
    assert ode(lambda z, t: z, z, steps=2, method="heun").item() == pytest.approx(0.625**2, abs=1e-15)


# ---- SDE


def sde_moments(path, steps, last=0.04):
    """Exact mean and variance of the result of `sde` for z ~ N(0, 1), without sampling.

    Gaussian velocities make it linear in its start and in each noise: row j is given a one in the j-th of them.
    """
    rows = torch.eye(steps + 1, dtype=torch.float64)  # row 0 nothing, row 1 the start, the others the steps - 1 noises
    noises = iter(rows[:, 2:].unbind(dim=1))
    end = sde(gaussian(path)[0], rows[:, 1], steps=steps, path=path, last=last, noise=lambda: next(noises))
    assert next(noises, None) is None, "the last step takes no noise"
    return end[0].item(), (end[1:] - end[0]).square().sum().item()


def after_last_step(path, last=0.04):
    """Moments once the SDE is exact up to t = last, z ~ N(alpha m, V), and the noise-free step is taken by hand."""
    t = torch.tensor(last, dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    variance = alpha**2 * S**2 + sigma**2

    def end(z):  # the true score of a Gaussian is -(z - mean) / variance
        return z - t * (gaussian(path)[0](z, t) - t * -(z - alpha * M) / variance)

    slope = end(alpha * M + 1) - end(alpha * M)
    return end(alpha * M).item(), (slope**2 * variance).item()


@both_paths
def test_sde_moments_converge_with_weak_order_one(path):
    mean, variance = after_last_step(path)
    steps = (100, 200, 400, 800)
    found = [sde_moments(path, n) for n in steps]
    mean_errors, variance_errors = ([abs(f[i] - x) for f in found] for i, x in ((0, mean), (1, variance)))
    assert order(steps, variance_errors) == pytest.approx(1, abs=0.15), variance_errors
    if path is LINEAR:  # its mean is a straight line in t, which Euler's steps follow exactly
        assert max(mean_errors) < 1e-12
    else:
        assert order(steps, mean_errors) == pytest.approx(1, abs=0.05), mean_errors


@both_paths
def test_sde_reaches_the_data_as_the_last_step_shrinks(path):
    errors = []
    for steps, last in ((100, 0.04), (400, 0.01)):
        mean, variance = sde_moments(path, steps, last)
        errors.append([abs(mean - M), abs(variance - S**2)])
    (coarse_mean, coarse_variance), (fine_mean, fine_variance) = errors
    assert fine_mean < max(0.35 * coarse_mean, 1e-12) and fine_variance < 0.35 * coarse_variance
    assert fine_mean < 0.002 and fine_variance < 0.001


@both_paths
def test_sde_with_sampled_noise_has_the_exact_moments(path):
    torch.manual_seed(0)
    n = 40_000
    end = sde(gaussian(path)[0], torch.randn(n, dtype=torch.float64), steps=60, path=path)
    mean, variance = sde_moments(path, 60)
    assert end.mean().item() == pytest.approx(mean, abs=4 * (variance / n) ** 0.5)
    assert end.var().item() == pytest.approx(variance, rel=4 * (2 / n) ** 0.5)


def test_sde_uses_the_published_grid():
    velocity, asked = gaussian(LINEAR)
    sde(velocity, torch.zeros(1), steps=250)
    assert asked == pytest.approx(np.linspace(1, 0.04, 250)) and len(asked) == 250


def test_sde_equals_hand_computed_steps():
    """Two steps on the linear path with v = 0, where the score is -z / t: drift z and diffusion 2 t."""
    z, noise = torch.tensor([0.5], dtype=torch.float64), torch.tensor([-1.5], dtype=torch.float64)
    found = sde(lambda z, t: torch.zeros_like(z), z, steps=2, last=0.2, noise=lambda: noise)
    middle = 0.5 - 0.8 * 0.5 + (2 * 1.0 * 0.8) ** 0.5 * -1.5
    assert found.item() == pytest.approx(middle - 0.2 * middle, abs=1e-14)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, z: ode(v, z, steps=0), "0 sampling steps"),
        (lambda v, z: ode(v, z, steps=2, method="rk4"), "'rk4' is unknown"),
        (lambda v, z: sde(v, z, steps=1), "at least 2"),
        (lambda v, z: sde(v, z, steps=9, last=0.0), "t = 0.0"),
    ],
)
def test_invalid_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(gaussian(LINEAR)[0], torch.zeros(1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_runs_with_its_number_of_evaluations(name):
    velocity, asked = gaussian(COSINE)
    end = SAMPLERS[name](velocity, torch.zeros(3, 1), steps=200, path=COSINE, noise=lambda: torch.zeros(3, 1))
    assert len(asked) == 200 * EVALUATIONS[name]
    assert end.dtype == torch.float32 and end.mean().item() == pytest.approx(M, abs=0.02)


# ---- guidance


class Spy:
    """v = label / 10 + t; records the batch size and time of each call."""

    depth, width, patch, shape = 1, 4, 1, (1, 1, 1)

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, cond, *, taps=(), stop=False):
        assert t.shape == (len(x),) and t.dtype == x.dtype and len(cond) == len(x)
        self.calls.append((len(x), round(t[0].item(), 4)))
        return Output((cond.to(x.dtype) / 10 + t).view(-1, 1, 1, 1).expand_as(x), {})

    def null(self, cond):
        return torch.full_like(cond, 100)


def test_guidance_only_inside_its_interval_and_free_outside():
    spy, z, labels = Spy(), torch.zeros(2, 1, 1, 1, dtype=torch.float64), torch.tensor([1, 4])
    velocity = guided(spy, labels, scale=1.9, interval=(0.2, 0.65))
    for t in (0.7, 0.65, 0.4, 0.2, 0.1):
        on = 0.2 <= t <= 0.65
        plain = labels / 10 + t
        expected = (10 + t) + 1.9 * (plain - (10 + t)) if on else plain
        found = velocity(z, torch.tensor(t, dtype=torch.float64)).flatten()
        torch.testing.assert_close(found, expected.double(), atol=1e-5, rtol=0)
        assert spy.calls[-1] == (4 if on else 2, t)
    assert len(spy.calls) == 5, "one batch each time, never two"


@pytest.mark.parametrize("run", [launched, CapturedPasses(torch.device("cpu"))], ids=["launched", "buffers"])
def test_times_are_not_rounded_to_the_half_precision_of_latents(run):
    asked = []

    class Timed(Spy):
        def __call__(self, x, t, cond, *, taps=(), stop=False):
            asked.append(t[0].item())
            return Output(x, {})

    z = guided(Timed(), torch.tensor([1]), run=run)(torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), torch.tensor(0.9961))
    assert asked == pytest.approx([0.9961], abs=1e-7) and z.dtype == torch.bfloat16  # 0.9961 is 1 - 1 / 256 in bfloat16


def test_interval_includes_its_ends_on_a_sampling_grid():
    spy = Spy()
    ode(
        guided(spy, torch.tensor([1]), scale=2.0, interval=(0.3, 0.65)),
        torch.zeros(1, 1, 1, 1),
        steps=20,
        method="euler",
    )
    assert [t for n, t in spy.calls if n == 2] == pytest.approx(np.arange(0.65, 0.29, -0.05))


def test_scale_one_needs_one_conditional_pass_and_no_null_condition():
    spy = Spy()
    spy.null = None  # such as an imported model of text, which does not know it
    guided(spy, torch.tensor([1, 2]), scale=1.0)(torch.zeros(2, 1, 1, 1), torch.tensor(0.5))
    assert spy.calls == [(2, 0.5)]


def test_prediction_of_other_channels_is_no_velocity():
    """Such as noise with a variance: on one channel it would be broadcast."""

    class Variance(Spy):
        def __call__(self, x, t, cond, *, taps=(), stop=False):
            return Output(super().__call__(x, t, cond).v.repeat(1, 2, 1, 1), {})

    for velocity in (
        guided(Variance(), torch.tensor([1, 2]), scale=2.0),
        autoguided(Spy(), Variance(), torch.tensor([1, 2]), scale=2.0),
    ):
        with pytest.raises(ValueError, match=r"Variance returned \(\d, 2, 1, 1\); expected a velocity of shape"):
            velocity(torch.zeros(2, 1, 1, 1), torch.tensor(0.5))


def test_guidance_of_an_unconditional_model_is_ignored_with_a_warning():
    spy = Spy()
    with pytest.warns(UserWarning, match="guidance scale 3.0 is ignored"):
        velocity = guided(spy, torch.tensor([100, 100]), scale=3.0)
    velocity(torch.zeros(2, 1, 1, 1), torch.tensor(0.5))
    assert spy.calls == [(2, 0.5)]


def test_guidance_concatenates_conditions_of_several_tensors():
    class Text(Spy):
        def __call__(self, x, t, cond, *, taps=(), stop=False):
            assert {name: len(c) for name, c in cond.items()} == {"tokens": len(x), "pooled": len(x)}
            return super().__call__(x, t, cond["pooled"][:, 0])

        def null(self, cond):
            return {name: torch.full_like(c, 100) for name, c in cond.items()}

    cond = {"tokens": torch.ones(2, 3, 5), "pooled": torch.tensor([[1.0], [4.0]])}
    v = guided(Text(), cond, scale=2.0)(torch.zeros(2, 1, 1, 1), torch.tensor(0.0))
    torch.testing.assert_close(v.flatten(), 10 + 2 * (torch.tensor([0.1, 0.4]) - 10))


def test_only_the_first_channels_are_guided():
    """v_c = 1, 2, 3, 4 and v_u = 0 by channel; guidance 10 on two channels: 10, 20, 3, 4."""

    class Channels(Spy):
        shape = (4, 1, 1)

        def __call__(self, x, t, cond, *, taps=(), stop=False):
            self.calls.append(len(x))
            v = torch.arange(1.0, 5).view(1, 4, 1, 1) * (cond != 100).view(-1, 1, 1, 1)
            return Output(v.to(x.dtype), {})

    model, z = Channels(), torch.zeros(2, 4, 1, 1)
    for channels, expected in ((2, [10, 20, 3, 4]), (4, [10, 20, 30, 40]), (None, [10, 20, 30, 40])):
        velocity = guided(model, torch.tensor([1, 2]), scale=10.0, interval=(0.0, 0.5), channels=channels)
        assert velocity(z, torch.tensor(0.5))[1].flatten().tolist() == expected
        assert velocity(z, torch.tensor(0.7))[1].flatten().tolist() == [1, 2, 3, 4]
    assert model.calls == [4, 2] * 3


# ---- shifted time


def times_of(sampler, shift, steps=4):
    seen = []
    velocity = lambda z, t: seen.append(t.item()) or torch.zeros_like(z)  # noqa: E731
    sampler(velocity, torch.zeros(1, 1, dtype=torch.float64), steps=steps, shift=shift)
    return seen


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.05])
def test_scaled_velocity_has_the_closed_form_of_a_constant_one(factor):
    """dz/dt = k v with constant v: from t = 1 to 0 the way is -k v, whatever the steps."""
    z, v = torch.tensor([[2.0, -1.0]], dtype=torch.float64), torch.tensor([[0.5, 3.0]], dtype=torch.float64)
    found = ode(scaled(lambda z, t: v, factor), z, steps=5)
    torch.testing.assert_close(found, z - factor * v)


def test_times_are_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert [float(t) for t in ode_times(2)] == [1, 0.5, 0]
        assert [float(t) for t in sde_times(3)] == pytest.approx([1, 0.52, 0.04, 0])


def test_shifted_times_by_hand():
    """k = 3: 3/4 -> 9/10, 1/2 -> 3/4, 1/4 -> 1/2. The SDE keeps its last noisy time, 0.04."""
    assert times_of(ode, 3.0) == pytest.approx([1, *[x for t in (0.9, 0.75, 0.5) for x in (t, t)], 0])
    assert times_of(ode, 1.0) == pytest.approx([1, *[x for t in (0.75, 0.5, 0.25) for x in (t, t)], 0])
    times = times_of(sde, 3.0)
    equal = [t / (3 - 2 * t) for t in times]  # the inverse
    assert times[-1] == pytest.approx(0.04) and times[0] == 1 and np.diff(equal) == pytest.approx(np.diff(equal)[0])
    assert shifted(shifted(torch.tensor(0.3), 4.0), 0.25).item() == pytest.approx(0.3)


def test_shifted_ode_reaches_the_same_end():
    """dz/dt = z, whose solution at 0 is z / e: the grid changes the error alone."""
    for shift in (0.3, 1.0, 1 / 0.3):
        end = ode(lambda z, t: z, torch.ones(1, dtype=torch.float64), steps=200, shift=shift)
        assert end.item() == pytest.approx(math.exp(-1), rel=1e-4)


# ---- a weaker model


class Linear(Spy):
    """v = slope z: two of them, extrapolated, are linear again."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def __call__(self, x, t, cond, *, taps=(), stop=False):
        self.calls.append((len(x), round(t[0].item(), 4), cond))
        return Output(self.slope * x, {})


def test_autoguided_sampling_has_the_closed_form_of_two_linear_fields():
    """v = (b + w (a - b)) z: with a = 1, b = 0.5, w = 3 the slope is 2, so z at t = 0 is exp(-2) z at t = 1."""
    strong, weak, z, labels = (
        Linear(1.0),
        Linear(0.5),
        torch.full((2, 1, 1, 1), 3.0, dtype=torch.float64),
        torch.tensor([1, 4]),
    )
    end = ode(autoguided(strong, weak, labels, scale=3.0), z, steps=200)
    torch.testing.assert_close(end, z * np.exp(-2.0), rtol=1e-4, atol=0)
    assert len(strong.calls) == len(weak.calls) == 400
    assert all(call[0] == 2 and torch.equal(call[2], labels) for call in weak.calls), "the true condition, once"


def test_autoguidance_outside_its_interval_leaves_the_weak_model_out():
    strong, weak, z = Linear(1.0), Linear(0.5), torch.ones(1, 1, 1, 1)
    velocity = autoguided(strong, weak, torch.tensor([1]), scale=3.0, interval=(0.2, 0.65))
    for t, slope in ((0.7, 1.0), (0.65, 2.0), (0.2, 2.0), (0.1, 1.0)):
        assert velocity(z, torch.tensor(t, dtype=torch.float64)).item() == slope
    assert [t for _, t, _ in weak.calls] == [0.65, 0.2]


class TwoOutputs(Linear):
    """v = slope z under a class, 0 under the null condition; the second output has half of it."""

    early_block = 1

    def __call__(self, x, t, cond, *, taps=(), stop=False):
        self.calls.append((len(x), round(t[0].item(), 4), taps))
        v = self.slope * x * (cond < 10).view(-1, 1, 1, 1)
        return Output(v, {1: v / 2} if taps else {})

    def early_cells(self, tokens):
        return tokens

    def from_tokens(self, cells, shape):
        assert cells.shape[1:] == shape
        return cells


def test_early_guidance_has_the_closed_form_also_with_classifier_free_guidance():
    """v = (1/2 + w (1 - 1/2)) z of each half: w = 3 doubles it; the unconditional half is 0, so scale 1.5 is 1.5 times that."""
    model, z, labels = TwoOutputs(1.0), torch.full((2, 1, 1, 1), 3.0, dtype=torch.float64), torch.tensor([1, 4])
    end = ode(guided(model, labels, early=Early(3.0)), z, steps=200)
    torch.testing.assert_close(end, z * np.exp(-2.0), rtol=1e-4, atol=0)
    velocity = guided(model, labels, scale=1.5, early=Early(3.0, (0.2, 0.65)))
    for t, slope in ((0.7, 1.5), (0.65, 3.0), (0.2, 3.0), (0.1, 1.5)):
        assert velocity(z, torch.tensor(t, dtype=torch.float64))[0].item() == 3 * slope
    assert [taps for _, _, taps in model.calls[-4:]] == [(), (1,), (1,), ()], (
        "one pass, and no tap outside the interval"
    )
