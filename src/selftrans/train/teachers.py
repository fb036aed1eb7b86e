"""The teacher of a stage: an earlier stage of the run, a run or file from the settings, or an external encoder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints import hub
from selftrans.checkpoints.load import IMPORTED, PIPELINE, LoadedModel, find, load_model, stages_held
from selftrans.config import RunConfig
from selftrans.data.dataset import Dataset
from selftrans.data.manifest import Manifest
from selftrans.encoders.identity import check_scale, identity_kind, same_latents
from selftrans.encoders.vision import Encoder, load_encoder
from selftrans.messages import as_word, printable
from selftrans.methods.guidance import Frozen
from selftrans.methods.spec import Stage, TeacherSpec
from selftrans.precision import PRECISIONS
from selftrans.train.given_weights import check_path


class StoredFeatures:
    """Features stored with the data: their sizes and source, without a model to compute them."""

    encode, flops, model = None, 0, None

    def __init__(self, dataset: Dataset) -> None:
        found = dataset.open_features()
        self.grid, self.width = (found.grid, found.grid), found.width
        self.source: dict[str, Any] = {"path": found.encoder, "sha256": found.sha256, "weights": found.sha256}


Teacher = Frozen | Encoder | StoredFeatures


def teacher_of(config: RunConfig, stage: Stage, run: str, dataset: Dataset, device: torch.device) -> Teacher | None:
    """The frozen model or the external encoder of a stage, in the precision of the run; None for a stage without one.

    `run` is the directory whose earlier stage teaches, unless a teacher is given by the settings.
    """
    dtype = PRECISIONS[config.train.precision]
    if stage.encoder:
        return external_encoder(stage.encoder.name, config, dataset, device, dtype)
    if stage.teacher is None:
        return None
    found = load_teacher(stage.teacher.given or run, stage.teacher, dataset.manifest)
    if stage.teacher.given:
        check_given(found, config, dataset.manifest)
    if found.weights != stage.teacher.weights:
        warnings.warn(
            f"{found.source['path']} holds {found.weights} weights, which are used; the setting {stage.teacher.weights} "
            "is ignored",
            stacklevel=3,
        )
    block = stage.teacher.block(found.model.depth)
    return Frozen(found.model, block, dtype=dtype, source=found.source, in_place=True)


def load_teacher(source: str | Path, spec: TeacherSpec, manifest: Manifest) -> LoadedModel:
    """A teacher for these data; ValueError says what does not fit. Warns of one of another stage that is not imported."""
    found = load_model(find_teacher(source, spec), weights=spec.weights)
    if found.stage != spec.stage and IMPORTED not in found.source:
        warnings.warn(
            f"the teacher {found.source['path']} was trained in {found.stage}, not in {spec.stage}; it teaches as it is",
            stacklevel=4,
        )
    model, shape = found.model, tuple(manifest.shape)
    if tuple(model.shape) != shape or not model.conditions.fits(manifest.conditions):
        raise ValueError(
            f"the teacher {found.source['path']} was trained on latents {tuple(model.shape)} with {model.conditions}; "
            f"expected {shape} with {manifest.conditions}, as in the data"
        )
    return found


def find_teacher(source: str | Path, spec: TeacherSpec) -> Path:
    """The weights file of a teacher: in a run that of the stage in `spec`, in an imported run that of the last stage.

    ValueError for a run without that stage: only by its own folder another stage may be named.
    """
    path, weights = hub.local(source), spec.weights
    single = (
        not path.is_dir()
        or (path / PIPELINE).is_file()
        or (path / "checkpoints").is_dir()
        or (path / checkpoint.STATE).exists()
    )
    if single or (path / f"{IMPORTED}.json").exists():
        return find(path, weights=weights)
    if (held := stages_held(path)) and spec.stage not in held:
        raise ValueError(
            f"{path} has no {spec.stage}: it holds {', '.join(held)}; to be taught by that model as it is, give "
            f"{path / held[-1]}"
        )
    return find(path, stage=spec.stage, weights=weights)


def training_cost(spec: TeacherSpec) -> dict[str, Any] | None:
    """Steps, compute and time of the training of a given teacher, from its file; None where the run trains its own."""
    if spec.given is None:
        return None
    path = find_teacher(spec.given, spec)
    header = checkpoint.read_header(path)
    return {
        "path": hub.pinned(path) or str(path),
        "steps": header["step"],
        "tflops": header.get("tflops"),
        "seconds": header.get("seconds"),
    }


def check_given(found: LoadedModel, config: RunConfig, manifest: Manifest) -> None:
    """ValueError where a teacher was trained on another path than the student; a warning where its latents may differ."""
    source, theirs = found.source["path"], found.autoencoder
    check_path(f"the teacher {source} was", found.config.train.path, config)
    ours = config.data.autoencoder or manifest.autoencoder
    check_scale(f"the teacher {source}", theirs, manifest.autoencoder)
    if theirs and ours and not same_latents(theirs, ours):
        warnings.warn(
            f"the teacher {source} names the autoencoder {printable(theirs)}, the data {printable(ours)}; unless both are the "
            "same, its features do not fit: give a teacher of these latents",
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


def external_encoder(
    name: str | None, config: RunConfig, dataset: Dataset, device: torch.device, dtype: torch.dtype
) -> StoredFeatures | Encoder:
    """The encoder `name` on the grid of the student's tokens; for None the features stored with the data.

    Raises ValueError for data without features, and for a name where the data hold no pixels to encode.
    """
    manifest = dataset.manifest
    if len(dataset.parts) > 1:
        raise ValueError(
            f"{dataset.path} holds buckets of several sizes, and an external encoder's features are on one square grid; give "
            "data of one --resolution, or another --method"
        )
    words = f"prepare {as_word(manifest.source)} --out {as_word(dataset.path)} --features MODEL"
    prepare = f"`selftrans {words}`, its other options as they were"
    pixels = identity_kind(manifest.autoencoder) == "pixel"
    if name is not None and not pixels:
        raise ValueError(
            f"{dataset.path} holds latents of {manifest.autoencoder}, and encoder {name} reads pixels; store its features "
            f"by {prepare}, and leave the encoder out here"
        )
    if name is not None:
        with torch.device("meta"):
            grid = config.build_model(manifest.shape, manifest.conditions).grid
        if len(grid) != 2 or grid[0] != grid[1]:
            raise ValueError(
                f"encoder {name} gives a square of features, the student's tokens are on {grid}; give data of square "
                "pictures, or choose another method"
            )
        encoder = load_encoder(name, grid[0], device=device, dtype=dtype)
        encoder.space = manifest.latent_space
        return encoder
    try:
        return StoredFeatures(dataset)
    except ValueError as error:
        if pixels:
            raise ValueError(f"{error}; or give an encoder by hub id or folder, to be run on the pixels") from error
        raise ValueError(f"{error}: {prepare}") from error
