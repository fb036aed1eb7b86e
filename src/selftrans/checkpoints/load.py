"""Load a model from a run, a stage, a checkpoint, a weights file, a pipeline's folder, or the hub."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints import hub
from selftrans.checkpoints.adapted import frozen_weights, full_weights, weights_hash
from selftrans.config import RunConfig, from_object, to_object
from selftrans.encoders.pretrained import encoder_name
from selftrans.messages import first_line, plural, printable
from selftrans.plain_json import from_plain, recorded
from selftrans.plugins import NotFound
from selftrans.storage import sha256_file
from selftrans.types import Backbone, Conditions

Weights = Literal["raw", "ema"]
FILES: dict[str, str] = {"raw": "student.safetensors", "ema": "ema.safetensors"}
EXPORTED = "model.safetensors"  #: the weights in a folder written by `selftrans export`
PIPELINE = "model_index.json"  #: in a folder written by `selftrans export --layout pipeline`
#: in such a folder: its weights, what decodes its latents, and the encoder of its prompts
TRANSFORMER, VAE, TEXT_ENCODER = "transformer/diffusion_pytorch_model.safetensors", "vae", "text_encoder"
PREFIX = "prefix"  #: header entry: what the names of all tensors begin with
IMPORTED = "imported"  #: header entry with the source of imported weights; also the name of a json in their run
REPORT = "run.json"  #: in a run: the order of its stages and, when it is finished, its cost
LARGEST = 1 << 16  #: largest side of a latent; a larger one is an error or an attempt to exhaust the memory


class LoadedModel(NamedTuple):
    """A model with its weights and their source."""

    model: Backbone
    config: RunConfig
    stage: str
    weights: Weights  #: kind of the weights, from the header
    step: int
    autoencoder: str  #: name or path, for decoding
    classes: tuple[str, ...]
    source: dict[str, Any]  #: {"path", "sha256", "weights"}, plus IMPORTED; a checkpoint records this for its teacher
    prompts: tuple[str, ...] = ()  #: of a model of text: the prompts of its previews
    present: tuple[int, ...] = ()  #: the classes that occur in its data; empty: all, or unknown


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
    prompts: Sequence[str] = (),
    present: Sequence[int] = (),
) -> dict[str, Any]:
    """The header of a weights file: all that `load_model` needs to build the model and decode its latents.

    `order`: the stages of the run in order. `prompts`: of a model of text, sampled where no others are given. `present`: the
    classes that occur in the data, if these are not all.
    """
    # the name that the data store is "" without text, else independent of the working directory
    moved = config.data.text_encoder
    encoder = encoder_name(moved) if moved else conditions.encoder
    return {
        "stage": stage,
        "step": step,
        "order": list(order),
        "shape": list(shape),
        "conditions": asdict(conditions) | {"encoder": encoder},
        "classes": list(classes),
        "autoencoder": config.data.autoencoder or autoencoder,
        "config": to_object(config),
    } | {name: list(given) for name, given in (("prompts", prompts), ("present", present)) if given}


def find(source: str | Path, *, stage: str | None = None, weights: Weights = "ema") -> Path:
    """The weights file of `source`: a run, stage or checkpoint directory, a pipeline's folder, a model on the hub (see
    `hub`), or the file itself.

    For a run, the newest checkpoint of `stage` (None: its last stage). ValueError says what was expected.
    """
    path = hub.local(source)
    if path.is_file():
        return path
    if (path / PIPELINE).is_file() and (path / TRANSFORMER).is_file():
        return path / TRANSFORMER
    if (path / checkpoint.STATE).exists():
        return checkpoint.read(path).path / FILES[weights]
    if (path / "checkpoints").is_dir():
        return _newest(path, weights)
    if not path.is_dir():
        raise ValueError(
            f"{path} does not exist; expected a run directory, a checkpoint or a .safetensors weights file"
        )
    existing = stages_held(path)
    if not existing and (path / EXPORTED).is_file():
        return path / EXPORTED
    if stage is not None and stage not in existing:
        held = f"it holds {', '.join(existing)}" if existing else "it holds no stage"
        raise ValueError(f"{path} has no {stage}: {held}; expected a run directory with a {stage} (selftrans train)")
    if not existing:
        raise ValueError(
            f"{path} is not a run directory (no checkpoints in it); expected a directory written by selftrans train"
        )
    return _newest(path / (stage or existing[-1]), weights)


def find_asked(source: str | Path, *, stage: str | None = None, weights: Weights = "ema") -> Path:
    """As `find`, for the options of a command.

    Warns where raw weights are wanted and the file holds the average, and where the last stage of a run has no checkpoint yet,
    so that an earlier stage is used.
    """
    file = find(source, stage=stage, weights=weights)
    with suppress(ValueError):  # no weights file: reported when it is loaded
        metadata = checkpoint.read_header(file)
        if weights == "raw" and metadata.get("weights") == "ema":
            warnings.warn(
                f"{file} holds the moving average alone (ema), which is used in place of the raw weights",
                stacklevel=3,
            )
        order, run = _names(metadata.get("order", [])), file.parents[3:4]
        if stage is None and order and run == (Path(source),) and metadata.get("stage") in order[:-1]:
            warnings.warn(
                f"the last stage of {source}, {order[-1]}, has no checkpoint yet: {metadata['stage']} is used, at step "
                f"{metadata.get('step')}; `selftrans train` with the same options continues the run",
                stacklevel=3,
            )
    return file


def _newest(stage: Path, weights: Weights) -> Path:
    newest = checkpoint.newest(stage / "checkpoints")
    if newest is None:
        raise ValueError(f"{stage / 'checkpoints'} holds no valid checkpoint; continue training or choose another run")
    return newest.path / FILES[weights]


def stages_held(run: Path) -> list[str]:
    """Stages of a run that have checkpoints, in the order of training."""
    existing = sorted(path.name for path in run.iterdir() if (path / "checkpoints").is_dir())
    order = _order(run, existing)
    return sorted(existing, key=lambda name: (order.index(name) if name in order else len(order), name))


def _order(run: Path, existing: Sequence[str]) -> list[str]:
    """The order of a run's stages, from run.json or, if that is missing or damaged, from its checkpoints."""
    several = existing if len(existing) > 1 else ()
    folders = (folder for name in several for _, folder in reversed(checkpoint.steps(run / name / "checkpoints")))
    files = itertools.chain([run / REPORT], (folder / checkpoint.STATE for folder in folders))
    orders = (recorded(file, lambda held: _names(held["order"]), None) for file in files)
    return next((order for order in orders if order is not None), [])


