"""The captured step: the functions of `training_step.py` on static buffers, recorded as CUDA graphs and replayed.

    per micro-batch  seed -> copy the stored rows into the buffers -> replay: draws, forward, backward
    per step         replay: clip, is it finite?, AdamW -> moving average (a foreach kernel, outside of the graphs)

The draws come from torch's default generator, which is seeded before every micro-batch as in the uncaptured step; a replayed
graph starts at the generator's seed, so that the numbers are the same. The first steps of a stage, and of what remains of it
when a guidance has ended, are taken without a graph: they compile and allocate. Nothing is read by the host until
`flush`. On a CPU the same functions are called on the same buffers.
Shape legend: A micro-batches of a step, V values of a report.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from selftrans.graphs import WARM_UP, Invalidated, Recorded, noted_waits, recordings
from selftrans.messages import first_line
from selftrans.train.batches import Inputs, Loaded, draw_batch, inputs_of, seed_step
from selftrans.train.capture_rules import NotCaptured, obstacle, too_large, why_launched
from selftrans.train.optim import learning_rate, use_rate_tensor
from selftrans.train.training_step import micro_step, update_step
from selftrans.types import map_cond

if TYPE_CHECKING:
    from selftrans.train.trainer import Trainer

READ = 1000  #: steps after which the host reads the reports, if no log line is due


def captured_step(trainer: Trainer) -> CapturedStep | None:
    """The captured step of a stage, if the settings ask for it and it can be. ValueError (one line) for `on` where not."""
    wanted = trainer.config.train.capture
    if wanted == "off" or (wanted == "auto" and why_launched(trainer)):
        return None
    if reason := obstacle(trainer):
        raise ValueError(f"train.capture on is not possible: {reason}; use auto, or off")
    return CapturedStep(trainer)


class CapturedStep:
    """Takes the steps of a trainer on static buffers; those after the first `WARM_UP` are replays of graphs (on a GPU).

    Attributes:
        reason: why the steps are launched for good, with `auto`; None before that is known, and where they are replayed.
        crowded: whether the run ends because a recording had no memory; the same step without a graph had.
        transient: bytes that a replay uses beyond what is allocated, which torch's statistics do not count; 0 before.
        untimed: steps before the first that is as fast as all later ones.
    """

    untimed = WARM_UP + 1

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.device = trainer, trainer.accelerator.device
        on_gpu = self.device.type == "cuda"
        self.step = torch.zeros((), dtype=torch.long, device=self.device)
        # the fused kernel reads a float32 rate on a GPU: its rounding, 6e-8 of the rate, is all that differs there
        self.rate = torch.zeros((), dtype=torch.float32 if on_gpu else torch.float64, device=self.device)
        use_rate_tensor(trainer.optimizer, self.rate, capturable=on_gpu)
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None
        self.reason: str | None = None
        self._peak = 0  #: bytes of the device at most in the last step before the recording
        self._waits: list[str] = []  #: where the last step before the recording has waited for the device
        self._history: list[tuple[int, tuple[str, ...], Tensor]] = []
        self.transient, self.crowded = 0, False
        self.restart()

    def restart(self) -> None:
        """Capture anew, after as many steps as at the start: the parts of the step have changed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._inputs: Inputs | None = None
        self._rows: Tensor | None = None  # (A, V) float64: the reports of the micro-batches
        self._names: tuple[str, ...] = ()
        self._graded: list[Tensor] = []  # parameters that get a gradient
        self._held: list[Tensor] = []  # those whose gradients are kept between steps, and set to zero
        self._taken, self._capturing = 0, False
        self._micro, self._update = (Recorded(f, self._stream) for f in (self._micro_step, self._update_step))
        self.trainer.optimizer.zero_grad(set_to_none=True)

    @property
    def replaying(self) -> bool:
        """Whether the next step is a replay of graphs."""
        return self._micro.replays and self._update.replays

    @property
    def expendable(self) -> bool:
        """Whether there are graphs that may be freed for other work between two steps: with `auto`."""
        return self.replaying and self.trainer.config.train.capture == "auto"

    def free(self, work: str) -> None:
        """Free the graphs between two steps, as `work` has no memory, and say so; all later steps are launched."""
        self.reason = f"{work} had no memory while graphs kept theirs"
        step = self.trainer.step
        warnings.warn(
            f"train.capture auto: {self.reason}; from step {step} on, steps are launched one by one", stacklevel=3
        )
        self._launch()

    def take(self, batches: Iterator[Loaded]) -> None:
        """One training step, without the moving average. Its report waits on the device for `flush`."""
        trainer, train = self.trainer, self.trainer.config.train
        self.step.fill_(trainer.step)
        self.rate.fill_(learning_rate(trainer.step, train))
        if self._taken == WARM_UP:
            self._settle()
        if self._last_launched:
            self._waits.clear()
            torch.cuda.reset_peak_memory_stats(self.device)
        for micro in range(train.accumulate):
            seed_step(train.seed, trainer.stage.stream, trainer.step, micro, 0)
            self._fill(next(batches))
            row = self._called(self._micro)
            if self._rows is None:
                self._rows = row.new_zeros(train.accumulate, len(row))
            self._rows[micro].copy_(row)
        self._history.append((trainer.step, self._names, self._called(self._update).clone()))
        if self._last_launched:
            self._peak = torch.cuda.max_memory_allocated(self.device)
        self._taken += 1
        if len(self._history) >= READ:
            self.flush()

    def flush(self) -> None:
        """Wait for the device, and hand the reports of all steps since the last call to the trainer's means and checks."""
        trainer, history, self._history = self.trainer, self._history, []
        if not history:
            return
        host = torch.cat([values for *_, values in history]).cpu().split([len(values) for *_, values in history])
        for (step, names, _), values in zip(history, host, strict=True):
            rows, checked = values[:-3].view(-1, len(names)).tolist(), values[-3:]
            sound = not checked[0]
            for row in rows:
                report = dict(zip(names, row, strict=True))
                trainer.since_log.add_numbers(report, sound)
                trainer.since_checkpoint.add_numbers({"flow": report["flow"]}, sound)
            trainer.since_log.add_numbers({"grad_norm": float(checked[2])}, sound)
            trainer.nonfinite.note(step, checked.float())

    def _fill(self, loaded: Loaded) -> None:
        """Copy the stored rows into the buffers."""
        dataset = self.trainer.shards
        if self._inputs is None:
            found = inputs_of(loaded, dataset, self.device)
            features = found.features.clone() if self.trainer.stream.features and found.features is not None else None
            self._inputs = Inputs(found.moments.clone(), map_cond(torch.clone, found.cond), features)
            return
        self._inputs.moments.copy_(loaded.tensors["moments"], non_blocking=True)
        fresh = dataset.condition(loaded.tensors, self.device)
        map_cond(lambda kept, new: kept.copy_(new, non_blocking=True), self._inputs.cond, fresh)
        if self._inputs.features is not None:
            self._inputs.features.copy_(loaded.tensors["features"], non_blocking=True)

    def _micro_step(self) -> Tensor:
        """(V,) float64: loss and report of a micro-batch; the gradients are added to those that are there."""
        assert self._inputs is not None
        batch = draw_batch(self._inputs, self.trainer.shards.manifest.latent_space)
        report = micro_step(self.trainer, batch, self.step, last=True)
        self._names = tuple(report)
        return torch.stack([value.detach().double() for value in report.values()])

    def _update_step(self) -> Tensor:
        """(A V + 3,) float64: the reports of the micro-batches, and what `check_step` finds."""
        assert self._rows is not None
        _, checked = update_step(self.trainer, list(self._rows[:, self._names.index("loss")].float().unbind(dim=0)))
        if self._held:
            torch._foreach_zero_([p.grad for p in self._held if p.grad is not None])
        elif not self._capturing:
            self._graded = [p for p in self.trainer.objective.parameters() if p.grad is not None]
            self.trainer.optimizer.zero_grad(set_to_none=True)
        return torch.cat([self._rows.flatten(), checked.double()])

    @property
    def _last_launched(self) -> bool:
        """Whether this step is the last one before a recording."""
        return self._stream is not None and self._taken == WARM_UP - 1

    def _called(self, function: Recorded) -> Tensor:
        """What it returns. With `auto`, what waits for the device in the last step before the recording is noted: it would end
        that."""
        if not self._last_launched or self.trainer.config.train.capture == "on":
            return function()
        with self.trainer.stream.reading, noted_waits(self._waits):
            return function()

    def _settle(self) -> None:
        """After the warm-up: gradients get their places, and on a GPU both functions are captured.

        Of a single micro-batch the gradients are made within the graph, and overwritten by its next replay; several add up
        in buffers that the update sets to zero.
        """
        train = self.trainer.config.train
        if self._stream is not None and train.capture == "auto" and (reason := too_large(self.device, self._peak)):
            self.reason = reason
        if self.reason is None:
            if train.accumulate > 1:
                self._held = self._graded
                for p in self._held:
                    p.grad = torch.zeros_like(p)
            if self._stream is None:
                return
            try:
                self._capture()
                return
            except RuntimeError as error:
                self._give_up(error)
        # not inside the handler: the frames of the error hold the tensors of the recording
        self._launch()

    def _capture(self) -> None:
        device, self._capturing = self.device, True
        try:
            # the thread that reads ahead leaves the device alone
            with self.trainer.stream.reading, recordings(device, self._waits):
                pool = torch.cuda.graph_pool_handle()
                for function in (self._micro, self._update):
                    function.capture(pool)
        finally:
            self._capturing = False
        self.transient = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)

    def _give_up(self, error: RuntimeError) -> None:
        """With `auto`, say why steps are launched from now on. `NotCaptured` with `on`, and where torch cannot go on.

        With `on`, out of memory in a recording that could be ended is raised as it is, and both graphs are freed: the caller
        says what fits. Where CUDA ended it, nothing can be tried any more in this process: `NotCaptured`.
        """
        reason, wanted = first_line(error), self.trainer.config.train.capture
        if isinstance(error, torch.OutOfMemoryError) and wanted == "on":
            self.crowded = True
            self._launch()
            raise error
        if wanted == "on" or isinstance(error, Invalidated):
            raise NotCaptured(
                f"train.capture {wanted}: the step cannot be recorded as a graph ({reason}); the same command with "
                "--train.capture off continues from the last checkpoint",
                f"CUDA ended the recording of the step as a graph ({reason}), after which torch cannot go on"
                if wanted == "auto"
                else "",
            ) from error
        warnings.warn(f"train.capture: the step is not captured, and goes on without a graph: {reason}", stacklevel=2)
        self.reason = reason

    def _launch(self) -> None:
        """Forget what was recorded; both functions are called from now on. All memory of the graphs and gradients is freed.

        Call it between two steps.
        """
        torch.cuda.synchronize(self.device)
        self._stream, self._held = None, []
        for function in (self._micro, self._update):
            function.release()
        for p in self._graded:  # they are made within the graph
            p.grad = None
        gc.collect()
        torch.cuda.empty_cache()
