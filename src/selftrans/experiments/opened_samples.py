"""What `selftrans evaluate` measures: stored images with what is recorded about them, or a run that is sampled in memory.

Shape legend: images are pictures, uint8 (n, H, W, C), or arrays that are not pictures, float32 (n, C, *S).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints import hub
from selftrans.checkpoints.load import PIPELINE, LoadedModel, Weights, find_asked, load_model
from selftrans.data.buckets import is_prepared, open_data
from selftrans.data.sources.npz import npz_labels
from selftrans.device import default_device
from selftrans.experiments.reference import must_exist, open_images, training_data
from selftrans.messages import first_line
from selftrans.sampling.conditioning import CaptionConditioning, captions_of
from selftrans.sampling.images import Sampler
from selftrans.sampling.run_settings import overridden
from selftrans.sampling.sized_sampler import SizedSampler

FOREIGN = (".pt", ".pth", ".ckpt")  #: suffixes of checkpoints that only `selftrans import` reads


class Samples(NamedTuple):
    """The images to evaluate."""

    images: Iterator[np.ndarray]
    settings: dict[str, Any] | None  #: the sampling settings; None if they are not recorded
    labels: Any  #: (n,), or a list that fills while the images stream; None if unknown or without classes
    total: int | None  #: number of images, if known
    report: Path  #: default path of the report
    pictures: bool | None  #: whether they are pictures; None: only the first batch shows it
    texts: list[str] | None = None  #: the prompt of each image, in order; None if they are not known


def open_samples(
    samples: str | Path,
    settings: dict[str, Any],
    weights: Weights = "ema",
    stage: str | None = None,
    *,
    reference: str | Path = "",
    text_encoder: str | None = None,
) -> Samples:
    """Open stored images, or the images sampled from a run, whose captions may come from `reference` (see `_captions`), and
    their sizes do, if it is prepared data of several."""
    path = hub.local(samples)
    if path.suffix in FOREIGN:
        raise ValueError(f"{path} is a checkpoint of another code base; convert it with `selftrans import`")
    must_exist(path)
    if path.name == "samples.npz" and (path.parent / "samples.json").exists():
        path = path.parent  # written by `selftrans sample`: samples.json holds its settings
    if is_model(path):
        return _sampled(path, settings, weights, stage, reference, text_encoder)
    ignored = [*settings, *(["text_encoder"] if text_encoder else [])]
    for name in ignored:
        warnings.warn(f"--{name.replace('_', '-')} is ignored: {path} holds images, not a run", stacklevel=3)
    return _stored(path)


def _sampled(
    path: Path,
    overrides: dict[str, Any],
    weights: Weights,
    stage: str | None,
    reference: str | Path,
    text_encoder: str | None,
) -> Samples:
    loaded = load_model(find_asked(path, stage=stage, weights=weights), stage=stage)
    settings, conditioning = overridden(loaded, overrides), None
    if loaded.model.conditions.kind == "text" and settings.prompts is None:
        conditioning = _captions(path, loaded, reference, settings.seed, text_encoder)
        if text_encoder is not None and not conditioning.encodes:
            warnings.warn("--text-encoder is ignored: the captions are stored with their tokens", stacklevel=4)
    sampler = Sampler.of(loaded, settings, conditioning=conditioning, text_encoder=text_encoder)
    labels: list[int] | None = [] if loaded.model.conditions.num_classes > 1 else None
    sized = SizedSampler(sampler, open_data(reference) if is_prepared(reference) else None)

    def images() -> Iterator[np.ndarray]:
        for batch in sized.sample():
            if labels is not None:
                labels.extend(batch.labels.tolist())
            yield batch.images

    return Samples(
        images(),
        sampler.described,
        labels,
        sampler.settings.num,
        (path if path.is_dir() else path.parent) / "evaluate.json",
        sampler.autoencoder.pictures,
        sampler.conditioning.texts(sized.order),
    )


def _captions(
    path: Path, loaded: LoadedModel, reference: str | Path, seed: int, text_encoder: str | None
) -> CaptionConditioning:
    """The captions of the reference, if it is prepared data with captions, else those of the run's training data."""
    if not is_prepared(reference) or open_data(reference).manifest.conditions.kind != "text":
        remedy = "give --prompts, or a --reference prepared with captions"
        reference = training_data(path, loaded, remedy=remedy)
        if not is_prepared(reference):
            raise ValueError(f"the training data {reference} are not there; {remedy}")
    dataset = open_data(reference, text_encoder=text_encoder or loaded.config.data.text_encoder)
    return captions_of(dataset, loaded.model.conditions, seed, device=default_device())


def is_model(path: Path) -> bool:
    """Whether `path` is a run, a stage, a checkpoint, a pipeline or a weights file, rather than images."""
    if path.is_file():
        return path.suffix == ".safetensors"
    described = any((path / name).exists() for name in (checkpoint.STATE, "config.json", PIPELINE))
    return described or (path / "checkpoints").is_dir()


def _stored(samples: Path) -> Samples:
    """Images, with the settings, labels and prompts that samples.json records."""
    record, archive = samples / "samples.json", samples / "samples.npz"
    report = samples / "evaluate.json" if samples.is_dir() else samples.with_suffix(".evaluate.json")
    if not record.exists():
        labels = npz_labels(samples) if samples.suffix.lower() == ".npz" else None
        return Samples(open_images(samples), None, labels, None, report, None)
    try:
        content = json.loads(record.read_text())
        complete, settings = content["complete"] and archive.exists(), content["settings"] | {"num": content["num"]}
        if complete:
            with np.load(archive, allow_pickle=False) as arrays:
                # `selftrans sample` does not compress the npz
                if arrays.zip.getinfo("arr_1.npy").file_size > archive.stat().st_size:
                    raise ValueError("its labels claim more bytes than the file has")
                labels = arrays["arr_1"]
            prompts = settings.get("prompts")
            texts = None if prompts is None else [str(prompts[int(label)]) for label in labels]
    except Exception as error:  # json, zip and npz raise many types for damaged files
        raise ValueError(f"{samples} is damaged ({first_line(error)}); delete it and sample again") from error
    if not complete:
        raise ValueError(f"{samples} is not complete; repeat the `selftrans sample` command that began it")
    several = settings.get("num_classes", 2) > 1  # with one class, every accuracy would be 1
    return Samples(open_images(archive), settings, labels if several else None, None, report, None, texts)
