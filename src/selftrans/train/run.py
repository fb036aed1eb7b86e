"""A complete run: the stages of a method in order, in one directory, continued where they stopped.

RUN/config.json   the complete configuration          RUN/data.json   manifest of the data it was trained on
RUN/<stage>/      checkpoints, previews, log.jsonl     RUN/run.json    student steps and total compute
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import release_memory

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.adapted import INIT
from selftrans.checkpoints.load import REPORT
from selftrans.config import RunConfig, Train
from selftrans.data.buckets import is_prepared
from selftrans.data.dataset import Dataset
from selftrans.data.manifest import Manifest
from selftrans.messages import plural, redirect_closed_output
from selftrans.methods.registry import meta_objective, stages
from selftrans.methods.spec import Stage
from selftrans.plugins import trust_named
from selftrans.progress import progress_bar
from selftrans.storage import lock_file, remove_stale_temporaries, removed_if_refused, write_json
from selftrans.train.capture_rules import remembered
from selftrans.train.fitting import describe
from selftrans.train.initial_weights import InitialWeights, initial_weights, resolve_init
from selftrans.train.preview import Preview, with_prompts
from selftrans.train.processes import (
    accelerator_of,
    check_same,
    keep_memory,
    reporting_lost_processes,
)
from selftrans.train.resume import record, settings_before, settle
from selftrans.train.run_data import data_of_run, ready_data, with_window
from selftrans.train.run_report import opening_line, run_report, stage_report
from selftrans.train.signals import StopSignal
from selftrans.train.teachers import teacher_of
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
    if accelerator.device.type == "cpu":
        keep_memory()
    main = accelerator.is_main_process

    def say(line: str) -> None:
        redirect_closed_output()
        if not quiet:
            accelerator.print(line)

    with (
        _locked_folder(out) if main else contextlib.nullcontext(),
        StopSignal() as stop,
        contextlib.closing(Trackers(out)) as trackers,
    ):
        shards = data_of_run(config, out, accelerator)
        check_same("data", f"{shards.manifest.shards_sha256()} {shards.manifest.latent_space}")
        config, plan, initial = planned(config, shards, out, typed)
        shards = ready_data(config, shards, accelerator, quiet=quiet)
        trainer_of = partial(
            Trainer,
            accelerator,
            config,
            shards=shards,
            order=[stage.name for stage in plan],
            initial=initial,
            preview=Preview(config, shards, accelerator.device, stop) if config.train.preview_every else None,
            trackers=trackers if main else None,
            stop=stop,
            bar=bar,
        )
        spent: list[dict[str, Any]] = []
        for number, stage in enumerate(plan, start=1):
            # the teacher has no variable of its own here, so that its memory is freed when the guidance ends
            trainer = trainer_of(
                stage, out / stage.name, teacher=teacher_of(config, stage, str(out), shards, accelerator.device)
            )
            if number == 1:  # nothing is written before the first trainer is built
                _begin(config, plan, out, shards.manifest, accelerator, initial, say)
                if main:
                    trackers.start(config)
            trackers.begin(sum(earlier["steps"] for earlier in spent))
            say(opening_line(trainer, number, len(plan)))
            with remembered(out):
                trainer.run()
            spent.append(stage_report(trainer))
            del trainer
            release_memory()
        report = run_report(config, plan, spent, initial)
        if main:
            write_json(out / REPORT, report)
    redirect_closed_output()  # before the lines of the command
    return report


@contextlib.contextmanager
def _locked_folder(out: Path) -> Iterator[None]:
    """In the main process: the folder of a run, locked, and without the temporary files of killed processes.

    What a run that is refused has made in it is removed again.
    """
    new = [path for path in (out / "data", out / ".lock", out) if not path.exists()]
    with lock_file(out / ".lock"), removed_if_refused(new, keep=out / "config.json"):
        remove_stale_temporaries(out)
        for stage in out.iterdir():
            if stage.is_dir() and not stage.is_symlink():
                remove_stale_temporaries(stage, "log.jsonl")
                remove_stale_temporaries(stage / "previews")
        yield


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


def _begin(
    config: RunConfig,
    plan: Sequence[Stage],
    out: Path,
    manifest: Manifest,
    accelerator: Accelerator,
    initial: InitialWeights | None,
    say: Callable[[str], object],
) -> None:
    """Write settings, data, order of the stages and initial weights of a run; `say` gets a line about weights that are new."""
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
        say(describe(fresh.record))


def _check_stages(config: RunConfig, plan: Sequence[Stage], out: Path, manifest: Manifest) -> None:
    """ValueError for what would stop a later stage after days of training the first: each is built without weights."""
    for number, stage in enumerate(plan):
        check_decay(config.train, stage)
        reached = max((step for step, _ in checkpoint.steps(out / stage.name / "checkpoints")), default=0)
        if reached > stage.steps:
            raise ValueError(
                f"{out} has trained {stage.name} for {plural(reached, 'step')} already, more than the {stage.steps} asked for; "
                "give at least as many, or another --out"
            )
        if number and not stage.encoder:
            meta_objective(config, stage, manifest.shape, manifest.conditions)


def check_decay(train: Train, stage: Stage) -> None:
    """ValueError for a stage with steps at a learning rate of zero."""
    if train.lr_decay and train.lr_decay[1] < stage.steps:
        raise ValueError(
            f"{stage.name} has {plural(stage.steps, 'step')}, but train.lr_decay ends at step {train.lr_decay[1]}, from which "
            "the rate is zero; give a later end, or None"
        )


def stages_to_run(config: RunConfig) -> list[Stage]:
    """Stages to be run: with a given teacher, those from the one that it teaches."""
    plan = stages(config)
    given = [i for i, stage in enumerate(plan) if stage.teacher and stage.teacher.given]
    return plan[given[0] :] if given else plan
