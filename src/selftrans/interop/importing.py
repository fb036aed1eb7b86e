"""A published checkpoint => a run: model from its shapes, settings from the nearest recipe, AdamW's moments where they fit."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import IMPORTED, header
from selftrans.config import RunConfig, to_json
from selftrans.encoders.autoencoder import autoencoder_name
from selftrans.interop.published_file import listed, read
from selftrans.interop.published_optimizer import adamw_moments
from selftrans.methods.objective import Objective
from selftrans.methods.registry import BASELINE, METHODS, stages
from selftrans.methods.spec import PublishedHeads
from selftrans.models.registry import REGISTRY as MODELS
from selftrans.models.spec import Named, Published, PublishedFile, check_shapes
from selftrans.recipes import recipe
from selftrans.storage import atomic_directory, sha256_file, write_json
from selftrans.train.resume import bound_settings

#: autoencoder of latents with this many channels, where none is named: the field's for 4, none for pixels
AUTOENCODERS = {1: "pixel", 3: "pixel", 4: "stabilityai/sd-vae-ft-mse"}
USUAL = "imagefolder"  #: the recipe of a model that was not published with one of ours


def import_run(
    file: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    convention: str | None = None,
    heads: int | None = None,
    step: int | None = None,
    autoencoder: str | None = None,
    keep_heads: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Make the run `out` of a published checkpoint (SiT, DiT, REPA, Self-Transcendence); returns its checkpoint's folder.

    A file with the heads of a method's first stage becomes a run of that method, heads included; any other one a run without
    guidance, its heads left out (`keep_heads`: in projectors.safetensors). AdamW's moments come along where they fit, turned
    with the weights. `name` is the published size expected, `convention` whose time the weights have (None: as the file
    shows, or guessed, which is printed), `heads` those of attention, `step` the steps trained.

    Written completely or not at all. ValueError for a file that is none of these and for an `out` that holds anything else;
    the same import again does nothing.
    """
    file, out = Path(file), Path(out)
    held = read(file)
    found = _recognised(held, heads, convention)
    config, guided = _config(held, found, name)
    source = {"path": str(file.resolve()), "sha256": sha256_file(file), "convention": found.convention}
    source |= found.source | {"step": step, "autoencoder": autoencoder, "keep_heads": keep_heads}
    source |= {"unused": listed(held.unused)} if held.unused else {}
    if _occupied(out, source):
        say(f"{out} holds this import already")
        return checkpoint.steps(out / stages(config)[0].name / "checkpoints")[-1][1]
    parts, notes = _tensors(held, found, config, guided)
    trained = _trained(held, parts["optimizer"], step)
    if trained is None:
        notes.append("how long it was trained is not known: step 0 (--step N says it)")
    done = trained or 0
    config = config.override({"train.steps": max(config.train.steps, done)})
    left = {f"{kind}.{n}": t for kind, state in held.weights.items() for n, t in state.items() if found.is_head(n)}
    if left and not parts["heads"]:
        notes.append(f"its projectors are {'in projectors.safetensors' if keep_heads else 'left out (--keep-heads)'}")
    path = _write(out, config, found, done, parts, source, left if keep_heads else {})
    for line in (f"time and sign are those of {found.convention.upper()}, {found.reason}", *notes):
        say(line)
    say(f"{_summary(found, autoencoder)}, after {done} steps -> {out}")
    say(f"to train on: {_command(config, out)}")
    return path


def _recognised(held: PublishedFile, heads: int | None, convention: str | None) -> Published:
    """The file in terms of the first family that knows it. ValueError where none does."""
    for spec in MODELS.every():
        found = spec.reader(held, heads, convention)
        if found is not None:
            return found
    raise ValueError(f"{held.path} is a checkpoint of no model that selftrans knows")


def _summary(found: Published, autoencoder: str | None) -> str:
    latents = "x".join(map(str, found.shape))
    return f"{found.name}, latents {latents} of {_autoencoder(found, autoencoder)}, {found.conditions}"


def _occupied(out: Path, source: dict[str, Any]) -> bool:
    """Whether `out` is this import already. ValueError when it holds anything else."""
    record = out / f"{IMPORTED}.json"
    if record.is_file():
        try:
            if json.loads(record.read_text()) == source:
                return True
        except ValueError:
            pass
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds something already; choose another --out, or remove it")
    return False


def _config(held: PublishedFile, found: Published, name: str | None) -> tuple[RunConfig, PublishedHeads | None]:
    """The run that goes on with these weights, model from the file, the rest from the nearest recipe; and its heads."""
    if name is not None and name != found.name:
        raise ValueError(f"{held.path} is not {name}: it has {found.sizes}")
    base = recipe(found.recipe or USUAL)
    train = dataclasses.replace(base.train, path=found.path or base.train.path)
    config = dataclasses.replace(base, method=BASELINE, model=found.config, train=train)
    named = held.weights.get("raw") or held.weights["ema"]
    for spec in METHODS.values():
        try:
            heads = spec.published_heads({k: t for k, t in named.items() if found.is_head(k)}, held.args, base)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{held.path}: the options kept in it cannot be used ({error})") from error
        if heads is not None:
            sections = {**config.sections, **{section.key: section for section in heads.sections}}
            return dataclasses.replace(config, method=spec.name, sections=sections).restricted(), heads
    return config.restricted(), None


