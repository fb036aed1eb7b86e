"""One stage of training, on accelerate. It uses an `Objective` and names no method.

The step: seed from (seed, step) → moments ⇒ latents → objective → backward → clip → AdamW → EMA (`training_step.py`;
captured: `captured_step.py`). No part of it waits for the device; values are read when a line is logged.
Shape legend: N batch, (C, H, W) latent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import IMPORTED
from selftrans.config import RunConfig
from selftrans.data.dataset import Dataset
from selftrans.data.held_out import held_out_rows
from selftrans.methods.guidance import Frozen
from selftrans.methods.objective import Objective
from selftrans.methods.registry import objective_of
from selftrans.methods.spec import Stage
from selftrans.models.compiling import compile_model
from selftrans.progress import progress_bar
from selftrans.train import checkpointing, fp8, fsdp
from selftrans.train.batches import Loaded, Stream, derived_seed
from selftrans.train.captured_step import captured_step
from selftrans.train.ema import EMA
from selftrans.train.flops import flops_until, step_flops
from selftrans.train.held_out_loss import HeldOutLoss
from selftrans.train.initial_weights import InitialWeights, build_student
from selftrans.train.log import JsonlLog, RunningMeans, format_values
from selftrans.train.memory_use import memory_use
from selftrans.train.nonfinite import NonFiniteSteps, check_weights, with_remedy
from selftrans.train.optim import build_optimizer, forget, learning_rate
from selftrans.train.out_of_memory import between_steps, guarded_step
from selftrans.train.preview import Preview
from selftrans.train.processes import check_same, distributed
from selftrans.train.resume import changed_since, check_data, checkpoint_errors, common_checkpoint
from selftrans.train.signals import StopSignal
from selftrans.train.teachers import check_teacher
from selftrans.train.trackers import Trackers
from selftrans.train.training_step import launched_step
from selftrans.types import check_takes


class Trainer:
    """Trains one stage in `directory`, from its newest valid checkpoint if there is one.

    Args:
        accelerator: device, precision and processes; shared by the stages of a run.
        config: of the run. The attribute `run_config` keeps it; the attribute `config` has the stage's own settings in it.
        stage: the stage to train. directory: `<run>/<stage.name>`.
        shards: the data. order: names of the run's stages; default: this one alone.
        teacher: frozen model or encoder, if the stage has one. initial: the weights to start from; default: random ones.
        preview: makes the previews. trackers: where log lines and previews are shown, besides the run directory.
        stop: the stop signals. bar: makes the progress bar (tqdm's interface).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: RunConfig,
        stage: Stage,
        directory: Path,
        shards: Dataset,
        *,
        order: Sequence[str] = (),
        teacher: Any = None,
        initial: InitialWeights | None = None,
        preview: Preview | None = None,
        trackers: Trackers | None = None,
        stop: StopSignal | None = None,
        bar: Callable[..., Any] = progress_bar,
    ) -> None:
        self.accelerator, self.stage, self.directory = accelerator, stage, directory
        self.run_config, self.config = config, config.override(stage.settings)
        self.shards, self.teacher, self.initial, self.preview = shards, teacher, initial, preview
        self.order, self.trackers, self.stop, self.bar = order or [stage.name], trackers, stop or StopSignal(), bar
        self.step, self.seconds = 0, 0.0
        self.since_log = RunningMeans()  #: since the last log line
        self.since_checkpoint = RunningMeans()  #: since the last checkpoint that was due
        self.changed: list[str] = []  #: settings that were changed here, for the next log line
        self.due = False  #: whether a checkpoint is due, but not written yet
        self.origin: dict[str, Any] = {}  #: of imported weights: where they came from
        if teacher is not None:  # each process has loaded it by itself
            check_same("teacher weights", str(teacher.source.get("weights")))
        found = common_checkpoint(self.checkpoints, accelerator)
        self._build(fresh=found is None)
        self._restore(found)
        asked = self.config.train.compile
        self.compiled = accelerator.device.type == "cuda" if asked is None else asked
        if self.compiled:
            self._compile()
        self._wrap()
        self.captured = captured_step(self)

    def _build(self, *, fresh: bool) -> None:
        """What steps work on: student and guidances (with initial weights, if `fresh`), average, batches, optimiser."""
        train, accelerator = self.config.train, self.accelerator
        self.objective = self._new_objective(fresh=fresh)
        self.ends = [g.until_step for g in self.objective.guidances]
        self.ema = EMA(self.objective.student, train.ema)
        self.objective.watch(self.ema.model)
        self.stream = self._new_stream()
        self.held_out = None if self.stream.held_out is None else HeldOutLoss(self, self.stream.held_out)
        self.nonfinite = NonFiniteSteps(train.max_skips, self.stream.all_indices)
        micros = train.batch_size // self.stream.micro
        each = step_flops(self.objective, self.shards.manifest.conditions.example(), self.stream.micro)
        self.flops = {part: micros * flops for part, flops in each.items()}
        # the average, and the count of operations, do not use it
        fp8.convert(self.objective.student, train.fp8, accelerator.device, self.stream.micro)
        self.sharded = train.shard and accelerator.num_processes > 1
        if self.sharded:
            fsdp.shard_models(
                self.objective, self.ema.model, device=accelerator.device, processes=accelerator.num_processes
            )
            self.ema.follow(self.objective.student)
        self.memory = memory_use(self.objective, self.ema.model, self.teacher, train.optimizer)
        self.optimizer = build_optimizer(self.objective, train)

    def _new_objective(self, *, fresh: bool) -> Objective:
        """The student with initial weights, if `fresh`, and its guidances, on the device."""
        train, shards = self.config.train, self.shards
        torch.manual_seed(derived_seed(train.seed, self.stage.stream))
        student = build_student(self.config, shards, self.initial, fresh=fresh)
        for shape in shards.shapes if len(shards.shapes) > 1 else ():
            check_takes(student, shape)
        guidances = self.stage.guide(student, self.teacher)
        return objective_of(self.config, student, guidances).to(self.accelerator.device)

    def _new_stream(self) -> Stream:
        train, accelerator = self.config.train, self.accelerator
        return Stream(
            self.shards,
            batch_size=train.batch_size,
            accumulate=train.accumulate,
            seed=derived_seed(train.seed, self.stage.stream, 1),
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            window=self.config.data.window,
            held_out=held_out_rows(self.shards, self.config.data.held_out),
        )

    def _compile(self) -> None:
        """Compile the blocks of the student and of its teacher.

        Shapes are fixed: the student's batch, and as many samples as a guidance selects. Independent times select a
        different number at each step, so the batch of the teacher is dynamic there.
        """
        compile_model(self.objective.student)
        if isinstance(self.teacher, Frozen):
            compile_model(self.teacher.model, dynamic=False if self.objective.even else None)

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def run(self) -> None:
        """Train to the last step, with a checkpoint of it. `Interrupted` after a stop signal, checkpoint written."""
        main = self.accelerator.is_main_process
        self.changed = changed_since(self.directory.parent, self.stage.name, self.step) if self.step else []
        if self.changed:  # a mean over steps before and after it would be of two quantities
            self.since_log.clear()
            self.since_checkpoint.clear()
        journal = JsonlLog(self.directory / "log.jsonl", resume_step=self.step) if main else None
        bar = self.bar(total=self.stage.steps, initial=self.step, desc=self.stage.name, unit="step", disable=not main)
        try:
            self._preview(self.step == self.stage.steps, again=True)
            batches = self.stream.from_step(self.step, pin=self.accelerator.device.type == "cuda")
            compiles = self.compiled  # whether the next step does
            while self.step < self.stage.steps:
                if compiles:
                    bar.set_postfix({"compiling": "the first step takes longer"})
                started = time.perf_counter()
                guarded_step(self, batches)
                took = time.perf_counter() - started
                self.seconds += took
                if compiles:
                    bar.set_postfix({"first step, compiled": f"{took:.1f} s"}, refresh=False)
                compiles = False
                bar.update()
                self._after_step(journal, bar)
            if self.held_out and not self.held_out.found:  # there was no step left
                self.held_out.measure()
        except FloatingPointError:
            if journal:
                journal.write({"stage": self.stage.name, "step": self.step, **self.nonfinite.pop_report()})
            raise
        finally:
            bar.close()
            if journal:
                journal.close()
        if main:  # it reads the files of the checkpoint, which other machines may not see yet
            found = checkpoint.newest(self.checkpoints)
            assert found is not None and found.step == self.step
            checkpointing.prune(self)  # an earlier process may have been killed between its last checkpoint and this

    def train_step(self, batches: Iterator[Loaded]) -> None:
        """One step with the moving average. Heads and teachers of guidance that ends with it are removed."""
        self.wrapped.train()
        if self.captured:
            self.captured.take(batches)
        else:
            launched_step(self, batches)
        self.step += 1
        self.ema.update(self.step)
        if self._retire():
            self._wrap()
            if self.captured:
                self.captured.restart()

    def _retire(self) -> bool:
        """Remove heads and teachers of guidance that has ended from the step, the memory and the checkpoints."""
        ended = self.objective.retire(self.step)
        self.stream.features = any(g.reads_features for g in self.objective.guidances)
        if ended:
            forget(self.optimizer, self.objective)
            fsdp.release(self.objective)
            held = (value for guidance in self.objective.guidances for value in vars(guidance).values())
            if not any(value is self.teacher for value in held):
                self.teacher = None
        return ended

    def _after_step(self, journal: JsonlLog | None, bar: Any) -> None:
        """Write a log line, a checkpoint and a preview where they are due at this step; stop after a stop signal."""
        config, last = self.config, self.step == self.stage.steps
        stopping = self.stop.asked(self.accelerator)
        if self.step % config.log.every == 0 or last:
            self._log(journal, bar, measure=last or not stopping)
        self.due |= self.step % config.train.checkpoint_every == 0
        if last or stopping or self.due:
            if journal:
                journal.sync()
            self._save(required=last or stopping)
        if stopping and not last:  # without measuring and preview: there may only be time for the checkpoint
            raise self.stop.interrupted(self.step, self.directory)
        self._preview(last)

    def _preview(self, last: bool, *, again: bool = False) -> None:
        """Make a preview if one is due at this step; `again`: after a restart at this step."""
        every, path = self.config.train.preview_every, self.directory / "previews" / f"step-{self.step:08d}.png"
        if self.preview and self.step and (self.step % every == 0 or last):
            manifest = self.shards.manifest
            model = fsdp.gather_model(
                self.ema.model, lambda: self.config.build_model(manifest.shape, manifest.conditions)
            )
            if self.accelerator.is_main_process:
                self.preview.save(model, path, again=again, attempt=partial(between_steps, self, "a preview"))
                if self.trackers:
                    self.trackers.picture(self.stage.name, path, self.step)

    def _read(self) -> None:
        """Wait for the device and count the skipped updates; the time counts as training time."""
        started = time.perf_counter()
        if self.captured:
            self.captured.flush()
        try:
            self.nonfinite.sync(self.stage.name)
        except FloatingPointError as error:
            raise with_remedy(error, self.checkpoints) from None
        self.seconds += time.perf_counter() - started

    def _means(self, running: RunningMeans) -> dict[str, float]:
        """Means over steps and processes, without skipped updates."""
        means = self.accelerator.reduce(running.means(), reduction="mean")
        return {name: value for name, mean in means.items() if np.isfinite(value := float(mean))}

    def _log(self, journal: JsonlLog | None, bar: Any, *, measure: bool) -> None:
        """Write a log line of the steps since the last one; `measure`: with the loss of held-out samples, where it is due."""
        self._read()
        values = self._means(self.since_log)
        self.since_log.clear()
        # no training time
        measured = self.held_out.measure() if measure and self.held_out and self.held_out.due() else {}
        skips = self.nonfinite.pop_report()
        if journal is None:
            return
        rate = learning_rate(self.step - 1, self.config.train)
        self.nonfinite.check_norms(values, self.step)
        changed, self.changed = self.changed, []
        line = {"stage": self.stage.name, "step": self.step, **values, **measured, "lr": rate, **skips}
        line |= {"changed": changed} if changed else {}
        journal.write(line | {"seconds": round(self.seconds, 3), "tflops": self.total_flops() / 1e12})
        shown = values | (self.held_out.found if self.held_out else {})
        bar.set_postfix(format_values({k: v for k, v in shown.items() if k != "grad_norm"}), refresh=False)
        if self.trackers:
            self.trackers.log(self.stage.name, values | measured, self.step, changed)

    def total_flops(self) -> int:
        """Operations of this stage so far: student, heads and teacher; of imported weights since the import."""
        begun = int(self.origin.get(IMPORTED, {}).get("steps", 0))
        return flops_until(self.step, self.flops, self.ends, begun)

    def _wrap(self) -> None:
        """(Re)wrap the objective for the processes of the run; also after its parameters have changed."""
        self.wrapped = self.objective if self.sharded else distributed(self.objective, self.accelerator)

    def _save(self, *, required: bool) -> None:
        """Write a checkpoint; while updates are skipped only if it is `required`, as the run ends here."""
        self._read()
        if self.nonfinite.in_a_row and not required:
            return  # `due` stays true, so that the next finite step writes it
        self._check_weights()
        checkpointing.write(self, self._means_to_keep(), required=required)

    def _check_weights(self) -> None:
        """FloatingPointError, with the remedy, unless all weights are finite."""
        where = f"step {self.step} of {self.stage.name}"
        try:
            between_steps(self, "a checkpoint", lambda: check_weights(list(self.objective.parameters()), where))
        except FloatingPointError as error:
            raise with_remedy(error, self.checkpoints) from None

    def _means_to_keep(self) -> dict[str, Any]:
        """The running means for a checkpoint; those since the last one that was due begin anew at one that is due.

        In a checkpoint, `window` has the means since the last log line, `span` those since the last checkpoint that was due.
        """
        since_log = self.since_log.state(self.accelerator)
        flow = None  # of a checkpoint between two that are due: the mean of a few steps would be noise
        if self.due:
            flow = self._means(self.since_checkpoint).get("flow")
            self.since_checkpoint.clear()
            self.due = False
        return {"window": since_log, "flow": flow, "span": self.since_checkpoint.state(self.accelerator)}

    def _restore(self, found: checkpoint.Checkpoint | None) -> None:
        """Continue from the newest valid checkpoint of the stage. Order and noise follow from the step."""
        if found:
            self.step = found.step
            with checkpoint_errors(found):
                check_data(found, self.shards.manifest)
                check_teacher(found, self.teacher)
                self.origin = {key: value for key, value in found.state.items() if key == IMPORTED}
        self._retire()  # a checkpoint has no tensors of guidance that has ended
        if found:
            with checkpoint_errors(found, ValueError):
                checkpointing.load(self, found)
