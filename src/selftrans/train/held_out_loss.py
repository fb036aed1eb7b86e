"""The loss of samples that are held out, during training, and of samples that are trained on, by the same draws.

Draw k is of one sample, its first stored copy and caption, with a time and noise that depend on k alone.
What is measured is the moving average of the weights, which previews and samples use; no random number of the training
changes. Shape legend: N samples of a batch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from selftrans.data.held_out import measured_rows
from selftrans.methods.fixed_draws import POSTERIOR, fixed_loss, fixed_noise, fixed_times
from selftrans.train import fsdp
from selftrans.train.batches import Loaded, inputs_of
from selftrans.train.out_of_memory import between_steps
from selftrans.types import Batch

if TYPE_CHECKING:
    from selftrans.train.trainer import Trainer

DRAWS = 1024  #: of each of the two numbers, so at most so many samples of each kind
HELD_OUT, TRAINED = NAMES = ("held_out_loss", "trained_loss")  #: in the log


class HeldOutLoss:
    """Measures a stage in training. Every process must call it; each computes its part of the batches.

    Attributes:
        samples: how many are held out.
        found: what was measured last, by name; empty before.
    """

    def __init__(self, trainer: Trainer, held_out: np.ndarray) -> None:
        self.trainer, self.samples = trainer, len(held_out)
        self.found: dict[str, float] = {}
        self._rows = measured_rows(trainer.shards, held_out, DRAWS)  # of each draw
        self._times = fixed_times(trainer.objective, DRAWS)

    def due(self) -> bool:
        """Whether the log line of this step has it: the last one, and the first at or after each multiple of the setting."""
        log, step = self.trainer.config.log, self.trainer.step
        last = step == self.trainer.stage.steps
        return last or step // log.held_out_every > (step - log.every) // log.held_out_every

    def measure(self) -> dict[str, float]:
        """Mean flow loss of samples that are held out, and of samples that are trained on, by name."""
        self.found = between_steps(self.trainer, "the loss of held-out samples", self._means)
        return self.found

    def _means(self) -> dict[str, float]:
        accelerator, batches = self.trainer.accelerator, self._batches()
        world = accelerator.num_processes
        device = accelerator.device
        sums = torch.zeros(len(NAMES), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        for first in range(0, len(batches), world):
            at = first + accelerator.process_index
            kind, draws = batches[min(at, len(batches) - 1)]  # as many in all processes: sharded weights are gathered
            loss = self._loss(kind, draws)
            if at < len(batches):
                sums[kind] += loss * (len(draws) / DRAWS)
        fsdp.reshard(self.trainer.ema.model)
        found = accelerator.reduce(sums, reduction="sum").tolist()
        return {name: value for name, value in zip(NAMES, found, strict=True) if math.isfinite(value)}

    def _batches(self) -> list[tuple[int, np.ndarray]]:
        """(which of NAMES, draws) of each batch; a batch has latents of one shape."""
        ends = np.cumsum(self.trainer.shards.parts)
        size = min(self.trainer.stream.micro, math.ceil(DRAWS / self.trainer.accelerator.num_processes))
        found = []
        for kind, rows in enumerate(self._rows):
            parts = np.searchsorted(ends, rows, side="right")
            for part in np.unique(parts):
                draws = np.flatnonzero(parts == part)
                found += [(kind, each) for each in np.split(draws, range(size, len(draws), size))]
        return found

    def _loss(self, kind: int, draws: np.ndarray) -> Tensor:
        """Mean flow loss (0-d) of the average of the weights in some draws."""
        trainer, data = self.trainer, self.trainer.shards.random_access
        rows, device, space = self._rows[kind][draws], trainer.accelerator.device, data.manifest.latent_space
        loaded = Loaded(rows, data.read(rows, [name for name in data.names if name != "features"]))
        moments, cond, _ = inputs_of(loaded, trainer.shards, device)
        first = moments[:, 0]  # (N, M, *S) of the picture as it is, not mirrored
        noise = None
        if space.stochastic:
            noise = fixed_noise(draws.tolist(), (first.shape[1] // 2, *first.shape[2:]), POSTERIOR).to(device)
        batch = Batch(space.sample(first, noise), cond)
        with trainer.accelerator.autocast():
            return fixed_loss(
                trainer.objective, batch, draws.tolist(), self._times[torch.from_numpy(draws)], trainer.ema.model
            )
