"""A published checkpoint => a run: model from its shapes, settings from the nearest recipe, AdamW's moments if they fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import IMPORTED, header
from selftrans.config import RunConfig, settings_of, to_json
from selftrans.encoders.autoencoder import autoencoder_name
from selftrans.interop.exporting import check_out
from selftrans.interop.published_file import MOST, read
from selftrans.messages import as_word, escaped, first_line, listed, plural, printable, shape_text
from selftrans.methods.registry import BASELINE, METHODS, meta_objective, stages
from selftrans.methods.spec import PublishedHeads
from selftrans.models.registry import REGISTRY as MODELS
from selftrans.models.spec import Named, Published, PublishedFile, check_shapes
from selftrans.recipes import recipe
from selftrans.storage import FREE_SPACE, atomic_directory, sha256_file, write_json, write_text
from selftrans.suggest import nearest

#: channels of the latents -> default autoencoder: the usual one for 4, `pixel` for 1 and 3
AUTOENCODERS = {1: "pixel", 3: "pixel", 4: "stabilityai/sd-vae-ft-mse"}
USUAL = "imagefolder"  #: the recipe for a model that was published with none of the recipes


def import_run(
    file: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    convention: str | None = None,
    heads: int | None = None,
    step: int | None = None,
    path: str | None = None,
    autoencoder: str | None = None,
    keep_heads: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Make the run `out` from a published checkpoint (SiT, DiT, REPA, LightningDiT, ...); returns its checkpoint's folder.

    A file with the heads of a method's first stage becomes a run of that method with its heads. Any other file becomes a run
    without guidance and without heads (`keep_heads` writes them to projectors.safetensors). AdamW's moments are kept if they
    fit, converted like the weights. `name` is the expected published size, `convention` the time convention of the weights
    (None: read from the file or guessed, which is printed), `heads` the number of attention heads, `step` the steps trained,
    `path` the path of the run, for weights that predict noise and fit any path, `autoencoder` what decodes the latents (None:
    what our own export names, else the usual one).

    Written atomically. ValueError for any other file and for an `out` that holds anything else; repeating an import does
    nothing.
    """
    out, published = Path(out), read(Path(file))
    autoencoder = autoencoder or _stated(published)
    model = recognised(published, heads, convention)
    if path is not None and model.path not in (None, path):
        raise ValueError(f"{file} was trained on the path {model.path}, by its stored options; omit --path {path}")
    config, guided = _config(published, model._replace(path=path or model.path), name)
    source = {"path": str(published.path.resolve()), "sha256": sha256_file(published.path)}
    source |= {"convention": model.convention} | ({} if path is None else {"path_of_run": path})
    source |= model.source | {"step": step, "autoencoder": autoencoder, "keep_heads": keep_heads}
    source |= {"unused": listed(published.unused, MOST)} if published.unused else {}
    if _occupied(out, source):
        held = checkpoint.steps(out / stages(config)[0].name / "checkpoints")
        if not held:
            raise ValueError(f"{out} holds this import without its checkpoint; remove it, or choose another --out")
        say(f"{escaped(out)} holds this import already")
        return held[-1][1]
    parts, notes = _tensors(published, model, config, guided)
    trained = _trained(published, parts["optimizer"], step)
    if trained is None:
        notes.append("the number of steps trained is unknown and taken as 0; set it with --step N")
    done = trained or 0
    config = config.override({"train.steps": max(config.train.steps, done)})
    projectors = {
        f"{kind}.{n}": t for kind, state in published.weights.items() for n, t in state.items() if model.is_head(n)
    }
    if projectors and not parts["heads"]:
        notes.append(f"its projectors are {'in projectors.safetensors' if keep_heads else 'left out (--keep-heads)'}")
    written = _write(out, config, model, done, parts, source, projectors if keep_heads else {})
    for line in (f"time and sign are those of {model.convention.upper()}, {model.reason}", *notes):
        say(line)
    say(f"{_summary(model, autoencoder)}, after {plural(done, 'step')} -> {escaped(out)}")
    say(f"to train on: {_command(config, out)}")
    return written


def recognised(file: PublishedFile, heads: int | None, convention: str | None) -> Published:
    """The model of a file, from the first model family that recognises it. ValueError if none does."""
    known = {name for spec in MODELS.every() for name in spec.conventions}
    if convention is not None and convention not in known:
        raise ValueError(f"--convention {convention!r} is unknown{nearest(convention, known)}")
    for spec in MODELS.every():
        model = spec.reader(file, heads, convention)
        if model is not None:
            return model
    raise ValueError(f"{file.path} is not a checkpoint of any model that selftrans supports")


