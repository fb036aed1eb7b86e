"""A complete run: the stages of a method in order, in one directory, continued where they stopped.

RUN/config.json   the complete configuration          RUN/data.json   manifest of the data it was trained on
RUN/<stage>/      checkpoints, previews, log.jsonl     RUN/run.json    student steps and total compute
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.adapted import INIT
from selftrans.checkpoints.load import REPORT
from selftrans.config import RunConfig
from selftrans.data.buckets import is_prepared, open_data
from selftrans.data.dataset import Dataset
from selftrans.data.manifest import Manifest
from selftrans.data.on_device import OnDevice
from selftrans.data.prepare import prepare_builtin
from selftrans.encoders.identity import scales_differ
from selftrans.messages import escaped, plural
from selftrans.methods.registry import meta_objective, stages
from selftrans.methods.spec import Stage
from selftrans.plugins import trust_named
from selftrans.storage import lock_file, remove_stale_temporaries, removed_if_refused, write_json
from selftrans.train.capture_rules import description, remembered
from selftrans.train.data_window import cache_of, describe_data, with_window
from selftrans.train.fitting import describe
from selftrans.train.initial_weights import InitialWeights, initial_weights, resolve_init
from selftrans.train.log import progress_bar
from selftrans.train.memory_use import memory_line
from selftrans.train.preview import Preview, with_prompts
from selftrans.train.processes import keep_memory, process_group_options, reporting_lost_processes
from selftrans.train.resume import record, settings_before, settle
from selftrans.train.signals import StopSignal
from selftrans.train.teachers import teacher_of, training_cost
from selftrans.train.trackers import Trackers
from selftrans.train.trainer import Trainer


def train(
    config: RunConfig,
    out: str | Path,
    *,
    bar: Callable[..., Any] = progress_bar,
    quiet: bool = False,
    typed: Collection[str] = (),
) -> dict[str, Any]:
    """Train `config` in the directory `out`; repeating the call continues it. Returns what run.json holds.

    A teacher given by the settings (a run or a weights file) replaces the stages before the one that it teaches.
    `bar` makes the progress bars, `quiet` leaves out the line of each stage. `typed`: names of settings that were given
    explicitly, such as model.depth: a run on given weights (`init`) refuses those that its weights do not have.
    ValueError for errors that the user can correct; `Interrupted` after a stop signal, with a checkpoint written.
    """
    trust_named(config.method, config.model.name)
    with reporting_lost_processes():
        return _train(config, Path(out), bar, quiet, typed)


def _train(
    config: RunConfig, out: Path, bar: Callable[..., Any], quiet: bool, typed: Collection[str]
) -> dict[str, Any]:
    config = config.restricted().check()
    if is_prepared(out):
        raise ValueError(f"{out} holds prepared data; choose another --out for the run")
    accelerator = accelerator_of(config, out)
    main = accelerator.is_main_process
    if accelerator.device.type == "cpu":
        keep_memory()
    new = [path for path in (out / "data", out / ".lock", out) if main and not path.exists()]
    with (
        lock_file(out / ".lock") if main else contextlib.nullcontext(),
        removed_if_refused(new, keep=out / "config.json"),
        StopSignal() as stop,
        contextlib.closing(Trackers(out)) as trackers,
    ):
        if main:
            _remove_unfinished(out)
        shards = data_of_run(config, out, accelerator)
        config, plan, initial = planned(config, shards, out, typed)
        shards = ready_data(config, shards, accelerator, quiet=quiet)
        preview = Preview(config, shards, accelerator.device, stop) if config.train.preview_every else None
        spent: list[dict[str, Any]] = []
        for number, stage in enumerate(plan, start=1):
            trainer = Trainer(
                accelerator,
                config,
                stage,
                out / stage.name,
                shards,
                order=[stage.name for stage in plan],
                # without a variable of its own, so that its memory is freed when the guidance ends
                teacher=teacher_of(config, stage, str(out), shards, accelerator.device),
                initial=initial,
                preview=preview,
                trackers=trackers if main else None,
                stop=stop,
                bar=bar,
            )
            if number == 1:  # nothing is written before the first trainer is built
                began = _begin(config, plan, out, shards.manifest, accelerator, initial)
                if initial and began and not quiet:
                    accelerator.print(describe(initial.record))
                if main:
                    trackers.start(config)
            trackers.begin(sum(earlier["steps"] for earlier in spent))
            if not quiet:
                accelerator.print(_announce(trainer, number, len(plan)))
            with remembered(out):
                trainer.run()
            spent.append(_spent(trainer))
            del trainer
            accelerator.free_memory()
        report = _report(config, plan, spent, initial)
        if main:
            write_json(out / REPORT, report)
    return report


def planned(
    config: RunConfig, shards: Dataset, out: Path, typed: Collection[str]
) -> tuple[RunConfig, list[Stage], InitialWeights | None]:
    """The settings of a run in agreement with those that `out` was started with, its stages, and their initial weights.

    ValueError for settings with which the run in `out` cannot continue, and for what would stop a later stage. Writes nothing.
    """
    manifest = shards.manifest
    config, given = resolve_init(with_prompts(config, manifest), settings_before(out), out, typed)
    config = with_window(config, shards, settings_before(out))
    config = settle(config, out, manifest)
    initial, plan = initial_weights(config, shards, out, given), stages_to_run(config)
    _check_stages(config, plan, out, manifest)
    return config, plan, initial


def ready_data(config: RunConfig, shards: Dataset, accelerator: Accelerator, *, quiet: bool = False) -> Dataset:
    """The data ready for training: fetched, unless they are read in windows, and on the device with data.on_device.

    Raises ValueError where they cannot be fetched, and for buckets on the device.
    """
    if (line := describe_data(config, shards)) and not quiet:
        accelerator.print(line)
    if config.data.on_device and len(shards.parts) > 1:
        raise ValueError(f"{shards.path} holds buckets of several sizes; leave data.on_device off")
    if config.data.window is None:
        shards.fetch(progress=not quiet)
    shards.ready(accelerator.device)
    return OnDevice(shards, accelerator.device) if config.data.on_device else shards


def _remove_unfinished(out: Path) -> None:
    """Remove temporary files of killed processes: nothing else writes here while this process has the lock."""
    remove_stale_temporaries(out, "*.json")
    for stage in out.iterdir():
        if stage.is_dir() and not stage.is_symlink():
            remove_stale_temporaries(stage, "log.jsonl")
            remove_stale_temporaries(stage / "previews", "step-*.png")


def accelerator_of(config: RunConfig, out: Path) -> Accelerator:
    """accelerate's engine at this precision. ValueError where the machine cannot compute in it."""
    mixed = "no" if config.train.precision == "fp32" else config.train.precision
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        AcceleratorState._reset_state()  # an earlier run of this process had another precision
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("train.precision fp16 needs a GPU; use bf16 or fp32 here")
    if config.train.precision == "fp16" and config.train.shard:
        raise ValueError("train.shard does not go with train.precision fp16; use bf16 or fp32")
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # without a GPU, launched processes form a group only with this
        mixed_precision=mixed,
        project_dir=str(out),
        # gradients lie in the buckets that DDP sends, which would take as much memory again
        kwargs_handlers=[
            process_group_options(config.train),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )


