"""flow.py against autograd, statistics of scipy, and its own algebra in float64."""

import math

import pytest
import scipy.stats
import torch

from selftrans import flow
from selftrans.flow import COSINE, LINEAR, PATHS, TIMES, equal_snr, equal_snr_range
from selftrans.types import Batch

N, SHAPE = 6, (3, 4, 4)
CPU = torch.device("cpu")


def point(path, seed=0):
    """z0, noise, t inside (0, 1), and the path's point and velocity there, in float64."""
    g = torch.Generator().manual_seed(seed)
    z0, noise = torch.randn(2, N, *SHAPE, generator=g, dtype=torch.float64)
    t = torch.rand(N, generator=g, dtype=torch.float64) * 0.98 + 0.01
    return z0, noise, t, *flow.interpolate(path, z0, noise, t)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_ends_of_the_path_are_data_and_noise(path):
    z0, noise, *_ = point(path)
    for t, end in ((0.0, z0), (1.0, noise)):
        zt, _ = flow.interpolate(path, z0, noise, torch.full((N,), t, dtype=torch.float64))
        torch.testing.assert_close(zt, end, atol=1e-14, rtol=0)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_velocity_is_the_derivative_of_the_path(path):
    z0, noise, t, _, v = point(path)
    t = t.requires_grad_()
    zt, _ = flow.interpolate(path, z0, noise, t)
    for i in range(N):  # each component of zt depends on its own sample's t alone
        for c in range(SHAPE[0]):
            (slope,) = torch.autograd.grad(zt[i, c, 1, 2], t, retain_graph=True)
            assert slope[i].item() == pytest.approx(v[i, c, 1, 2].item(), abs=1e-12)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_velocity_gives_back_noise_and_score(path):
    _, noise, t, zt, v = point(path)
    score = flow.score_from_v(path, zt, v, t)
    close = {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(flow.noise_from_v(path, zt, v, t), noise, **close)
    torch.testing.assert_close(score, -noise / path.sigma(t).view(N, 1, 1, 1), **close)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_score_of_gaussian_data_is_the_gradient_of_its_log_density(path):
    """z0 ~ N(m, s²) gives z_t ~ N(alpha m, alpha² s² + sigma²), whose log-density torch.distributions knows."""
    m, s, t = 0.7, 0.5, torch.tensor(0.3, dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = (f(t) for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
    scale = (alpha**2 * s**2 + sigma**2).sqrt()
    z = torch.linspace(-3, 3, 7, dtype=torch.float64).requires_grad_()
    (score,) = torch.autograd.grad(torch.distributions.Normal(alpha * m, scale).log_prob(z).sum(), z)
    mean_z0 = m + alpha * s**2 / scale**2 * (z - alpha * m)
    mean_noise = sigma / scale**2 * (z - alpha * m)
    v = d_alpha * mean_z0 + d_sigma * mean_noise
    torch.testing.assert_close(flow.score_from_v(path, z, v, t), score, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_scalar_time_equals_one_time_per_sample(path):
    z0, noise, *_ = point(path)
    t = torch.tensor(0.4, dtype=torch.float64)
    for one, many in zip(
        flow.interpolate(path, z0, noise, t), flow.interpolate(path, z0, noise, t.expand(N)), strict=True
    ):
        assert torch.equal(one, many)


def test_systematic_times_put_one_in_each_stratum():
    torch.manual_seed(0)
    for n in (1, 2, 7, 32):
        t = flow.systematic_times(n, flow.LINEAR, CPU)
        assert sorted((t * n).floor().int().tolist()) == list(range(n))
        assert t.min() >= 0 and t.max() <= 1


def test_systematic_times_are_each_uniform_and_shuffled():
    torch.manual_seed(1)
    first = torch.stack([flow.systematic_times(8, flow.LINEAR, CPU)[:2] for _ in range(3000)])
    for column in first.unbind(dim=1):
        assert scipy.stats.kstest(column.numpy(), "uniform").pvalue > 1e-3
    assert len(set((first[:, 0] * 8).floor().tolist())) == 8  # the first sample visits every stratum


@pytest.mark.parametrize(
    ("n", "a", "b"), [(10, 0.4, 0.7), (256, 0.4, 0.7), (7, 0.1, 0.95), (3, 0.5, 0.6), (5, 0.0, 1.0)]
)
def test_a_range_holds_a_bounded_number_of_systematic_times(n, a, b):
    torch.manual_seed(2)
    counts = [
        ((t >= a) & (t <= b)).sum().item() for t in (flow.systematic_times(n, flow.LINEAR, CPU) for _ in range(500))
    ]
    length = round(n * (b - a), 9)  # 10 * (0.7 - 0.4) is 2.9999999999999996 in floating point
    assert max(counts) <= math.floor(length) + 1 and min(counts) >= math.floor(length) - (length == math.floor(length))
    assert sum(counts) / len(counts) == pytest.approx(length, abs=0.1)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_lognormal_times_have_edm_noise_to_signal_ratios(path):
    torch.manual_seed(3)
    t = flow.lognormal_times(4000, path, CPU).double()
    ratio = path.sigma(t) / path.alpha(t)
    assert scipy.stats.kstest(ratio.log().numpy(), "norm", args=(-1.2, 1.2)).pvalue > 1e-3
    if path is flow.LINEAR:  # quantiles by hand: ratio r is reached at t = r / (1 + r)
        for q in (0.1, 0.5, 0.9):
            r = math.exp(1.2 * scipy.stats.norm.ppf(q) - 1.2)
            assert t.quantile(q).item() == pytest.approx(r / (1 + r), abs=0.02)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_standard_lognormal_times_are_those_of_repa(path):
    """sigma = exp(normal), then t = sigma / (1 + sigma) on the linear path, 2 / pi atan(sigma) on the cosine path."""
    torch.manual_seed(3)
    t = flow.lognormal_standard_times(4000, path, CPU).double()
    torch.manual_seed(3)
    sigma = torch.randn(4000).double().exp()
    expected = sigma / (1 + sigma) if path is flow.LINEAR else 2 / math.pi * sigma.atan()
    torch.testing.assert_close(t, expected, rtol=1e-5, atol=1e-6)
    assert scipy.stats.kstest((path.sigma(t) / path.alpha(t)).log().numpy(), "norm").pvalue > 1e-3
    if path is flow.LINEAR:  # the logit of t is the logarithm of the ratio
        torch.manual_seed(3)
        torch.testing.assert_close(t, flow.logitnormal_times(4000, path, CPU).double(), rtol=1e-5, atol=1e-6)


def test_logitnormal_times_have_the_density_of_the_paper():
    torch.manual_seed(3)
    t = flow.logitnormal_times(4000, flow.COSINE, CPU).double()
    assert scipy.stats.kstest(torch.log(t / (1 - t)).numpy(), "norm").pvalue > 1e-3


def test_systematic_logitnormal_times_are_those_of_the_paper_evenly_spread():
    torch.manual_seed(3)
    t = flow.systematic_logitnormal_times(4000, flow.COSINE, CPU).double()
    quantiles = torch.from_numpy(scipy.stats.norm.cdf(torch.log(t / (1 - t)).numpy())).sort().values
    middles = (torch.arange(4000) + 0.5) / 4000
    assert (quantiles - middles).abs().max() <= 0.51 / 4000, "one in each of 4,000 parts of equal probability"
    assert not torch.equal(t, t.sort().values)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", TIMES)
def test_share_of_a_range_is_that_of_the_drawn_times(name, path):
    torch.manual_seed(3)
    t = TIMES[name].draw(40_000, path, CPU)
    for a, b in ((0.4, 0.7), (0.0, 0.3), (0.65, 1.0), (0.0, 1.0)):
        inside = ((t >= a) & (t <= b)).double().mean().item()
        assert TIMES[name].share((a, b), path) == pytest.approx(inside, abs=0.01)


@pytest.mark.parametrize("shift", [0.5, 3.0])
@pytest.mark.parametrize("name", TIMES)
def test_share_of_a_range_is_that_of_the_shifted_times(name, shift):
    torch.manual_seed(3)
    law = flow.times_of(name, shift)
    t = law.draw(40_000, LINEAR, CPU)
    assert law.even == TIMES[name].even
    for a, b in ((0.4, 0.7), (0.0, 0.3), (0.65, 1.0), (0.0, 1.0)):
        assert law.share((a, b), LINEAR) == pytest.approx(((t >= a) & (t <= b)).double().mean().item(), abs=0.01)


def test_shifted_logitnormal_times_have_another_mean():
    """logit(k t / (1 + (k - 1) t)) = logit(t) + log k: SD3's logit-normal density of mean log k."""
    torch.manual_seed(3)
    t = flow.times_of("logitnormal", 3.0).draw(4000, LINEAR, CPU).double()
    assert scipy.stats.kstest(torch.log(t / (1 - t)).numpy(), "norm", args=(math.log(3), 1)).pvalue > 1e-3


def test_shifted_times_are_those_of_the_sd3_schedule_of_diffusers():
    """diffusers' scripts draw a step of the shifted schedule at random; step k of it is our shifted k / 1000."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas[:1000].flip(0).double()
    ours = flow.shifted(torch.arange(1, 1001, dtype=torch.float64) / 1000, 3.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, math.nan])
def test_shift_that_moves_times_out_of_their_range_is_refused(shift):
    with pytest.raises(ValueError, match=r"time_shift .* must be a finite number above zero"):
        flow.times_of("uniform", shift)


def test_draw_shifts_its_times_and_not_those_of_the_caller():
    b, null = batch(8), torch.full((8,), 10)
    torch.manual_seed(4)
    plain = flow.draw(b, null)
    torch.manual_seed(4)
    moved = flow.draw(b, null, time_shift=2.0)
    torch.testing.assert_close(moved.t, 2 * plain.t / (1 + plain.t))
    assert torch.equal(moved.noise, plain.noise)
    assert torch.equal(flow.draw(b, null, time_shift=2.0, t=plain.t).t, plain.t)


def batch(n):
    return Batch(torch.randn(n, 1, 2, 2), torch.arange(n) % 10)


@pytest.mark.parametrize("times", TIMES)
def test_draw_is_on_the_path(times):
    torch.manual_seed(4)
    b = batch(16)
    d = flow.draw(b, torch.full_like(b.cond, 10), path=flow.COSINE, times=times)
    zt, v = flow.interpolate(flow.COSINE, b.z0, d.noise, d.t)
    assert torch.equal(d.zt, zt) and torch.equal(d.v, v) and torch.equal(d.z0, b.z0)
    assert d.t.shape == (16,) and d.t.dtype == torch.float32 and d.even == times.startswith("systematic")


def test_draw_drops_to_the_null_condition_with_its_probability():
    torch.manual_seed(5)
    b = batch(20_000)
    d = flow.draw(b, torch.full_like(b.cond, 10), drop=0.1)
    replaced = d.dropped == 10
    assert scipy.stats.binomtest(int(replaced.sum()), len(b.cond), 0.1).pvalue > 1e-3
    assert torch.equal(d.dropped[~replaced], b.cond[~replaced])
    assert torch.equal(d.cond, b.cond), "the teacher keeps the true condition"
    assert torch.equal(flow.draw(b, torch.full_like(b.cond, 10), drop=0.0).dropped, b.cond)
    assert (flow.draw(b, torch.full_like(b.cond, 10), drop=1.0).dropped == 10).all()


def test_same_seed_same_draw():
    b = batch(8)
    draws = []
    for seed in (6, 6, 7):
        torch.manual_seed(seed)
        draws.append(flow.draw(b, torch.full_like(b.cond, 10)))
    same, again, other = draws
    assert all(torch.equal(x, y) for x, y in zip(same[:8], again[:8], strict=True))
    assert not torch.equal(same.noise, other.noise) and not torch.equal(same.t, other.t)


def test_draw_drops_all_tensors_of_a_row_together():
    torch.manual_seed(8)
    n = 64
    cond = {"tokens": torch.ones(n, 5, 3), "mask": torch.ones(n, 5, dtype=torch.bool), "pooled": torch.ones(n, 4)}
    null = {name: torch.zeros_like(x) for name, x in cond.items()}
    d = flow.draw(Batch(torch.randn(n, 1, 2, 2), cond), null, drop=0.5)
    kept = {name: x.flatten(start_dim=1).float() for name, x in d.dropped.items()}
    rows = kept["pooled"][:, 0] == 1
    assert 0 < rows.sum() < n
    for x in kept.values():
        assert torch.equal(x, rows.float()[:, None].expand_as(x))


@pytest.mark.parametrize(("std", "expected"), [(1.0, (0.4, 0.7)), (0.75, (1 / 3, 7 / 11)), (3.0, (2 / 3, 7 / 8))])
def test_range_of_equal_signal_to_noise_ratio_by_hand(std, expected):
    """Linear path: t / (1 - t) is std times as large; 0.4 / 0.6 * 0.75 = 1 / 2, which is (1 / 3) / (2 / 3)."""
    assert equal_snr_range((0.4, 0.7), std, LINEAR) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("path", [LINEAR, COSINE], ids=lambda path: path.name)
def test_signal_to_noise_ratios_are_equal(path):
    for t in (0.1, 0.5, 0.9):
        moved = torch.tensor(equal_snr(t, 0.5, path), dtype=torch.float64)
        unit = torch.tensor(t, dtype=torch.float64)
        ratio, same = (0.5 * path.alpha(moved) / path.sigma(moved)) ** 2, (path.alpha(unit) / path.sigma(unit)) ** 2
        torch.testing.assert_close(ratio, same, rtol=1e-12, atol=0)
    assert equal_snr_range((0.0, 1.0), 0.5, path) == (0.0, 1.0) and equal_snr_range(None, 0.5, path) is None


def test_unknown_times_are_refused():
    with pytest.raises(ValueError, match="times 'even' is unknown; choose one of systematic, uniform"):
        flow.draw(Batch(torch.zeros(1, 1, 2, 2), torch.zeros(1)), torch.zeros(1), times="even")