def _stated(file: PublishedFile) -> str | None:
    """The autoencoder that the file names, if it names one. ValueError for a folder that is not on this machine."""
    name = file.autoencoder
    if name and Path(name).is_absolute() and not Path(name).is_dir():
        raise ValueError(
            f"{file.path} names the autoencoder {printable(name)}, which is not on this machine; give --autoencoder, a folder "
            "or a hub id"
        )
    return name


def _summary(model: Published, autoencoder: str | None) -> str:
    latents = shape_text(model.shape)
    return f"{model.name}, latents {latents} of {_autoencoder(model, autoencoder)}, {model.conditions}"


def _occupied(out: Path, source: dict[str, Any]) -> bool:
    """Whether `out` already holds this import. ValueError when it holds anything else."""
    record = out / f"{IMPORTED}.json"
    if record.is_file():
        try:
            if json.loads(record.read_text()) == source:
                return True
        except ValueError:
            pass
    check_out(out, set(), "empty")
    return False


def _config(file: PublishedFile, model: Published, name: str | None) -> tuple[RunConfig, PublishedHeads | None]:
    """The settings that continue these weights (model from the file, the rest from the nearest recipe), and the heads."""
    if name is not None and name != model.name:
        raise ValueError(f"{file.path} is not {name}: it has {model.sizes}")
    base = recipe(model.recipe or USUAL)
    train = dataclasses.replace(base.train, path=model.path or base.train.path)
    config = dataclasses.replace(base, method=BASELINE, model=model.config, train=train)
    for spec in METHODS.values():
        try:
            heads = spec.published_heads({k: t for k, t in file.named.items() if model.is_head(k)}, file.args, base)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file.path}: its stored options cannot be used ({error})") from error
        if heads is not None:
            sections = {**config.sections, **{section.key: section for section in heads.sections}}
            return dataclasses.replace(config, method=spec.name, sections=sections).restricted(), heads
    return config.restricted(), None


def _tensors(
    file: PublishedFile, model: Published, config: RunConfig, guided: PublishedHeads | None
) -> tuple[dict[str, Named], list[str]]:
    """The tensors of the new checkpoint, and notes for the user about them."""
    notes = [f"unused entries of the file: {listed(file.unused, MOST)}"] if file.unused else []
    states = {kind: model.translate(state, False) for kind, state in file.weights.items()}
    if len(states) == 1:
        present, absent = ("ema", "raw") if "ema" in states else ("raw", "ema")
        notes.append(f"it holds one set of weights, used for {absent} as well as {present}")
    raw, ema = (states.get(a) or states[b] for a, b in (("raw", "ema"), ("ema", "raw")))
    head = _head(file.named, model, guided)
    if guided is not None:
        check_shapes(f"{file.path} (its head of {stages(config)[0].name})", head, _expected_heads(config, model))
    for key, tensor in [item for state in (raw, ema, head) for item in state.items()]:
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{file.path}: {key} holds values that are not finite: its training diverged")
    optimizer: Named = {}
    if file.optimizer is not None:
        parameters = {k: t for k, t in file.named.items() if "raw" in file.weights and not model.is_buffer(k)}
        without_state = {key for key in parameters if model.is_fixed(key) or model.is_head(key)}
        moments, reason = _adamw_moments(file.optimizer, parameters, without_state)
        notes += [f"the optimiser starts from zero: {reason}"] if reason else []
        for moment, state in moments.items():
            for key, value in _converted(state, model, guided, moment).items():
                optimizer[f"{key}:{moment}"] = value
    else:
        notes.append("the optimiser starts from zero: the file has no optimiser state")
    return {"student": raw, "ema": ema, "heads": head, "optimizer": optimizer}, notes


def _adamw_moments(optimizer: Any, named: Named, may_be_absent: set[str]) -> tuple[dict[str, Named], str]:
    """AdamW's `step`, `exp_avg`, `exp_avg_sq` -> parameter -> tensor, or {} and the reason.

    An optimiser's state_dict() has no names: parameters are numbered in the order in which the model registered them,
    which is the order of the model's state dict. It is used only if every shape matches. Parameters that
    `may_be_absent` (fixed, or not in use) have no state in some files.
    """
    out: dict[str, Named] = {"step": {}, "exp_avg": {}, "exp_avg_sq": {}}
    try:
        ids = [i for group in optimizer["param_groups"] for i in group["params"]]
        for name, i in zip(named, ids, strict=True):
            state = optimizer["state"].get(i)
            if state is None and name in may_be_absent:
                continue
            for moment in ("exp_avg", "exp_avg_sq"):
                if state[moment].shape != named[name].shape or not bool(torch.isfinite(state[moment]).all()):
                    raise ValueError(f"{moment} of {name}")
                out[moment][name] = state[moment].detach()
            out["step"][name] = torch.tensor(float(state["step"]))
            if not 0 <= float(state["step"]) < 1 << 24:  # exact integers in float32
                raise ValueError(f"step of {name}")
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return {}, f"its optimiser state does not match its parameters ({first_line(error, 80)})"
    return out, ""


