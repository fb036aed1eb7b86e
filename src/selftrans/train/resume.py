"""A run directory is bound to the settings it was begun with: what may change between two visits, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import IMPORTED
from selftrans.config import RunConfig, from_json, to_json
from selftrans.data.dataset import Manifest
from selftrans.methods import METHODS, stages
from selftrans.storage import write_json

#: sections and fields that may change between two visits to the same run directory
FREE = (
    *("log", "sample", "data.path", "data.on_device", "stage2.teacher", "repa.encoder"),
    *("train.steps", "train.checkpoint_every", "train.preview_every"),
    *("train.keep", "train.keep_best", "train.keep_every", "train.max_skips", "train.shard", "train.timeout"),
    *("train.recompute", "train.compile", "train.allow_changes", "data.verify"),
)
#: and those that may with `train.allow_changes`, said and written to changes.json
MENDABLE = (
    *("train.lr", "train.warmup", "train.clip", "train.weight_decay", "train.precision", "train.drop"),
    *(f"{name}.weight" for name in ("stage1", "stage2", "repa", "sra", "layersync", "dispersive")),
)


def settle(config: RunConfig, out: Path, manifest: Manifest) -> RunConfig:
    """The configuration in agreement with what `out` was started with. ValueError names what differs."""
    data, before = out / "data.json", _before(out)
    if config.stage1.steps is None:  # settled once, so that a longer visit later keeps the same teacher
        steps = before.stage1.steps if before else max(1, config.train.steps // 2)
        config = dataclasses.replace(config, stage1=dataclasses.replace(config.stage1, steps=steps))
    if before:
        # nothing of ours has trained imported weights yet: what they are is settled, how to go on is not
        fresh = (out / f"{IMPORTED}.json").exists() and not data.exists()
        was, now = (essence(c, before) if fresh else dataclasses.asdict(c) for c in (before, config))
        changed, teachers = differences(was, now), (before.stage2.teacher, config.stage2.teacher)
        if not fresh and teachers.count(None) == 1:  # its path may change, its weights not
            changed.append(f"stage2.teacher was {before.stage2.teacher}, is {config.stage2.teacher}")
        mendable = all(change.split()[0] in MENDABLE for change in changed) and not fresh
        if changed and mendable and config.train.allow_changes:
            warnings.warn(f"{out} goes on with other settings: {'; '.join(changed)}", stacklevel=4)
        elif changed:
            consent = ", or --train.allow-changes True to go on with these" if mendable else ""
            raise ValueError(
                f"{out} was started with other settings: {'; '.join(changed)}; use those, or another --out{consent}"
            )
        if data.exists() and _read(data, _hashes) != _hashes(manifest.to_json()):
            raise ValueError(f"{out} was trained on other data than {config.data.path}; use that, or another --out")
    return config


def _before(out: Path) -> RunConfig | None:
    """The settings that `out` was begun with: its config.json or, where that is lost, the newest checkpoint's copy."""
    path = out / "config.json"
    if path.exists():
        return _read(path, from_json)
    for folder in sorted(out.glob("*/checkpoints"), reverse=True):
        found = checkpoint.newest(folder)
        if found is not None:
            return _read(found.path / checkpoint.STATE, lambda text: from_json(json.dumps(json.loads(text)["config"])))
    return None


def record(config: RunConfig, out: Path, manifest: Manifest) -> None:
    """Write down what the run is; of settings that have changed since the last visit also when."""
    before, path = _before(out), out / "changes.json"
    changed = differences(dataclasses.asdict(before), dataclasses.asdict(config)) if before else []
    if changed and config.train.allow_changes:
        reached = {
            folder.parent.name: steps[-1][0]
            for folder in out.glob("*/checkpoints")
            if (steps := checkpoint.steps(folder))
        }
        told = _read(path, json.loads) if path.exists() else []
        write_json(path, [*told, {"steps": reached, "changed": changed}])
    write_json(out / "config.json", json.loads(to_json(config)))
    write_json(out / "data.json", json.loads(manifest.to_json()))


def essence(config: RunConfig, imported: RunConfig) -> dict[str, Any]:
    """What imported weights, not trained on yet, are bound to: method, model, path, and the sections of their stages."""
    bound = {"method": config.method, "model": dataclasses.asdict(config.model), "train": {"path": config.train.path}}
    known = stages(imported) if imported.method in METHODS else []  # a stranger's module is not imported
    sections = [stage.name for stage in known if hasattr(config, stage.name)]
    return bound | {name: dataclasses.asdict(getattr(config, name)) for name in sections}


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    """A json file of the run, parsed. ValueError names the file when it is damaged."""
    try:
        return parse(path.read_text())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used ({error}); restore it, or choose another --out") from error


def _hashes(manifest: str) -> list[str]:
    return [shard["sha256"] for shard in json.loads(manifest)["shards"]]


def differences(before: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    """`train.lr was 0.1, is 0.2` for each field that differs and is not in FREE."""
    found = []
    for name, value in now.items():
        dotted = f"{where}{name}"
        if dotted in FREE:
            continue
        if isinstance(value, dict):
            found += differences(before[name], value, f"{dotted}.")
        elif before[name] != value:
            found.append(f"{dotted} was {before[name]}, is {value}")
    return found
