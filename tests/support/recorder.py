"""CUDA graphs without a GPU: the operations of a function on its tensors are recorded by torch.fx, and done again in a replay.

As in a graph, what the function decides, counts and reads on the host is that of the recording, and a replay overwrites what
the one before has returned.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from selftrans.graphs import Recorded

STREAM: Any = SimpleNamespace(device=torch.device("cpu"), wait_stream=lambda _: None)


def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What surrounds recordings does nothing; memory is 40 of 100 bytes free, and a step takes 30 where 10 are held."""
    for name, value in {
        "current_stream": lambda *_: STREAM,
        "stream": lambda _: contextlib.nullcontext(),
        "graph_pool_handle": lambda: (0, 0),
        "synchronize": lambda *_: None,
        "max_memory_allocated": lambda _: 30,
        "memory_allocated": lambda _: 10,
        "reset_peak_memory_stats": lambda _: None,
        "mem_get_info": lambda _: (40, 100),
        "empty_cache": lambda: None,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda _: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """The functions that were recorded. Import it into a test module."""
    without_gpu(monkeypatch)
    made: list[Recorded] = []

    def capture(self: Recorded, pool: Any) -> None:
        assert pool == (0, 0)
        traced, out = make_fx(self.function)(), list[torch.Tensor]()

        def replay() -> None:
            found = traced()
            self._out = out[0].copy_(found) if out else found
            out[:] = [self._out]

        made.append(self)
        self._graph, self._out = SimpleNamespace(replay=replay), torch.zeros(0)  # type: ignore[assignment]

    monkeypatch.setattr(Recorded, "capture", capture)
    return made
