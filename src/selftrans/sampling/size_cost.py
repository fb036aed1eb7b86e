"""What pictures cost that are larger than those a model was made for."""

from __future__ import annotations

import math
import warnings

import torch

from selftrans.data.resolution import Resolution, check_range, size_text
from selftrans.device import memory_total
from selftrans.messages import gigabytes, plural
from selftrans.types import Backbone

LARGE = 4  #: times the tokens of the model's own size from which a size causes a warning
TENSORS = 4  #: of a block that exist at the same time, each (N, T, D): the tokens, and q, k and v


def check_cost(
    model: Backbone,
    shape: tuple[int, ...],
    resolution: Resolution,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Warn of a size with many times the tokens of the model's own. ValueError for one that the device has no memory for.

    shape: (C, *S) of the latents of pictures of this size, of which the model computes `batch` at a time, in `dtype`. The
    memory is a lower bound.
    """
    check_range(resolution)
    times = math.prod(shape[1:]) / math.prod(model.shape[1:])
    if times < LARGE:
        return
    tokens, total = round(model.tokens * times), memory_total(device)
    each = tokens * model.width * TENSORS * dtype.itemsize
    if total is not None and batch * each > total:
        fits = total // each
        smaller = f"--batch-size {fits} or less, or a smaller size" if fits else "a smaller size"
        raise ValueError(
            f"size {size_text(resolution)} is {tokens:,} tokens, and takes at least {gigabytes(batch * each)} for "
            f"{plural(batch, 'picture')} at a time; {device.type} has {gigabytes(total)}: give {smaller}"
        )
    warnings.warn(
        f"size {size_text(resolution)} is {tokens:,} tokens, {times:,.0f} times those of the model's own size: a picture takes "
        f"more than {times:,.0f} times as long, and the model was not trained for it",
        stacklevel=4,
    )
