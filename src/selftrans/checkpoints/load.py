"""From a path to a model: a run, a stage, a checkpoint or a single weights file, found, checked and built."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import load_file

from selftrans.checkpoints import format as checkpoint
from selftrans.config import RunConfig, from_json, to_json
from selftrans.data.dataset import Manifest
from selftrans.models.sit import SiT
from selftrans.storage import first_line, printable, sha256_file

Weights = Literal["raw", "ema"]
FILES: dict[str, str] = {"raw": "student.safetensors", "ema": "ema.safetensors"}
EXPORTED = "model.safetensors"  #: in a folder that `selftrans export` wrote
IMPORTED = "imported"  #: header entry of weights from elsewhere: their source; of a run of them, the name of a json


class LoadedModel(NamedTuple):
    """A model with its weights, and where they came from."""

    model: SiT
    config: RunConfig
    stage: str
    weights: Weights  #: what the file says it holds
    step: int
    autoencoder: str  #: name or path, for decoding
    classes: tuple[str, ...]
    source: dict[str, Any]  #: {"path", "sha256", "weights"}, and where imported; what a checkpoint keeps of its teacher


def header(config: RunConfig, stage: str, step: int, manifest: Manifest) -> dict[str, Any]:
    """What a weights file must say of itself so that `load_model` can build the model and decode its latents."""
    return {
        "stage": stage,
        "step": step,
        "shape": list(manifest.shape),
        "num_classes": manifest.num_classes,
        "classes": list(manifest.classes),
        "autoencoder": config.data.autoencoder or manifest.autoencoder,
        "config": json.loads(to_json(config)),
    }


def check_data(found: checkpoint.Checkpoint, manifest: Manifest) -> None:
    """ValueError unless a checkpoint's model is one for these data."""
    was = (tuple(found.state["shape"]), found.state["num_classes"])
    if was != (tuple(manifest.shape), manifest.num_classes):
        raise ValueError(
            f"{found.path} was trained on latents {was[0]} with {was[1]} classes, the data are {tuple(manifest.shape)} with "
            f"{manifest.num_classes}; give data prepared alike, or another --out"
        )


def agreed(folder: Path, accelerator: Accelerator) -> checkpoint.Checkpoint | None:
    """The checkpoint that all processes continue from: the newest valid one that rank 0 sees.

    ValueError in a process that cannot read it. Remains of interrupted writes are removed.
    """
    found = None
    if accelerator.is_main_process:
        checkpoint.remove_unfinished(folder)
        found = checkpoint.newest(folder)
    (step,) = broadcast_object_list([found.step if found else None])
    if step is None or found is not None:
        return found
    try:
        return checkpoint.read(checkpoint.path_of_step(folder, step))
    except ValueError as error:
        raise ValueError(f"{error}, though another process has read it: all must see the same --out") from error


@contextlib.contextmanager
def usable(found: checkpoint.Checkpoint, *errors: type[Exception]) -> Iterator[None]:
    """ValueError that names a checkpoint whose state, whole as it is, does not say what it should."""
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
    held = [name for name in _stage_order(path) if (path / name / "checkpoints").is_dir()]
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


def _stage_order(run: Path) -> list[str]:
    """Stage folders of a run, the last one last."""
    names = sorted(p.name for p in run.iterdir() if p.is_dir())
    return sorted(names, key=lambda name: name != "stage1")


def load_model(origin: str | Path, *, stage: str | None = None, weights: Weights = "ema") -> LoadedModel:
    """Build the model that `origin` stands for (see `find`) and load its weights, strictly, in eval mode."""
    path = find(origin, stage=stage, weights=weights)
    said = checkpoint.read_header(path)
    try:
        config = from_json(json.dumps(said["config"]))
        channels, height, side = (int(n) for n in said["shape"])
        shape, classes = (channels, height, side), int(said["num_classes"])
        _check_fit(path, config, shape, classes)
        model = config.model.build(shape, classes)
        name, step = str(said["stage"]), int(said["step"])
        held: Weights = "ema" if said.get("weights") == "ema" else "raw"
        autoencoder, names = str(said["autoencoder"]), tuple(map(str, said["classes"]))
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


def _check_fit(path: Path, config: RunConfig, shape: tuple[int, ...], num_classes: int) -> None:
    """ValueError unless the tensors of a weights file are those of its model; before anything of a stranger's size is made."""
    with safe_open(path, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    if config.model.sizes()["depth"] <= len(found) and 0 < min(shape) <= max(shape) <= 1 << 16:
        with torch.device("meta"):
            model = config.model.build(shape, num_classes)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        wrong = sorted(name for name in found | expected if found.get(name) != expected.get(name))
        if not wrong:
            return
        raise ValueError(f"{wrong[0]} is {found.get(wrong[0])} where its header asks for {expected.get(wrong[0])}")
    raise ValueError(
        f"its header asks for {config.model.sizes()} on latents {shape}, which its {len(found)} tensors are not"
    )


def load_teacher(source: str | Path, *, weights: Weights, shape: tuple[int, ...], num_classes: int) -> LoadedModel:
    """A stage-1 or imported model for latents `shape` and `num_classes` classes. ValueError: what was expected and found."""
    found = load_model(find_teacher(source, weights), weights=weights)
    if found.stage != "stage1" and IMPORTED not in found.source:
        raise ValueError(
            f"{found.source['path']} holds weights of '{found.stage}'; expected a teacher trained in stage 1, or imported"
        )
    if found.model.shape != tuple(shape) or found.model.num_classes != num_classes:
        raise ValueError(
            f"the teacher {found.source['path']} was trained on latents {found.model.shape} with {found.model.num_classes} "
            f"classes; expected {tuple(shape)} with {num_classes} classes, as in the data"
        )
    return found


def find_teacher(source: str | Path, weights: Weights) -> Path:
    """The weights file that teaches: of a run with stages to choose from its `stage1`, of an imported run its last."""
    path = Path(source)
    single = not path.is_dir() or (path / "checkpoints").is_dir() or (path / checkpoint.STATE).exists()
    return find(path, stage=None if single or (path / f"{IMPORTED}.json").exists() else "stage1", weights=weights)


def check_given(found: LoadedModel, config: RunConfig, manifest: Manifest) -> None:
    """ValueError where a teacher learned another path than the student's; a warning where its latents may be others."""
    source, path, theirs = found.source["path"], found.config.train.path, found.autoencoder
    if path != config.train.path:
        raise ValueError(
            f"the teacher {source} was trained on the {path} path, the student's train.path is {config.train.path}: the same t "
            f"is another noise level; give a teacher of that path, or --train.path {path}"
        )
    ours = config.data.autoencoder or manifest.autoencoder
    if theirs and ours and theirs != ours:
        warnings.warn(
            f"the teacher {source} names the autoencoder {printable(theirs)}, the data {printable(ours)}; unless both are the "
            "same, its features mean nothing here: give a teacher of these latents",
            stacklevel=4,
        )


def check_teacher(found: checkpoint.Checkpoint, teacher: Any) -> None:
    """ValueError when a checkpoint was trained with other teacher weights than those given now."""
    was = found.state.get("teacher")
    if was and teacher and was.get("weights") != teacher.source.get("weights"):
        raise ValueError(
            f"{found.path} was trained with the teacher {was.get('path')} (sha256 {was.get('sha256', '')[:12]}), which is "
            "not the one given now; give that teacher, or another --out"
        )
