"""Passes of the model in sampling, recorded as CUDA graphs and replayed (`sample.capture`).

    per batch  copy the condition into its buffer
    per pass   copy z and t into theirs -> replay: one evaluation of the velocity -> copy it out

The loop of the sampler stays on the host, which decides whether guidance is on: there is a graph for each of these choices, and
for each shape. The first passes of each are launched, on the same buffers; on a CPU all of them are.

A graph reads the weights where they were when it was recorded. They may be changed in place, but not moved, cast or replaced:
a `Sampler` does that before its first pass, and its graphs end with it. Hooks and other Python of the model do not run in a
replay.
"""

from __future__ import annotations

import gc
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

from selftrans.graphs import WARM_UP, Invalidated, Recorded, noted_waits, recordings
from selftrans.messages import first_line
from selftrans.sampling.samplers import Pass, launched, time_dtype
from selftrans.types import Cond, map_cond, tensors_of


class CapturedPasses:
    """Computes passes as `samplers.launched` does. Of equal choices and shapes, all must be the same function."""

    def __init__(self, device: torch.device) -> None:
        """ValueError on a device without CUDA graphs; on a CPU, passes are launched on buffers."""
        if device.type not in ("cuda", "cpu"):
            raise ValueError(
                f"sample.capture on is not possible: CUDA graphs need a CUDA GPU, this device is {device.type}; use off"
            )
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        #: of all graphs, which share its memory: the output of one is copied before the next runs
        self._pool: Any = None
        self._passes: dict[Any, _BufferedPass] = {}
        self._failed = False

    def __call__(self, compute: Pass, z: Tensor, t: Tensor, cond: Cond, *choices: Any) -> Tensor:
        if not self._failed:
            key = (choices, z.shape, *(each.shape for each in tensors_of(cond)))
            if key not in self._passes:
                self._passes[key] = _BufferedPass(compute, z, cond, choices, self._stream)
            one = self._passes[key]
            one.fill(z, t, cond)
            if self._stream is None or one.taken != WARM_UP or self._recorded(one):
                return one.take()
            self._launch()
        return launched(compute, z, t, cond, *choices)

    def _recorded(self, one: _BufferedPass) -> bool:
        """Record a pass. Where that fails, a warning says why all passes are launched from now on.

        ValueError where CUDA ended the recording, after which torch cannot go on.
        """
        try:
            with recordings(self.device, one.waits):
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                one.recorded.capture(self._pool)
        except Invalidated as error:
            raise ValueError(
                f"sample.capture on: CUDA ended the recording of a pass as a graph ({first_line(error)}), after which torch "
                "cannot go on; use --capture off, in training and compare --sample.capture off"
            ) from error
        except RuntimeError as error:
            warnings.warn(
                f"sample.capture: a pass of the model is not captured, all are launched: {first_line(error)}",
                stacklevel=2,
            )
            return False
        return True

    def _launch(self) -> None:
        """Free all graphs. Not inside a handler: the frames of an error hold the tensors of a recording."""
        torch.cuda.synchronize(self.device)
        self._failed = True
        self._passes.clear()
        gc.collect()
        torch.cuda.empty_cache()


class _BufferedPass:
    """A pass with fixed choices and shapes, on buffers."""

    def __init__(
        self, compute: Pass, z: Tensor, cond: Cond, choices: tuple[Any, ...], stream: torch.cuda.Stream | None
    ) -> None:
        self.z, self.cond = torch.empty_like(z), map_cond(torch.empty_like, cond)
        self.times = z.new_empty(z.shape[0], dtype=time_dtype(z))
        self.recorded = Recorded(partial(compute, self.z, self.times, self.cond, *choices), stream)
        self.taken = 0  #: passes
        self.waits: list[str] = []  #: where the last one before the recording has waited for the device
        self._filled: Cond | None = None  #: the condition that its buffer holds

    def fill(self, z: Tensor, t: Tensor, cond: Cond) -> None:
        self.z.copy_(z)
        self.times.fill_(float(t))
        if cond is not self._filled:  # another batch
            map_cond(lambda kept, new: kept.copy_(new), self.cond, cond)
            self._filled = cond

    def take(self) -> Tensor:
        self.taken += 1
        if self.recorded.stream is None or self.taken != WARM_UP:
            return self.recorded().clone()  # the next replay overwrites it
        with noted_waits(self.waits):
            return self.recorded().clone()