def data_of_run(config: RunConfig, out: Path, accelerator: Accelerator | None = None) -> Dataset:
    """The data of the run; built-in data are prepared here. ValueError when they are not what the config expects."""
    path = config.data.path
    if path is None:
        if config.data.builtin is None:
            raise ValueError(f"recipe {config.recipe} needs --data DIR, a directory made by `selftrans prepare`")
        path = str(out / "data")
        if accelerator is None or accelerator.is_main_process:
            prepare_builtin(config.data.builtin, path)
        if accelerator is not None:
            accelerator.wait_for_everyone()
    main = accelerator is None or accelerator.is_main_process
    shards = open_data(
        path,
        verify=config.data.verify and main,
        text_encoder=config.data.text_encoder,
        cache=cache_of(config.data),
    )
    manifest, expected = shards.manifest, config.data
    if expected.shape is not None and tuple(expected.shape) != tuple(manifest.shape):
        raise ValueError(f"{path} holds latents {manifest.shape}, but data.shape expects {expected.shape}")
    if expected.classes is not None and expected.classes != manifest.num_classes:
        raise ValueError(
            f"{path} has {plural(manifest.num_classes, 'class')}, but data.classes expects {expected.classes}"
        )
    own = expected.autoencoder
    if own is not None and scales_differ(own, manifest.autoencoder, tolerance=0):
        raise ValueError(
            f"{path} holds latents by {manifest.autoencoder}, which data.autoencoder {own} would decode to other pixels; leave "
            "data.autoencoder out"
        )
    small = sum(size < config.train.batch_size for size in shards.parts)
    if small and len(shards.parts) > 1 and main:
        warnings.warn(
            f"{small} of the {plural(len(shards.parts), 'bucket')} of {path} {'has' if small == 1 else 'have'} fewer "
            f"pictures than the batch, {config.train.batch_size}: a batch of those has some of them more than once",
            stacklevel=3,
        )
    return shards


