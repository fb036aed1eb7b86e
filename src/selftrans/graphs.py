"""Functions that are recorded as CUDA graphs and replayed: in the training step, and in sampling.

A recording is of what the device does: what a function decides, reads or counts on the host happens once, while it is recorded.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selftrans.messages import first_line

WARM_UP = 3  #: launched calls before a recording: compilation, cuBLAS workspaces, choices of kernels
WAITS, PROTOTYPE = "called a synchronizing CUDA operation", "Synchronization debug mode"  #: in warnings of torch


class Invalidated(RuntimeError):
    """CUDA ended a recording. torch (2.11) then keeps its generator and its allocator in the state of recording: the next
    random number on the device raises, so this process cannot go on."""


class Recorded:
    """A function without arguments: called on a side stream, or captured once and replayed. On a CPU it is called.

    What it returns is overwritten by the next replay.
    """

    def __init__(self, function: Callable[[], Tensor], stream: torch.cuda.Stream | None) -> None:
        self.function, self.stream = function, stream
        self._graph: torch.cuda.CUDAGraph | None = None
        self._out: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._graph is not None:
            assert self._out is not None
            self._graph.replay()
            return self._out
        if self.stream is None:
            return self.function()
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            out = self.function()
        current.wait_stream(self.stream)
        return out

    def capture(self, pool: Any) -> None:
        """Record the function without running it. RuntimeError where it fails; `Invalidated` where CUDA ended the recording."""
        graph = torch.cuda.CUDAGraph()
        failed: RuntimeError | None = None
        # thread_local: what other threads do to the device does not end the capture
        recording = torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local")
        try:
            with recording:
                try:
                    self._out = self.function()
                except RuntimeError as error:
                    failed = error  # a recording that is still valid can be ended, and torch knows that it is over
        except RuntimeError as error:
            raise Invalidated(first_line(failed or error)) from error
        if failed is not None:
            raise failed
        self._graph = graph

    def release(self) -> None:
        """Free the graph, with which the device must have finished; from now on the function is called as it is."""
        self._graph = self._out = self.stream = None


@contextlib.contextmanager
def recordings(device: torch.device, waits: list[str]) -> Iterator[None]:
    """Around recordings on a device: no garbage is collected; device and stream are afterwards those of before.

    RuntimeError where `waits` names an operation (`noted_waits` of the call before), and for random numbers of the CPU.
    """
    if waits:
        raise RuntimeError(f"an operation waits for the device at {waits[0]}, which a graph cannot")
    collecting, drawn = gc.isenabled(), torch.get_rng_state()
    gc.collect()  # a graph of an earlier owner that is freed during a recording can end it
    gc.disable()
    try:
        with torch.cuda.stream(torch.cuda.current_stream(device)):  # a capture that fails leaves its own stream current
            yield
    finally:
        if collecting:
            gc.enable()
    if not torch.equal(drawn, torch.get_rng_state()):
        torch.set_rng_state(drawn)
        raise RuntimeError("random numbers are drawn on the CPU, which a graph would repeat")


@contextlib.contextmanager
def noted_waits(found: list[str]) -> Iterator[None]:
    """Add to `found` where an operation waits for the device, as `file.py:12`, by torch's own check; other warnings stay."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for each in said:
        if WAITS in str(each.message):
            found.append(f"{Path(each.filename).name}:{each.lineno}")
        elif PROTOTYPE not in str(each.message):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