def _tensors(
    held: PublishedFile, found: Published, config: RunConfig, guided: PublishedHeads | None
) -> tuple[dict[str, Named], list[str]]:
    """The tensors of our checkpoint, and what the user should know about them."""
    notes = [f"not used of it: {listed(held.unused)}"] if held.unused else []
    states = {kind: found.translate(state, False) for kind, state in held.weights.items()}
    if len(states) == 1:
        there, absent = ("ema", "raw") if "ema" in states else ("raw", "ema")
        notes.append(f"it holds one set of weights; they stand for {absent} as for {there}")
    raw, ema = (states.get(a) or states[b] for a, b in (("raw", "ema"), ("ema", "raw")))
    named = held.weights.get("raw") or held.weights["ema"]
    head = _head(named, found, guided)
    if guided is not None:
        check_shapes(f"{held.path} (its head of {stages(config)[0].name})", head, _expected_heads(config, found))
    for key, tensor in [item for state in (raw, ema, head) for item in state.items()]:
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{held.path}: {key} holds values that are not finite; its training has broken down")
    optimizer: Named = {}
    if held.optimizer is not None:
        absent_ok = lambda key: found.is_fixed(key) or found.is_head(key)  # noqa: E731
        moments, reason = adamw_moments(held.optimizer, named if "raw" in held.weights else {}, absent_ok)
        notes += [f"the optimiser starts afresh: {reason}"] if reason else []
        for moment, state in moments.items():
            for key, value in _turned(state, found, guided, moment).items():
                optimizer[f"{key}:{moment}"] = value
    else:
        notes.append("the optimiser starts afresh: the file has no state of one")
    return {"student": raw, "ema": ema, "heads": head, "optimizer": optimizer}, notes


def _head(named: Named, found: Published, guided: PublishedHeads | None) -> Named:
    """The heads of a method under our names, float32; the layer that predicts a token's cells in our order of cells."""
    if guided is None:
        return {}
    heads = {guided.names.get(key, key): (key, x.float()) for key, x in named.items() if found.is_head(key)}
    return {ours: found.cells(x) if key.startswith(guided.predicts_cells) else x for ours, (key, x) in heads.items()}


def _expected_heads(config: RunConfig, found: Published) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        student = config.build_model(found.shape, found.conditions)
        objective = Objective(student, stages(config)[0].guide(student, None))
    return {k: tuple(v.shape) for k, v in objective.state_dict().items() if not k.startswith("student.")}


def _turned(state: Named, found: Published, guided: PublishedHeads | None, moment: str) -> Named:
    """One moment of every parameter, by its name in the objective, turned as its parameter was."""
    if moment == "step":
        student = {key: value for key, value in state.items() if not found.is_head(key) and not found.is_fixed(key)}
        names = guided.names if guided else {}
        heads = {names.get(key, key): value for key, value in state.items() if found.is_head(key)} if guided else {}
    else:
        student, heads = found.translate(state, moment == "exp_avg_sq"), _head(state, found, guided)
    return {f"student.{key}": value for key, value in student.items()} | heads


def _trained(held: PublishedFile, optimizer: Named, step: int | None) -> int | None:
    """Steps of training: as given, as counted in the file, or as its optimiser counted them."""
    if step is not None and step < 0:
        raise ValueError(f"--step {step} must not be negative")
    counted = max((int(value) for key, value in optimizer.items() if key.endswith(":step")), default=None)
    return next((n for n in (step, held.steps, counted) if n is not None), None)


def _autoencoder(found: Published, name: str | None) -> str:
    channels = found.shape[0]
    if name is None and channels not in AUTOENCODERS:
        raise ValueError(f"what decodes latents of {channels} channels is not known; say it with --autoencoder")
    return autoencoder_name(name or AUTOENCODERS[channels])


def _write(
    out: Path,
    config: RunConfig,
    found: Published,
    step: int,
    parts: dict[str, Named],
    source: dict[str, Any],
    projectors: Named,
) -> Path:
    """The run directory, written completely or not at all; returns its checkpoint's folder."""
    order = [stage.name for stage in stages(config)]
    classes = [str(label) for label in range(found.conditions.num_classes)]
    about = header(
        config, order[0], step, order=order, shape=found.shape, conditions=found.conditions, classes=classes,
        autoencoder=_autoencoder(found, source["autoencoder"]),
    ) | {"seconds": 0.0, "tflops": None, IMPORTED: source | {"steps": step}}  # fmt: skip
    state = about | {"window": {}, "scaler": None, "processes": 1, "teacher": None}
    try:
        with atomic_directory(out) as run:
            saved = checkpoint.save(run / order[0] / "checkpoints", step, parts, state, about)
            if projectors:
                save_file({key: value.clone() for key, value in projectors.items()}, run / "projectors.safetensors")
            write_json(run / "config.json", json.loads(to_json(config)))
            write_json(run / f"{IMPORTED}.json", source)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{out} could not be written ({error}); make room, or choose another --out") from error
    return out / saved.relative_to(run)


def _command(config: RunConfig, out: Path) -> str:
    """What continues an imported run, as it is typed: its recipe, and the settings that its weights are bound to."""
    words = ["selftrans", "train", config.recipe, "--data", "DIR", "--out", str(out)]
    bound = bound_settings(config, config)
    usual = bound_settings(dataclasses.replace(recipe(config.recipe), method=config.method).restricted(), config)
    for name, value in bound.items():
        if usual.get(name) != value or name == "method":
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)
