"""What tests share does not depend on which of them ran before, and in which order."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

Made = TypeVar("Made")


def seed() -> None:
    """The seeds with which each test starts, and one thread: sums of several are not the same bit for bit."""
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(0)


def once(make: Callable[..., Made]) -> Callable[..., Made]:
    """Cache what a function returns for all tests of this process.

    It starts with the same seeds whichever test is the first to call it, and draws nothing from the generators of that test.
    """

    @functools.cache
    @functools.wraps(make)
    def made(*args: Any, **options: Any) -> Made:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        seed()
        try:
            return make(*args, **options)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            torch.set_rng_state(states[2])

    return made
