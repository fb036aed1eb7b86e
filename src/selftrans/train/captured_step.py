"""The captured step: the functions of `training_step.py` on static buffers, recorded as CUDA graphs and replayed.

    per micro-batch  seed -> copy the stored rows into the buffers -> replay: draws, forward, backward
    per step         replay: clip, is it finite?, AdamW -> moving average (a foreach kernel, outside of the graphs)

A step is in one of these phases. All transitions are in `CapturedStep` between the comments "phases" and "a step":

    phase        the next one      when
    WARMING_UP   MEASURED          its first steps are taken, which compile and allocate
    MEASURED     RECORDING         its step is taken: what it waits for, and how much memory it needs, is known
    RECORDING    REPLAYING         both functions are recorded
                 LAUNCHED          with `auto`, where they cannot be recorded or would keep too much memory: `reason`
                 the run ends      likewise with `on`, and where CUDA ended the recording, after which torch cannot go on
    REPLAYING    LAUNCHED          with `auto`, where other work between two steps has no memory: `reason`
    all others   WARMING_UP        a guidance has ended: the step has other parts (`restart`)
    LAUNCHED     -                 for good; on a CPU from the start

The draws come from torch's default generator, which is seeded before every micro-batch as in the uncaptured step; a replayed
graph starts at the generator's seed, so that the numbers are the same. Nothing is read by the host until `flush`. In every
phase the same functions work on the same buffers.
Shape legend: A micro-batches of a step, V values of a report.
"""

from __future__ import annotations

import contextlib
import enum
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


class Phase(enum.Enum):
    """How a step is taken; see the table above."""

    WARMING_UP = enum.auto()  #: launched, on the stream of the graphs
    MEASURED = enum.auto()  #: likewise, the last of these steps
    RECORDING = enum.auto()  #: nothing runs: both functions are called once while CUDA records
    REPLAYING = enum.auto()  #: the graphs are replayed
    LAUNCHED = enum.auto()  #: launched as without graphs