def _head(named: Named, model: Published, guided: PublishedHeads | None) -> Named:
    """A method's heads under selftrans's names, float32; a layer that predicts a token's cells in selftrans's cell order."""
    if guided is None:
        return {}
    heads = {guided.names.get(key, key): (key, x.float()) for key, x in named.items() if model.is_head(key)}
    return {own: model.cells(x) if key.startswith(guided.predicts_cells) else x for own, (key, x) in heads.items()}


def _expected_heads(config: RunConfig, model: Published) -> dict[str, tuple[int, ...]]:
    objective = meta_objective(config, stages(config)[0], model.shape, model.conditions)
    return {k: tuple(v.shape) for k, v in objective.state_dict().items() if not k.startswith("student.")}


def _converted(state: Named, model: Published, guided: PublishedHeads | None, moment: str) -> Named:
    """One moment of every parameter, by its name in the objective, converted like the parameter."""
    if moment == "step":
        student = {key: value for key, value in state.items() if not model.is_head(key) and not model.is_fixed(key)}
        names = guided.names if guided else {}
        heads = {names.get(key, key): value for key, value in state.items() if model.is_head(key)} if guided else {}
    else:
        student, heads = model.translate(state, moment == "exp_avg_sq"), _head(state, model, guided)
    return {f"student.{key}": value for key, value in student.items()} | heads


def _trained(file: PublishedFile, optimizer: Named, step: int | None) -> int | None:
    """Steps of training: `step`, else the count in the file, else the count of its optimiser."""
    if step is not None and step < 0:
        raise ValueError(f"--step {step} must not be negative")
    counted = max((int(value) for key, value in optimizer.items() if key.endswith(":step")), default=None)
    return next((n for n in (step, file.steps, counted) if n is not None), None)


def _autoencoder(model: Published, name: str | None) -> str:
    channels = model.shape[0]
    if name is None and channels not in AUTOENCODERS:
        raise ValueError(f"no default autoencoder decodes latents of {channels} channels; set one with --autoencoder")
    return autoencoder_name(name or AUTOENCODERS[channels])


def _write(
    out: Path,
    config: RunConfig,
    model: Published,
    step: int,
    parts: dict[str, Named],
    source: dict[str, Any],
    projectors: Named,
) -> Path:
    """Write the run directory atomically; returns its checkpoint's folder."""
    order = [stage.name for stage in stages(config)]
    classes = [str(label) for label in range(model.conditions.num_classes)]
    metadata = header(
        config, order[0], step, order=order, shape=model.shape, conditions=model.conditions, classes=classes,
        autoencoder=_autoencoder(model, source["autoencoder"]),
    ) | {"seconds": 0.0, "tflops": None, IMPORTED: source | {"steps": step}}  # fmt: skip
    state = metadata | {"window": {}, "scaler": None, "processes": 1, "teacher": None}
    try:
        with atomic_directory(out) as run:
            saved = checkpoint.save(run / order[0] / "checkpoints", step, parts, state, metadata)
            if projectors:
                save_file({key: value.clone() for key, value in projectors.items()}, run / "projectors.safetensors")
            write_text(run / "config.json", to_json(config))
            write_json(run / f"{IMPORTED}.json", source)
    except (OSError, SafetensorError) as error:
        cause = error.__cause__ or error  # of an error of `checkpoint.save`, whose message names a folder inside
        reason = getattr(cause, "strerror", None) or first_line(cause)
        raise OSError(f"{out} could not be written ({reason}); {FREE_SPACE}") from error
    return out / saved.relative_to(run)


def bound_settings(config: RunConfig, imported: RunConfig) -> dict[str, Any]:
    """Settings that cannot change while imported weights are not trained yet: method, model, path, sections of its stages."""
    known = stages(imported) if imported.method in METHODS else []  # code outside the package is not imported for this
    keys = {section.key for stage in known for section in stage.sections}
    return {
        name: value
        for name, value, _ in settings_of(config)
        if name in ("method", "train.path") or name.partition(".")[0] in {"model", *keys}
    }


def _command(config: RunConfig, out: Path) -> str:
    """The command line that continues an imported run: its recipe, and the settings that its weights require."""
    words = ["selftrans", "train", config.recipe, "--data", "DIR", "--out", str(out)]
    bound = bound_settings(config, config)
    usual = bound_settings(dataclasses.replace(recipe(config.recipe), method=config.method).restricted(), config)
    for name, value in bound.items():
        if usual.get(name) != value or name == "method":
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return " ".join(map(as_word, words))
