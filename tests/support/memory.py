"""Memory that Python allocates while something runs."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable


def traced_peak(work: Callable[[int], object], runs: int = 2) -> int:
    """The most bytes allocated at a time by `work(k)`: the least of the runs k = 0, 1, ...

    A table of the interpreter, such as that of interned names, takes megabytes when it grows, which any test before may
    have brought close. That, and an import, happens in one of the runs only.
    """
    peaks = []
    for k in range(runs):
        tracemalloc.start()
        try:
            work(k)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return min(peaks)
