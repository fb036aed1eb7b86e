"""Memory that Python allocates while something runs, and objects that it frees."""

from __future__ import annotations

import gc
import time
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any


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


def freed(*references: weakref.ref[Any], seconds: float = 30) -> bool:
    """Collect garbage until no reference is alive; False if one still is after `seconds`.

    More than one `gc.collect()`: it does nothing while a thread, such as one of an earlier test, is collecting.
    """
    end = time.monotonic() + seconds
    while True:
        gc.collect()
        if all(each() is None for each in references):
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
