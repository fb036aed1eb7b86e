"""A published checkpoint ⇒ a run: sizes from its shapes, settings from the nearest recipe, AdamW's moments where they fit."""

from __future__ import annotations

import dataclasses
import json
import shlex
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import IMPORTED, header
from selftrans.config import Model, RunConfig, to_json
from selftrans.encoders.autoencoder import autoencoder_name
from selftrans.interop import sit_names as names
from selftrans.interop.published_file import Found, Named, listed, read
from selftrans.interop.sit_names import Convention, Sizes
from selftrans.methods import stages
from selftrans.methods.objective import Objective
from selftrans.models.sit import SIT
from selftrans.recipes import recipe
from selftrans.storage import atomic_directory, sha256_file, write_json
from selftrans.train.resume import essence

#: autoencoder of latents with this many channels, where none is named: the field's for 4, none for pixels
AUTOENCODERS = {1: "pixel", 3: "pixel", 4: "stabilityai/sd-vae-ft-mse"}
#: paths by their names in SiT's and REPA's options; GVP is the cosine path
PATH_NAMES = {"linear": "linear", "cosine": "cosine", "Linear": "linear", "GVP": "cosine"}


def import_run(
    file: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    convention: Convention | None = None,
    heads: int | None = None,
    step: int | None = None,
    autoencoder: str | None = None,
    keep_heads: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Make the run `out` of a published checkpoint (SiT, REPA, Self-Transcendence); returns its checkpoint's folder.

    A file with Self-Transcendence's head of stage 1 becomes a run of method `structure`, head included; any other one of
    method `vanilla`, its heads left out (`keep_heads`: in projectors.safetensors). AdamW's moments come along where they
    fit, turned with the weights (see `names.translate`). `name` is the published size expected, `convention` whose time
    the weights have (None: told or guessed, and said), `heads` those of attention, `step` the steps trained.

    Written whole or not at all. ValueError for a file that is none of these and for an `out` that holds anything else;
    the same import again does nothing.
    """
    file, out = Path(file), Path(out)
    found = read(file)
    named = found.weights.get("raw") or found.weights["ema"]
    sizes = names.sizes(str(file), named, heads)
    for kind, tensors in found.weights.items():
        names.check(f"{file} ({kind} weights)" if len(found.weights) > 1 else str(file), tensors, sizes)
    chosen, why = (convention, "as told") if convention else names.convention(found, named, sizes.learn_sigma)
    config = _config(found, named, sizes, name)
    source = {
        "path": str(file.resolve()),
        "sha256": sha256_file(file),
        "convention": chosen,
        "heads": sizes.heads,
    }
    source |= {"step": step, "autoencoder": autoencoder, "keep_heads": keep_heads}
    source |= {"unused": listed(found.unused)} if found.unused else {}
    if _occupied(out, source):
        say(f"{out} holds this import already")
        return checkpoint.steps(out / stages(config)[0].name / "checkpoints")[-1][1]
    parts, notes = _tensors(found, named, sizes, config, flip=chosen == "sit")
    trained = _trained(found, parts["optimizer"], step)
    if trained is None:
        notes.append("how long it was trained is not known: step 0 (--step N says it)")
    done = trained or 0
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=max(config.train.steps, done)))
    left = {f"{kind}.{n}": t for kind, state in found.weights.items() for n, t in state.items() if names.is_head(n)}
    if left and not parts["heads"]:
        notes.append(f"its projectors are {'in projectors.safetensors' if keep_heads else 'left out (--keep-heads)'}")
    path = _write(out, config, sizes, done, parts, source, left if keep_heads else {})
    for line in (f"time and sign are those of {chosen.upper()}, {why}", *notes):
        say(line)
    say(f"{_summary(config, sizes, autoencoder)}, after {done} steps -> {out}")
    say(f"to train on: {_command(config, out)}")
    return path


def _summary(config: RunConfig, sizes: Sizes, autoencoder: str | None) -> str:
    what = f"SiT of width {sizes.width}" if config.model.width else config.model.name
    latents = "x".join(map(str, sizes.shape))
    return f"{what}, latents {latents} of {_autoencoder(sizes, autoencoder)}, {sizes.classes} classes"


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


def _config(found: Found, named: Named, sizes: Sizes, name: str | None) -> RunConfig:
    """The run that goes on with these weights: sizes from the shapes, the rest from the nearest recipe."""
    args, own = found.args, {key: getattr(sizes, key) for key in ("width", "depth", "heads", "patch")}
    published = next((known for known, made in SIT.items() if made == own), None)
    if name is not None and name != published:
        raise ValueError(f"{found.path} is not {name}: it has {', '.join(f'{k} {v}' for k, v in own.items())}")
    if args.get("prediction", "v") not in ("v", "velocity"):
        raise ValueError(f"{found.path} predicts {args['prediction']}; only models of the velocity can be used")
    if str(args.get("path_type", "linear")) not in PATH_NAMES:
        raise ValueError(f"{found.path} was trained on the path {args['path_type']}, which selftrans does not have")
    if args.get("num_classes", sizes.classes) != sizes.classes:
        raise ValueError(
            f"{found.path} has {sizes.classes + 1} label vectors for {args['num_classes']} classes; expected one more than "
            "classes, for the null label"
        )
    imagenet = published and published.endswith("/2") and sizes.shape == (4, 32, 32) and sizes.classes == 1000
    base = recipe(f"sit_imagenet_{published[4:-2].lower()}2" if published and imagenet else "imagefolder")
    model = Model(name=published, qk_norm=sizes.qk_norm) if published else Model(**own, qk_norm=sizes.qk_norm)
    path = PATH_NAMES[str(args.get("path_type", "linear"))]
    train = dataclasses.replace(base.train, path=path)
    config = dataclasses.replace(base, method="vanilla", model=model, train=train)
    if "projectors_final.linear.weight" not in named or "projectors.0.weight" not in named:
        return config
    try:
        span = args.get("t_range")
        stage1 = dataclasses.replace(
            base.stage1,
            block=int(args.get("encoder_depth", base.stage1.block)),
            weight=float(args.get("proj_coeff", base.stage1.weight)),
            timestep_range=(float(span[0]), float(span[1])) if span else None if args else base.stage1.timestep_range,
            range_mode="scale",  # what the released code computes
            head_width=named["projectors.0.weight"].shape[0],
        )
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{found.path}: the options kept in it cannot be used ({error})") from error
    return dataclasses.replace(config, method="structure", stage1=stage1)


def _tensors(
    found: Found, named: Named, sizes: Sizes, config: RunConfig, *, flip: bool
) -> tuple[dict[str, Named], list[str]]:
    """The tensors of our checkpoint, and what the user should know about them."""
    notes = [f"not used of it: {listed(found.unused)}"] if found.unused else []
    states = {kind: names.translate(state, sizes, flip=flip) for kind, state in found.weights.items()}
    if len(states) == 1:
        held, absent = ("ema", "raw") if "ema" in states else ("raw", "ema")
        notes.append(f"it holds one set of weights; they stand for {absent} as for {held}")
    raw, ema = (states.get(a) or states[b] for a, b in (("raw", "ema"), ("ema", "raw")))
    head = names.stage1_head(named, sizes) if config.method == "structure" else {}
    if head:
        with torch.device("meta"):
            student = config.model.build(sizes.shape, sizes.classes)
            objective = Objective(student, stages(config)[0].guide(student, None))
        expected = {k: tuple(v.shape) for k, v in objective.state_dict().items() if not k.startswith("student.")}
        names.compare(f"{found.path} (its head of stage 1)", head, expected)
    for key, tensor in [item for state in (raw, ema, head) for item in state.items()]:
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{found.path}: {key} holds values that are not finite; its training has broken down")
    optimizer: Named = {}
    if found.optimizer is not None:
        moments, reason = names.moments(found.optimizer, named if "raw" in found.weights else {})
        notes += [f"the optimiser starts afresh: {reason}"] if reason else []
        for moment, state in moments.items():
            for key, value in _turned(state, sizes, moment, flip=flip, head=bool(head)).items():
                optimizer[f"{key}:{moment}"] = value
    else:
        notes.append("the optimiser starts afresh: the file has no state of one")
    return {"student": raw, "ema": ema, "heads": head, "optimizer": optimizer}, notes


def _turned(state: Named, sizes: Sizes, moment: str, *, flip: bool, head: bool) -> Named:
    """One moment of every parameter, by its name in the objective, turned as its parameter was."""
    if moment == "step":
        student = {key: value for key, value in state.items() if not names.is_head(key) and key != "pos_embed"}
        heads = {names.STAGE1_HEAD.get(key, key): value for key, value in state.items() if names.is_head(key)}
    else:
        student = names.translate(state, sizes, flip=flip, squares=moment == "exp_avg_sq")
        heads = names.stage1_head(state, sizes)
    return {f"student.{key}": value for key, value in student.items()} | (heads if head else {})


def _trained(found: Found, optimizer: Named, step: int | None) -> int | None:
    """Steps of training: as told, as counted in the file, or as its optimiser counted them."""
    if step is not None and step < 0:
        raise ValueError(f"--step {step} must not be negative")
    counted = max((int(value) for key, value in optimizer.items() if key.endswith(":step")), default=None)
    return next((n for n in (step, found.steps, counted) if n is not None), None)


def _autoencoder(sizes: Sizes, name: str | None) -> str:
    if name is None and sizes.shape[0] not in AUTOENCODERS:
        raise ValueError(f"what decodes latents of {sizes.shape[0]} channels is not known; say it with --autoencoder")
    return autoencoder_name(name or AUTOENCODERS[sizes.shape[0]])


def _write(
    out: Path,
    config: RunConfig,
    sizes: Sizes,
    step: int,
    parts: dict[str, Named],
    source: dict[str, Any],
    projectors: Named,
) -> Path:
    """The run directory, written completely or not at all; returns its checkpoint's folder."""
    stage, autoencoder = stages(config)[0].name, _autoencoder(sizes, source["autoencoder"])
    classes = [str(label) for label in range(sizes.classes)]
    data: Any = types.SimpleNamespace(
        shape=sizes.shape, num_classes=len(classes), classes=classes, autoencoder=autoencoder
    )
    about = header(config, stage, step, data) | {"seconds": 0.0, "tflops": None, IMPORTED: source | {"steps": step}}
    state = about | {"window": {}, "scaler": None, "processes": 1, "teacher": None}
    try:
        with atomic_directory(out) as run:
            saved = checkpoint.save(run / stage / "checkpoints", step, parts, state, about)
            if projectors:
                save_file({key: value.clone() for key, value in projectors.items()}, run / "projectors.safetensors")
            write_json(run / "config.json", json.loads(to_json(config)))
            write_json(run / f"{IMPORTED}.json", source)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{out} could not be written ({error}); make room, or choose another --out") from error
    return out / saved.relative_to(run)


def _command(config: RunConfig, out: Path) -> str:
    """What continues an imported run, as it is typed: its recipe, and what its weights are bound to."""
    words = ["selftrans", "train", config.recipe, "--data", "DIR", "--out", str(out)]
    bound, base = essence(config, config), essence(recipe(config.recipe), config)
    flat = {"method": config.method} | {
        f"{s}.{k}": v for s, part in bound.items() if s != "method" for k, v in part.items()
    }
    usual = {f"{s}.{k}": v for s, part in base.items() if s != "method" for k, v in part.items()}
    for name, value in flat.items():
        if usual.get(name) != value or name == "method":
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)
