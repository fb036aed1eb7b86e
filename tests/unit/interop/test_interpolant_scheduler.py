"""The scheduler against diffusers' flow matching, and against the samplers that it divides into single evaluations."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from selftrans.flow import COSINE, LINEAR
from selftrans.interop import InterpolantScheduler
from selftrans.sampling.samplers import SAMPLERS


def velocity(z, t):
    return torch.sin(3 * z) + float(t) ** 2


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(2, 1, 4, 4, generator=generator)


def integrate(scheduler, z, steps, **options):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        z = scheduler.step(velocity(z, t), t, z, **options).prev_sample
    return z


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "heun", "ode", "sde"])
def test_trajectory_is_that_of_the_sampler_bit_for_bit(sampler, shift, path):
    scheduler, noise = InterpolantScheduler(sampler, path, shift), drawn(1)
    found = integrate(scheduler, noise(), 5, **({"noise": noise} if sampler == "sde" else {}))
    noise = drawn(1)
    expected = SAMPLERS[sampler](
        velocity, noise(), steps=5, path={"linear": LINEAR, "cosine": COSINE}[path], noise=noise, shift=shift
    )
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="the trajectory is complete"):
        scheduler.step(found, 0, found)


def test_euler_is_the_flow_matching_scheduler_of_diffusers():
    z, theirs, steps = drawn(0)(), FlowMatchEulerDiscreteScheduler(), 6
    theirs.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    expected = z
    for t in theirs.timesteps:
        expected = theirs.step(velocity(expected, t / 1000), t, expected).prev_sample
    assert torch.allclose(integrate(InterpolantScheduler("euler"), z, steps), expected, atol=1e-5)


def test_heun_is_the_one_of_diffusers_except_for_its_last_step():
    """diffusers' ends with a step of Euler's method: compared up to there, on its own grid of 1 to 1/1000."""
    z, theirs = drawn(0)(), FlowMatchHeunDiscreteScheduler()
    theirs.set_timesteps(4)
    ours, expected, found = InterpolantScheduler("heun"), z, z
    ours.set_timesteps(3)
    ours._grid = theirs.sigmas[[0, 1, 3, 5]].double()
    for k in range(6):
        t = theirs.timesteps[k]
        expected = theirs.step(velocity(expected, t / 1000), t, expected).prev_sample
        found = ours.step(velocity(found, ours._grid[(k + 1) // 2]), None, found).prev_sample
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(found, z)


def test_noise_is_added_at_a_time_of_the_path():
    data, noise = torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0)
    t = torch.tensor([0.0, 0.5])
    assert InterpolantScheduler().add_noise(data, noise, t)[:, 0, 0, 0].tolist() == [1, 2]  # (1 - t) 1 + t 3
    found = InterpolantScheduler(path="cosine").add_noise(data, noise, t)
    assert torch.allclose(found[1], torch.full((1, 2, 2), 4 * 0.5**0.5))  # cos 45° (1 + 3)


def test_scheduler_is_stored_as_json_and_refuses_unknown_samplers(tmp_path):
    InterpolantScheduler("sde", "cosine", 2.0, 0.1).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["scheduler_config.json"]
    found = InterpolantScheduler.from_pretrained(tmp_path)
    assert (found.config.sampler, found.config.path, found.config.time_shift, found.config.last) == (
        "sde", "cosine", 2.0, 0.1
    )  # fmt: skip
    with pytest.raises(ValueError, match="sampler 'ddim' and path 'linear'; choose from"):
        InterpolantScheduler("ddim")
