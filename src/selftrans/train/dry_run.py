"""`selftrans train --dry-run`: every stage built and trained for a few steps, and what the run will take; nothing is kept.

All files are written to a temporary folder; the run folder is only read. In place of a teacher that is not trained yet there is
one with random weights: its cost is the same.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import release_memory

from selftrans.checkpoints import format as checkpoint
from selftrans.config import RunConfig
from selftrans.data.buckets import is_prepared
from selftrans.data.dataset import Dataset
from selftrans.data.held_out import held_out_rows
from selftrans.device import memory_total
from selftrans.messages import plural
from selftrans.methods.guidance import Frozen
from selftrans.methods.registry import config_of_teacher
from selftrans.methods.spec import RESERVED_FOLDERS, Stage
from selftrans.plugins import trust_named
from selftrans.precision import PRECISIONS
from selftrans.progress import progress_bar
from selftrans.storage import nearest_existing
from selftrans.train import checkpointing
from selftrans.train.batches import Loaded
from selftrans.train.capture_rules import ENDED, NotCaptured, description
from selftrans.train.dry_run_report import DryRun, StagePlan
from selftrans.train.initial_weights import build_student
from selftrans.train.out_of_memory import guarded_step, release
from selftrans.train.processes import accelerator_of
from selftrans.train.run import planned
from selftrans.train.run_data import data_of_run, describe_data, ready_data, transfer_of
from selftrans.train.teachers import teacher_of
from selftrans.train.trackers import tracker_names
from selftrans.train.trainer import Trainer

STEPS = 5  #: of each stage; the first is not timed, as it compiles and fills caches
FEWEST, LIMIT = 2, 60.0  #: a single process begins no further step of a stage after so many steps and seconds in them
#: operations of a micro-batch above which a CPU takes steps of fewer samples, and the fewest of these
CPU_FLOPS, FEWEST_SAMPLES = 4e11, 2


def dry_run(config: RunConfig, out: str | Path, *, steps: int = STEPS, typed: Collection[str] = ()) -> DryRun:
    """Build every stage of the run `out`, take `steps` steps of each, and return what the run takes. `typed`: see `train`.

    A single process begins no further step of a stage after `FEWEST` steps and `LIMIT` seconds. Where a step takes long on a
    CPU, steps have fewer samples, of two sizes, from which time and memory of the whole batch are extrapolated. Where graphs of
    `train.capture auto` would end the process, a new process takes the steps without graphs; a run does the same when it is
    continued.

    ValueError as `train`; MemoryError (one line, with the remedy) where a step does not fit.
    """
    try:
        return _dry_run(config, Path(out), steps, typed)
    except NotCaptured as error:
        if not error.reason:
            raise
        message, reason = str(error), error.reason
    # not inside the handler: the frames of the error hold the tensors of the step
    gc.collect()
    with contextlib.suppress(RuntimeError):  # after a recording that CUDA has ended
        torch.cuda.empty_cache()
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            launched = config.override({"train.capture": "off"})
            found = pool.submit(_dry_run, launched, Path(out), steps, typed).result()
    except BrokenProcessPool:  # for example a script without `if __name__ == "__main__"`
        raise NotCaptured(message) from None
    for stage in found.stages:
        stage.capture = (
            f"launched one by one: {reason}; the run ends once at this point, and uses no graphs when it is continued"
        )
    return found


def _dry_run(config: RunConfig, out: Path, steps: int, typed: Collection[str]) -> DryRun:
    trust_named(config.method, config.model.name)
    config = config.restricted().check()
    with tempfile.TemporaryDirectory(prefix="selftrans-dry-run-") as folder:
        place = Path(folder)
        if (out / ENDED).exists():
            (place / ENDED).touch()
        accelerator = accelerator_of(config, place)
        shards = data_of_run(config, out if is_prepared(out / "data") else place)  # each process its own
        config, plan, initial = planned(config, shards, out, typed)
        if line := describe_data(config, shards):
            accelerator.print(line)
        device = accelerator.device
        all_shards, shards = shards, ready_data(config, shards.dry_run_data(), accelerator, quiet=True)
        found = DryRun(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            memory_total=memory_total(device),
            samples=len(shards),
            held_out=0 if (held_out := held_out_rows(all_shards, config.data.held_out)) is None else len(held_out),
            batch_size=config.train.batch_size,
            micro_batch=config.train.batch_size // (config.train.accumulate * accelerator.num_processes),
            disk_needed=0,
            disk_free=shutil.disk_usage(nearest_existing(out)).free,
            out=str(out),
            written=_written(config, plan),
        )
        for stage in plan:
            teacher = _teacher(config, stage, out, shards, accelerator)
            trainer = Trainer(accelerator, config, stage, place / stage.name, shards, teacher=teacher, initial=initial)
            found.stages.append(_measured(trainer, out, steps))
            release(trainer)
            del trainer, teacher
            release_memory()
        found.fetched = transfer_of(config, all_shards)
        found.disk_needed = sum(s.kept * s.checkpoint for s in found.stages)
        found.disk_needed += max(s.checkpoint for s in found.stages)
    return found


def _teacher(config: RunConfig, stage: Stage, out: Path, shards: Dataset, accelerator: Accelerator) -> Any:
    """The teacher of the stage, or one with random weights where the run has not trained it yet."""
    spec = stage.teacher
    if spec is None or spec.given or checkpoint.newest(out / spec.stage / "checkpoints"):
        return teacher_of(config, stage, str(out), shards, accelerator.device)
    model = build_student(config_of_teacher(config, stage), shards, None, fresh=True)
    return Frozen(model, spec.block(model.depth), dtype=PRECISIONS[config.train.precision], in_place=True)


def _measured(trainer: Trainer, out: Path, steps: int) -> StagePlan:
    """Take a few steps of a stage; what it takes in the run `out`."""
    stage, micro, samples = trainer.stage, trainer.stream.micro, _samples(trainer)
    untimed = trainer.captured.untimed if trainer.captured else 1  # these compile, and capture
    seconds, peaks = _steps_taken(trainer, min(steps + untimed - 1, stage.steps), samples)
    each, peak = statistics.median(seconds[untimed:] or seconds[1:] or seconds), max(peaks)
    if samples < micro:
        each = _extrapolated(seconds, samples, micro)
        peak = round(peaks[0] + max(0, peaks[-1] - peaks[0]) * (micro - samples) / samples)
    reached = max((step for step, _ in checkpoint.steps(out / stage.name / "checkpoints")), default=0)
    student, objective = trainer.objective.student, trainer.objective
    return StagePlan(
        name=stage.name,
        parameters=sum(p.numel() for p in student.parameters()),
        trained=sum(p.numel() for p in objective.parameters() if p.requires_grad),
        steps=stage.steps,
        reached=reached,
        tflops_per_step=sum(trainer.flops.values()) / 1e12,
        seconds_per_step=each,
        seconds_left=each * (stage.steps - reached),
        memory=trainer.memory,
        peak=peak,
        samples=samples,
        checkpoint=checkpointing.bytes_of(trainer.memory),
        kept=checkpointing.kept_checkpoints(trainer.config.train, stage.steps),
        capture=description(trainer),
    )


def _steps_taken(trainer: Trainer, count: int, samples: int) -> tuple[list[float], list[int]]:
    """(seconds, peak of the memory in bytes) of each of at most `count` steps.

    They have micro-batches as in the run or, where `samples` are fewer, of `samples` and of twice as many in turn.
    """
    device, micro = trainer.accelerator.device, trainer.stream.micro
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    batches = trainer.stream.from_step(0, pin=device.type == "cuda")
    seconds: list[float] = []
    peaks: list[int] = []
    title, hidden = f"{trainer.stage.name}: {plural(count, 'step')}", not trainer.accelerator.is_main_process
    limit = LIMIT if trainer.accelerator.num_processes == 1 else float("inf")  # several take the same number of steps
    with progress_bar(total=count, desc=title, unit="step", mininterval=0, leave=False, disable=hidden) as bar:
        while len(seconds) < count and (len(seconds) < FEWEST or sum(seconds) < limit):
            rows = micro if samples == micro else samples * (1 + len(seconds) % 2)
            started = time.perf_counter()
            guarded_step(trainer, _first_rows(batches, rows))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
            peaks.append(_peak(device))
            bar.update()
    return seconds, peaks


def _samples(trainer: Trainer) -> int:
    """Samples of each micro-batch in the measured steps; fewer than in the run where a single process on a CPU is slow."""
    micro, alone = trainer.stream.micro, trainer.accelerator.num_processes == 1
    flops = sum(trainer.flops.values()) / max(1, trainer.config.train.batch_size) * micro
    if trainer.accelerator.device.type != "cpu" or not alone or trainer.captured or flops <= CPU_FLOPS:
        return micro
    few = max(FEWEST_SAMPLES, int(micro * CPU_FLOPS / flops))
    return few if 2 * few < micro else micro


def _first_rows(batches: Iterator[Loaded], count: int) -> Iterator[Loaded]:
    """Each micro-batch with its first `count` rows only."""
    for rows, tensors in batches:
        yield Loaded(rows[:count], {name: tensor[:count] for name, tensor in tensors.items()})


def _extrapolated(seconds: list[float], samples: int, micro: int) -> float:
    """Seconds of a step with `micro` samples, from steps of `samples` and twice as many in turn, of which the first is a
    warm-up; a step costs a fixed time, that of the optimizer, and a time for each sample."""
    if len(seconds) == 1:  # a stage of one step
        return seconds[0] * micro / samples
    large, small = statistics.median(seconds[1::2]), min(seconds[2::2], default=None)
    if small is None or small >= large:
        return large * micro / (2 * samples)
    return small + (large - small) / samples * (micro - samples)


def _written(config: RunConfig, plan: list[Stage]) -> list[str]:
    """What a run writes, relative to its folder."""
    names = ["config.json, data.json, run.json: settings, data and cost"]
    if config.data.path is None:
        names.append("data/: the built-in data, prepared")
    for stage in plan:
        names.append(f"{stage.name}/log.jsonl: a line {_every(config.log.every)}")
        names.append(f"{stage.name}/checkpoints/: {_every(config.train.checkpoint_every)}")
        if config.train.preview_every:
            names.append(f"{stage.name}/previews/: a sheet of samples {_every(config.train.preview_every)}")
    return names + [f"{name}/" for name in tracker_names(config) if name in RESERVED_FOLDERS]


def _every(steps: int) -> str:
    return "every step" if steps == 1 else f"every {steps} steps"


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
