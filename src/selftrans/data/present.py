"""Which classes of data have samples: only these are sampled, shown and measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def present_classes(labels: np.ndarray, classes: Sequence[str]) -> tuple[int, ...]:
    """The labels that occur, in order; empty when there are no classes, or when all of them occur."""
    found = np.unique(labels).tolist() if len(classes) else []
    return () if len(found) == len(classes) else tuple(found)
