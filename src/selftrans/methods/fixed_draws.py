"""The flow loss by fixed draws: the same number for the same weights, so that a curve of it has no noise of the draws.

Draw k has a time and noise of its own, which depend on k alone: not on the batch, the process, or the device.
Shape legend: N batch, (C, *S) latent, K draws.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from selftrans.flow import interpolate, times_of
from selftrans.methods.contract import check_output
from selftrans.methods.objective import Objective
from selftrans.types import Backbone, Batch, Draw, eval_mode, map_cond

SEED = 20_260  #: of the fixed times
FINE = 100  #: drawn times of which one is kept
PATH, POSTERIOR = 0, 1  #: what noise of a draw is for


def held_out_loss(objective: Objective, batch: Batch, model: Backbone | None = None, *, size: int = 64) -> float:
    """Mean flow loss of samples under their own conditions, in eval mode, without gradients and guidances.

    Times are spread evenly over the distribution of the objective, noise depends on the place in the batch. So one batch gives
    the same number at each call with the same weights, and the loss of two batches of equal length differs by their samples
    alone. torch's default generators stay as they are.

    Args:
        batch: samples that are not trained on, or as many that are, on the device of the model.
        model: whose loss it is, such as the moving average of the student; None: the student. size: samples at a time.
    ValueError as in a call of the objective.
    """
    objective.check(batch)
    count = batch.z0.shape[0]
    times, total = fixed_times(objective, count), 0.0
    for first in range(0, count, size):
        rows = slice(first, min(first + size, count))
        part = Batch(batch.z0[rows], map_cond(lambda x, rows=rows: x[rows], batch.cond))
        draws = range(rows.start, rows.stop)
        total += len(draws) * float(fixed_loss(objective, part, draws, times[rows], model))
    return total / count


@torch.no_grad()
def fixed_loss(
    objective: Objective, batch: Batch, draws: Iterable[int], times: Tensor, model: Backbone | None = None
) -> Tensor:
    """Mean flow loss (0-d) of a batch at these times (N,), with the noise of these draws; otherwise as `held_out_loss`."""
    z0, cond, model = batch.z0, batch.cond, model or objective.student
    noise, t = fixed_noise(draws, z0.shape[1:], PATH).to(z0.device), times.to(z0.device)
    zt, v = interpolate(objective.path, z0, noise, t)
    with eval_mode(model):
        out = model(zt, t, cond)
    check_output(out, zt, objective.student, (), velocity=isinstance(objective.loss, str))
    assert out.v is not None
    return objective.flow_loss(out.v, Draw(z0, noise, t, zt, v, cond, objective.student.null(cond), cond))


def fixed_times(objective: Objective, count: int) -> Tensor:
    """(K,) times by the distribution of an objective, one in each Kth of it, in a fixed random order; on the CPU."""
    law = times_of(objective.times, objective.time_shift)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        drawn = law.draw(FINE * count, objective.path, torch.device("cpu")).sort().values
        return drawn[FINE // 2 :: FINE][torch.randperm(count, device="cpu")]


def fixed_noise(draws: Iterable[int], shape: tuple[int, ...], of: int) -> Tensor:
    """(N, *shape) standard normal noise of these draws, for the path or the posterior; on the CPU."""
    generator = torch.Generator("cpu")  # whatever the default device and dtype
    drawn = [
        torch.randn(shape, generator=generator.manual_seed(2 * draw + of), dtype=torch.float32, device="cpu")
        for draw in draws
    ]
    return torch.stack(drawn)
