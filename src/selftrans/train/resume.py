"""Resuming a run: which settings may change, and the checkpoint from which it continues."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import IMPORTED
from selftrans.config import RunConfig, from_json, from_object, settings_of, to_json
from selftrans.data.manifest import Manifest
from selftrans.encoders.identity import check_scale
from selftrans.interop.importing import bound_settings
from selftrans.messages import first_line
from selftrans.methods.registry import find, stages
from selftrans.plain_json import from_plain, recorded
from selftrans.sections import Resume, fields_of
from selftrans.storage import write_json, write_text
from selftrans.types import Conditions

CHANGES = "changes.json"  #: of a run: settings that were changed by consent, and the steps reached by then
Changes = list[tuple[str, Any, Any, Resume]]  #: name of a setting, value before, value now, whether it may change


def settle(config: RunConfig, out: Path, manifest: Manifest) -> RunConfig:
    """The configuration in agreement with what `out` was started with. ValueError names what differs."""
    before = settings_before(out)
    if before and _untrained(out, before, config):
        before = None
    config = find(config.method).settle(_with_lengths(config.restricted(), before), manifest.conditions)
    if before:
        _check_settings(before, config, out)
        if (out / "data.json").exists():
            _check_same_data(config, out, manifest)
    return config


def _check_settings(before: RunConfig, now: RunConfig, out: Path) -> None:
    """ValueError for changed settings with which the run in `out` cannot continue; a warning for those changed by consent."""
    # imported weights that are not trained yet: the model is fixed, the training settings are free
    fresh = (out / f"{IMPORTED}.json").exists() and not (out / "data.json").exists()
    if fresh:
        changed, by_consent = _bound_changes(before, now), False
    else:
        changed = differences(before, now) + (_teacher_changes(before, now) if before.method == now.method else [])
        by_consent = all(rule == "consent" for *_, rule in changed)
    if not changed:
        return
    changes = "; ".join(f"{name} was {was}, is {value}" for name, was, value, _ in changed)
    if by_consent and now.train.allow_changes:
        warnings.warn(f"{out} continues with other settings: {changes}", stacklevel=5)
        return
    consent = ", or --train.allow-changes True to continue with these" if by_consent else ""
    raise ValueError(f"{out} was started with other settings: {changes}; use those, or another --out{consent}")


def _check_same_data(config: RunConfig, out: Path, manifest: Manifest) -> None:
    """ValueError where the data are not those that the run in `out` was started with, or are scaled in another way."""
    (shards, scale), (shards_now, scale_now) = _read(out / "data.json", _identity), _identity(manifest.to_json())
    if shards != shards_now:
        raise ValueError(
            f"{out} was trained on other data than {config.data.path}; give the data it was trained on, or another --out"
        )
    if scale != scale_now:
        raise ValueError(
            f"{out} was trained on latents with {scale}, those of the data are now {scale_now}; prepare the data again as they "
            "were, or choose another --out"
        )


def _untrained(out: Path, before: RunConfig, now: RunConfig) -> bool:
    """Whether a run ended before its first checkpoint and holds no given weights: then any settings can continue it."""
    held = (out / f"{IMPORTED}.json").exists() or before.init.path is not None or now.init.path is not None
    return not held and not any(checkpoint.steps(folder) for folder in out.glob("*/checkpoints"))


def _with_lengths(config: RunConfig, before: RunConfig | None) -> RunConfig:
    """The settings with the lengths of earlier stages fixed at the first start: a longer run keeps its teacher."""
    fixed = {}
    for stage in stages(config)[:-1]:
        for section in map(config.section, stage.sections):
            for name, value, _, length in fields_of(section):
                if length and value is None:
                    kept = getattr(before.section(type(section)), name) if before else None
                    fixed[f"{section.key}.{name}"] = kept or stage.steps
    return config.override(fixed)


def differences(before: RunConfig, now: RunConfig) -> Changes:
    """Settings that differ and may not change freely.

    Without those of the model where the initial weights differ, too, and without those that only another method has.
    """
    was = {name: value for name, value, _ in settings_of(before)}
    return [
        (name, was.get(name), value, rule)
        for name, value, rule in settings_of(now)
        if rule != "free"
        and was.get(name) != value
        and (before.init == now.init or not name.startswith("model."))
        and (before.method == now.method or name in was)
    ]


def _teacher_changes(before: RunConfig, now: RunConfig) -> Changes:
    """Where a teacher is given now and the run trained its own before, or the other way round. The path may change."""
    given = [{s.teacher.option: s.teacher.given for s in stages(config) if s.teacher} for config in (before, now)]
    return [
        (option, given[0].get(option), value, "fixed")
        for option, value in given[1].items()
        if (given[0].get(option) is None) != (value is None)
    ]


def _bound_changes(before: RunConfig, now: RunConfig) -> Changes:
    """Settings that differ and that imported weights, not trained yet, fix."""
    was = bound_settings(before, before)
    return [(name, was.get(name), v, "fixed") for name, v in bound_settings(now, before).items() if was.get(name) != v]


def settings_before(out: Path) -> RunConfig | None:
    """The settings that `out` was started with: its config.json or, if that is lost, the copy in the newest checkpoint.

    `init.path` is absolute; a relative one, which older versions wrote, is resolved from the current folder.
    """
    path, before = out / "config.json", None
    if path.exists():
        before = _read(path, from_json)
    for folder in sorted(out.glob("*/checkpoints"), reverse=True) if before is None else ():
        found = checkpoint.newest(folder)
        if found is not None:
            before = _read(found.path / checkpoint.STATE, lambda text: from_object(json.loads(text)["config"]))
            break
    return None if before is None else dataclasses.replace(before, init=before.init.resolved())


def record(config: RunConfig, out: Path, manifest: Manifest) -> None:
    """Write config.json and data.json; changed settings, and the steps reached, are added to changes.json."""
    before, path = settings_before(out), out / CHANGES
    changed = [f"{name} was {was}, is {now}" for name, was, now, _ in differences(before, config)] if before else []
    if changed and config.train.allow_changes:
        reached = {
            folder.parent.name: steps[-1][0]
            for folder in out.glob("*/checkpoints")
            if (steps := checkpoint.steps(folder))
        }
        earlier = _read(path, json.loads) if path.exists() else []
        write_json(path, [*earlier, {"steps": reached, "changed": changed}])
    write_text(out / "config.json", to_json(config))
    write_json(out / "data.json", json.loads(manifest.to_json()))


def changed_since(out: Path, stage: str, step: int) -> list[str]:
    """The settings that were changed at or after a step of a stage, as changes.json records them: `NAME was A, is B`."""

    def since(record: list[dict[str, Any]]) -> list[str]:
        return [str(line) for each in record if each["steps"].get(stage, -1) >= step for line in each["changed"]]

    return recorded(out / CHANGES, since, [])


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    """A json file of the run, parsed. ValueError names the file when it is damaged."""
    try:
        return parse(path.read_text())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used ({error}); restore it, or choose another --out") from error


def _identity(manifest: str) -> tuple[list[str], str]:
    """Hashes of the shards, and the scale of latents: pixels that are the same on disk may be standardised or not."""
    found = json.loads(manifest)
    space = found["latent_space"]
    return [shard["sha256"] for shard in found["shards"]], f"shift {space['shift']} and scale {space['scale']}"


def check_data(found: checkpoint.Checkpoint, manifest: Manifest) -> None:
    """ValueError unless a checkpoint's model was trained on latents and conditions like those of these data."""
    now = manifest.conditions
    with checkpoint_errors(found, ValueError):
        shape, was = tuple(found.state["shape"]), from_plain(Conditions, found.state["conditions"], "conditions")
    if shape != tuple(manifest.shape) or not was.fits(now):
        raise ValueError(
            f"{found.path} was trained on latents {shape} with {was}, the data are {tuple(manifest.shape)} with {now}; "
            "give data prepared alike, or another --out"
        )
    check_scale(str(found.path), str(found.state.get("autoencoder")), manifest.autoencoder)