class CapturedStep:
    """Takes the steps of a trainer on static buffers; those after the first `WARM_UP` are replays of graphs (on a GPU).

    Attributes:
        phase: of the next step, or of the one that is taken.
        reason: why the steps are launched for good, with `auto`; None before that is known, and where they are replayed.
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
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None  #: None: steps are launched
        self.reason: str | None = None
        self.transient = 0
        self._peak = 0  #: bytes of the device at most in the measured step
        self._waits: list[str] = []  #: where the measured step has waited for the device
        self._history: list[tuple[int, tuple[str, ...], Tensor]] = []
        self.restart()

    # ---- phases

    def restart(self) -> None:
        """Begin anew, as at the start of a stage: the parts of the step have changed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.phase = Phase.LAUNCHED if self._stream is None else Phase.WARMING_UP
        self._taken = 0  #: steps since then
        self._inputs: Inputs | None = None
        self._rows: Tensor | None = None  # (A, V) float64: the reports of the micro-batches
        self._names: tuple[str, ...] = ()
        self._graded: list[Tensor] = []  # parameters that get a gradient
        self._held: list[Tensor] = []  # those whose gradients are kept between steps, and set to zero
        self._micro, self._update = (Recorded(f, self._stream) for f in (self._micro_step, self._update_step))
        self.trainer.optimizer.zero_grad(set_to_none=True)

    def _begin_step(self) -> None:
        """Enter the phase of the step that is taken now."""
        if self.phase is Phase.WARMING_UP and self._taken == WARM_UP - 1:
            self.phase = Phase.MEASURED
        elif self.phase is Phase.MEASURED:
            self.phase = Phase.RECORDING
            if self._recorded():
                self.phase = Phase.REPLAYING
            else:  # not inside a handler: the frames of an error hold the tensors of the recording
                self._launch()

    def _recorded(self) -> bool:
        """Whether both functions are recorded; else `reason` says why not. For errors see `_give_up`."""
        asked = self.trainer.config.train.capture == "on"
        if not asked and (reason := too_large(self.device, self._peak)):
            self.reason = reason
            return False
        self._hold_gradients()
        try:
            # the thread that reads ahead leaves the device alone
            with self.trainer.stream.reading, recordings(self.device, self._waits):
                pool = torch.cuda.graph_pool_handle()
                for function in (self._micro, self._update):
                    function.capture(pool)
        except RuntimeError as error:
            self._give_up(error)
            return False
        self.transient = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)
        return True

    def _hold_gradients(self) -> None:
        """Give gradients the places in which graphs find them.

        Of a single micro-batch they are made within the graph, and overwritten by its next replay; several add up in buffers
        that the update sets to zero.
        """
        if self.trainer.config.train.accumulate > 1:
            self._held = self._graded
            for p in self._held:
                p.grad = torch.zeros_like(p)

    def _give_up(self, error: RuntimeError) -> None:
        """With `auto`, say why steps are launched from now on. `NotCaptured` with `on`, and where torch cannot go on.

        With `on`, out of memory in a recording that could be ended is raised as it is, and both graphs are freed: the caller
        says what fits. Where CUDA ended it, nothing can be tried any more in this process: `NotCaptured`.
        """
        reason, wanted = first_line(error), self.trainer.config.train.capture
        if isinstance(error, torch.OutOfMemoryError) and wanted == "on":
            self._free()
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

    @property
    def replaying(self) -> bool:
        """Whether the next step is a replay of graphs."""
        return self.phase is Phase.REPLAYING

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

    def _launch(self) -> None:
        """Launch all later steps, without what was recorded."""
        self._free()
        self.phase = Phase.LAUNCHED

    def _free(self) -> None:
        """Free all memory of the graphs, and the gradients, which are made within them. Call it between two steps."""
        torch.cuda.synchronize(self.device)
        self._stream, self._held = None, []
        for function in (self._micro, self._update):
            function.release()
        for p in self._graded:
            p.grad = None
        gc.collect()
        torch.cuda.empty_cache()

    # ---- a step

    def take(self, batches: Iterator[Loaded]) -> None:
        """One training step, without the moving average. Its report waits on the device for `flush`."""
        trainer, train = self.trainer, self.trainer.config.train
        self.step.fill_(trainer.step)
        self.rate.fill_(learning_rate(trainer.step, train))
        self._begin_step()
        with self._measured() if self.phase is Phase.MEASURED else contextlib.nullcontext():
            for micro in range(train.accumulate):
                seed_step(train.seed, trainer.stage.stream, trainer.step, micro, 0)
                self._fill(next(batches))
                row = self._called(self._micro)
                if self._rows is None:
                    self._rows = row.new_zeros(train.accumulate, len(row))
                self._rows[micro].copy_(row)
            self._history.append((trainer.step, self._names, self._called(self._update).clone()))
        self._taken += 1
        if len(self._history) >= READ:
            self.flush()

    @contextlib.contextmanager
    def _measured(self) -> Iterator[None]:
        """Around the last step before the recording: how much memory it takes, and (by `_called`) what it waits for."""
        self._waits.clear()
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        self._peak = torch.cuda.max_memory_allocated(self.device)

    def _called(self, function: Recorded) -> Tensor:
        """What it returns. With `auto`, what waits for the device in the measured step is noted: it would end a recording."""
        if self.phase is not Phase.MEASURED or self.trainer.config.train.capture == "on":
            return function()
        with self.trainer.stream.reading, noted_waits(self._waits):
            return function()

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
        if self.phase is not Phase.RECORDING:
            self._graded = [p for p in self.trainer.objective.parameters() if p.grad is not None]
            self.trainer.optimizer.zero_grad(set_to_none=True)
        elif self._held:
            torch._foreach_zero_([p.grad for p in self._held if p.grad is not None])
        return torch.cat([self._rows.flatten(), checked.double()])
