"""From a path to a model: a run, a stage, a checkpoint or a single weights file, found, checked and built."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from selftrans.checkpoints import format as checkpoint
from selftrans.config import RunConfig, from_json, to_json
from selftrans.plugins import NotFound
from selftrans.sections import from_plain
from selftrans.storage import first_line, printable, sha256_file
from selftrans.types import Backbone, Conditions

Weights = Literal["raw", "ema"]
FILES: dict[str, str] = {"raw": "student.safetensors", "ema": "ema.safetensors"}
EXPORTED = "model.safetensors"  #: in a folder that `selftrans export` wrote
IMPORTED = "imported"  #: header entry of weights from elsewhere: their source; of a run of them, the name of a json
REPORT = "run.json"  #: of a run: the order of its stages and, when it is finished, what it cost
LARGEST = 1 << 16  #: side of a latent: what is beyond is a mistake, or an attempt to take all memory


class LoadedModel(NamedTuple):
    """A model with its weights, and where they came from."""

    model: Backbone
    config: RunConfig
    stage: str
    weights: Weights  #: what the file says it holds
    step: int
    autoencoder: str  #: name or path, for decoding
    classes: tuple[str, ...]
    source: dict[str, Any]  #: {"path", "sha256", "weights"}, and where imported; what a checkpoint keeps of its teacher


def header(
    config: RunConfig,
    stage: str,
    step: int,
    *,
    order: Sequence[str],
    shape: tuple[int, ...],
    conditions: Conditions,
    classes: Sequence[str],
    autoencoder: str,
) -> dict[str, Any]:
    """What a weights file must say of itself so that `load_model` can build the model and decode its latents.

    `order` holds the stages of the run, the last one last.
    """
    return {
        "stage": stage,
        "step": step,
        "order": list(order),
        "shape": list(shape),
        "conditions": asdict(conditions),
        "classes": list(classes),
        "autoencoder": config.data.autoencoder or autoencoder,
        "config": json.loads(to_json(config)),
    }


def find(source: str | Path, *, stage: str | None = None, weights: Weights = "ema") -> Path:
    """The weights file that `source` stands for: a run, stage or checkpoint directory, or the file itself.

    Of a run, the newest checkpoint of `stage` (None: of its last stage). ValueError says what was expected.
    """
    path = Path(source)
    if path.is_file():
        return path
    if (path / checkpoint.STATE).exists():
        return checkpoint.read(path).path / FILES[weights]
    if (path / "checkpoints").is_dir():
        return _newest(path, weights)
    if not path.is_dir():
        raise ValueError(
            f"{path} does not exist; expected a run directory, a checkpoint or a .safetensors weights file"
        )
    held = stages_held(path)
    if not held and (path / EXPORTED).is_file():
        return path / EXPORTED
    if stage is not None and stage not in held:
        found = f"it holds {', '.join(held)}" if held else "it holds no stage at all"
        raise ValueError(f"{path} has no {stage}: {found}; expected a run directory with a {stage} (selftrans train)")
    if not held:
        raise ValueError(
            f"{path} is no run directory (no checkpoints in it); expected what selftrans train --out wrote"
        )
    return _newest(path / (stage or held[-1]), weights)


def _newest(stage: Path, weights: Weights) -> Path:
    found = checkpoint.newest(stage / "checkpoints")
    if found is None:
        raise ValueError(f"{stage / 'checkpoints'} holds no valid checkpoint; train on, or choose another run")
    return found.path / FILES[weights]


def stages_held(run: Path) -> list[str]:
    """Stages of a run that have checkpoints, in the order in which they are trained, the last one last."""
    there = sorted(path.name for path in run.iterdir() if (path / "checkpoints").is_dir())
    order = _order(run, there)
    return sorted(there, key=lambda name: (order.index(name) if name in order else len(order), name))


def _order(run: Path, there: Sequence[str]) -> list[str]:
    """The order of a run's stages, as run.json records it; where that is lost or damaged, as its checkpoints do."""
    try:
        return _names(json.loads((run / REPORT).read_text())["order"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    for name in there if len(there) > 1 else ():
        for _, folder in reversed(checkpoint.steps(run / name / "checkpoints")):
            try:
                return _names(json.loads((folder / checkpoint.STATE).read_text())["order"])
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                continue
    return []


def _names(order: Any) -> list[str]:
    if not isinstance(order, list) or not all(isinstance(x, str) and re.fullmatch(r"[\w.-]{1,100}", x) for x in order):
        raise ValueError("the order of stages is no list of names")
    return order


def load_model(origin: str | Path, *, stage: str | None = None, weights: Weights = "ema") -> LoadedModel:
    """Build the model that `origin` stands for (see `find`) and load its weights, strictly, in eval mode."""
    path = find(origin, stage=stage, weights=weights)
    said = checkpoint.read_header(path)
    try:
        config = from_json(json.dumps(said["config"]), lenient=True)
        shape = tuple(int(n) for n in said["shape"])
        conditions = from_plain(Conditions, said["conditions"], "conditions")
        _check_fit(path, config, shape, conditions)
        model = config.build_model(shape, conditions)
        name, step = str(said["stage"]), int(said["step"])
        held: Weights = "ema" if said.get("weights") == "ema" else "raw"
        autoencoder, names = str(said["autoencoder"]), tuple(map(str, said["classes"]))
    except NotFound as error:
        raise ValueError(f"{path}: {error.in_file}") from error
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not say how to build its model ({first_line(error)}); was it written by another version?"
        ) from error
    if stage is not None and stage != name:
        raise ValueError(
            f"{path} holds weights of {printable(name)}, not of {stage}; give the run directory to choose a stage of it"
        )
    model.load_state_dict(load_file(path), strict=True)
    source = {
        "path": str(path.resolve()),
        "sha256": sha256_file(path),
        "weights": checkpoint.weights_sha256(path),
    } | ({IMPORTED: said[IMPORTED]} if IMPORTED in said else {})
    return LoadedModel(model.eval(), config, name, held, step, autoencoder, names, source)


def _check_fit(path: Path, config: RunConfig, shape: tuple[int, ...], conditions: Conditions) -> None:
    """ValueError unless the tensors of a weights file are those of its model, before anything of a hostile size is made."""
    with safe_open(path, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    config.model.check()
    if config.model.blocks() > len(found) or not shape or not 0 < min(shape) <= max(shape) <= LARGEST:
        raise ValueError(
            f"its header asks for {config.model.blocks()} blocks on latents {shape}, which its {len(found)} tensors are not"
        )
    with torch.device("meta"):
        model = config.build_model(shape, conditions)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = sorted(name for name in found | expected if found.get(name) != expected.get(name))
    if wrong:
        raise ValueError(f"{wrong[0]} is {found.get(wrong[0])} where its header asks for {expected.get(wrong[0])}")