def _names(order: Any) -> list[str]:
    if not isinstance(order, list) or not all(isinstance(x, str) and re.fullmatch(r"[\w.-]{1,100}", x) for x in order):
        raise ValueError("the order of stages is not a list of names")
    return order


def load_model(origin: str | Path, *, stage: str | None = None, weights: Weights = "ema") -> LoadedModel:
    """Build the model of `origin` (see `find`) and load its weights, strictly, in eval mode; adapters are merged into it."""
    path = find(origin, stage=stage, weights=weights)
    metadata = checkpoint.read_header(path)
    frozen = frozen_weights(path, metadata)
    try:
        config, shape, conditions = architecture(metadata)
        autoencoder, prefix = str(metadata["autoencoder"]), str(metadata.get(PREFIX, ""))
        if folder := pipeline_of(path):
            autoencoder = str(folder / VAE) if (folder / VAE).is_dir() else autoencoder
            if (folder / TEXT_ENCODER).is_dir():
                conditions = replace(conditions, encoder=str(folder / TEXT_ENCODER))
        _check_fit(frozen or path, prefix, config, shape, conditions)
        model = config.build_model(shape, conditions)
        name, step = str(metadata["stage"]), int(metadata["step"])
        kind: Weights = "ema" if metadata.get("weights") == "ema" else "raw"
        classes = tuple(map(str, metadata["classes"]))
        prompts = from_plain(tuple[str, ...], metadata.get("prompts", []), "prompts")
        present = _present(metadata, conditions)
    except NotFound as error:
        raise ValueError(f"{path}: {error.in_file}") from error
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"the header of {path} does not describe its model ({first_line(error)}); was it written by another version?"
        ) from error
    if stage is not None and stage != name:
        raise ValueError(
            f"{path} holds weights of {printable(name)}, not of {stage}; give the run directory to choose a stage of it"
        )
    tensors = full_weights(path, frozen, config)
    model.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, strict=True)
    source = {
        "path": hub.pinned(path) or str(path.resolve()),
        "sha256": sha256_file(path),
        "weights": weights_hash(path, frozen),
    } | ({IMPORTED: metadata[IMPORTED]} if IMPORTED in metadata else {})
    return LoadedModel(model.eval(), config, name, kind, step, autoencoder, classes, source, prompts, present)


def architecture(metadata: dict[str, Any]) -> tuple[RunConfig, tuple[int, ...], Conditions]:
    """Settings, shape of a latent and conditions in the header of a weights file, from which its model is built.

    ValueError, KeyError or TypeError for a header of another kind.
    """
    config = from_object(metadata["config"], lenient=True)
    shape = tuple(int(n) for n in metadata["shape"])
    return config, shape, from_plain(Conditions, metadata["conditions"], "conditions")


def pipeline_of(weights: Path) -> Path | None:
    """The folder of the pipeline that a weights file belongs to; None where it belongs to none."""
    folder = weights.parent.parent
    return folder if weights == folder / TRANSFORMER and (folder / PIPELINE).is_file() else None


def _present(metadata: dict[str, Any], conditions: Conditions) -> tuple[int, ...]:
    """The classes that the data had. Raises ValueError for labels that the model does not have."""
    present = from_plain(tuple[int, ...], metadata.get("present", []), "present")
    if list(present) != sorted({*present} & set(range(conditions.num_classes))):
        raise ValueError(f"present {list(present)!r:.60} does not list classes of {conditions}, in order")
    return present


def _check_fit(path: Path, prefix: str, config: RunConfig, shape: tuple[int, ...], conditions: Conditions) -> None:
    """ValueError unless a file's tensors match its model; checked before memory is allocated for the sizes in the header."""
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    stored = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    config.model.check()
    if config.model.blocks() > len(stored) or not shape or not 0 < min(shape) <= max(shape) <= LARGEST:
        raise ValueError(
            f"its header describes {plural(config.model.blocks(), 'block')} on latents {shape}, but it holds "
            f"{plural(len(stored), 'tensor')}"
        )
    with torch.device("meta"):
        model = config.build_model(shape, conditions)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = sorted(name for name in stored | expected if stored.get(name) != expected.get(name))
    if wrong:
        raise ValueError(f"{wrong[0]} is {stored.get(wrong[0])}, its header describes {expected.get(wrong[0])}")