def _begin(
    config: RunConfig,
    plan: Sequence[Stage],
    out: Path,
    manifest: Manifest,
    accelerator: Accelerator,
    initial: InitialWeights | None,
) -> bool:
    """Write settings, data, order of the stages and initial weights of a run; true if the initial weights are new."""
    accelerator.wait_for_everyone()  # every process has read what was there before
    fresh = initial if initial and initial.new else None
    if accelerator.is_main_process:
        report = {"method": config.method, "order": [stage.name for stage in plan]}
        if fresh:  # before config.json: a run that has one has its initial weights, too
            fresh.write(config, manifest)
            write_json(out / REPORT, report | {INIT: fresh.record})
        record(config, out, manifest)
        if not (out / REPORT).exists():
            write_json(out / REPORT, report | ({INIT: initial.record} if initial else {}))
    accelerator.wait_for_everyone()
    if fresh:
        fresh.release()
    return fresh is not None


def _check_stages(config: RunConfig, plan: Sequence[Stage], out: Path, manifest: Manifest) -> None:
    """ValueError for what would stop a later stage after days of training the first: each is built without weights."""
    for number, stage in enumerate(plan):
        reached = max((step for step, _ in checkpoint.steps(out / stage.name / "checkpoints")), default=0)
        if reached > stage.steps:
            raise ValueError(
                f"{out} has trained {stage.name} for {plural(reached, 'step')} already, more than the {stage.steps} asked for; "
                "give at least as many, or another --out"
            )
        if number and not stage.encoder:
            meta_objective(config, stage, manifest.shape, manifest.conditions)


def stages_to_run(config: RunConfig) -> list[Stage]:
    """Stages to be run: with a given teacher, those from the one that it teaches."""
    plan = stages(config)
    given = [i for i, stage in enumerate(plan) if stage.teacher and stage.teacher.given]
    return plan[given[0] :] if given else plan


def _announce(trainer: Trainer, number: int, of: int) -> str:
    objective, stage = trainer.objective, trainer.stage
    parameters = sum(p.numel() for p in objective.student.parameters())
    guided = ", ".join(
        f"{g.name} guidance at block {', '.join(map(str, g.taps))}"
        + (f" until step {g.until_step}" if g.until_step and g.until_step < stage.steps else "")
        for g in objective.guidances
    )
    start = f"continues at step {trainer.step} of {stage.steps}" if trainer.step else plural(stage.steps, "step")
    own, trained = (
        sum(p.numel() for p in part.parameters() if p.requires_grad) for part in (objective.student, objective)
    )
    heads = ", with heads" if trained > own else ""
    size = f"{parameters / 1e6:.3g} M parameters"
    size += f" ({trained / 1e6:.3g} M trained{heads})" if trained != parameters else ""
    what = f"{start}, {size}, {guided or 'no guidance'}"
    memory = f"\n{memory_line(trainer.memory)}" if trainer.initial else ""
    return f"[{number}/{of}] {stage.name}: {what} -> {escaped(trainer.directory)}{memory}"


def _spent(trainer: Trainer) -> dict[str, Any]:
    return {
        "stage": trainer.stage.name,
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 2),
        "tflops": trainer.total_flops() / 1e12,
        "memory": trainer.memory,
    } | ({"steps_run": how} if (how := description(trainer)) else {})


def _report(
    config: RunConfig, plan: Sequence[Stage], spent: list[dict[str, Any]], initial: InitialWeights | None
) -> dict[str, Any]:
    """Student steps and total compute, earlier stages and a given teacher's training included."""
    costs = (training_cost(stage.teacher) for stage in plan if stage.teacher)
    given = next((cost for cost in costs if cost), None)
    # the training cost of an imported teacher is unknown, and then so is the sum
    teacher_tflops, teacher_seconds = (given[key] if given else 0.0 for key in ("tflops", "seconds"))
    known = teacher_tflops is not None and teacher_seconds is not None
    return {
        "method": config.method,
        "order": [stage.name for stage in plan],
        "student_steps": spent[-1]["steps"],
        "student_tflops": spent[-1]["tflops"],
        "total_tflops": sum(stage["tflops"] for stage in spent) + teacher_tflops if known else None,
        "total_seconds": round(sum(stage["seconds"] for stage in spent) + teacher_seconds, 2) if known else None,
        "stages": spent,
        "teacher": given,
    } | ({INIT: initial.record} if initial else {})


def totals(report: dict[str, Any]) -> str:
    """Steps and compute of a run that is done; compute once, where the only stage is all that was trained."""
    done, own = f"done: {plural(report['student_steps'], 'student step')}", f"{report['student_tflops']:.3g} TFLOPs"
    if report["total_tflops"] is None:
        return f"{done}, {own}; what the teacher's training took is unknown"  # it was imported
    total = f"{report['total_tflops']:.3g} TFLOPs, {report['total_seconds']:.0f} s"
    if len(report["order"]) == 1 and report["teacher"] is None:
        return f"{done}, {total}"
    return f"{done}, {own}; with all stages and the teacher's training {total}"