def common_checkpoint(folder: Path, accelerator: Accelerator) -> checkpoint.Checkpoint | None:
    """The checkpoint that all processes continue from: the newest valid one that the main process sees; None for a new stage.

    ValueError in a process that cannot read it, and where none is valid: training from the start would remove them, and the
    fault may be that of the disk. Leftovers of interrupted writes are removed.
    """
    found = None
    damaged = False
    if accelerator.is_main_process:
        checkpoint.remove_unfinished(folder)
        found = checkpoint.newest(folder)
        damaged = found is None and bool(checkpoint.steps(folder))
    step, damaged = broadcast_object_list([found.step if found else None, damaged])
    if damaged:
        raise ValueError(
            f"{folder} holds no valid checkpoint; restore one, or remove this folder to train the stage from its start"
        )
    if step is None or found is not None:
        return found
    try:
        return checkpoint.read(checkpoint.path_of_step(folder, step))
    except ValueError as error:
        raise ValueError(f"{error}, though another process has read it: all must see the same --out") from error


@contextlib.contextmanager
def checkpoint_errors(found: checkpoint.Checkpoint, *errors: type[Exception]) -> Iterator[None]:
    """Turn errors about missing or wrong entries of a checkpoint's state into a ValueError that names the checkpoint.

    `errors`: further types of exceptions to turn.
    """
    wrong: tuple[type[Exception], ...] = (KeyError, TypeError, AttributeError, RuntimeError, *errors)
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except wrong as error:
        raise ValueError(
            f"{found.path / checkpoint.STATE} cannot be used ({type(error).__name__}: {first_line(error)}); was it written by "
            "another version? Remove that checkpoint, or choose another --out"
        ) from error
