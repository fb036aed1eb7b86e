"""The settings of a comparison: what all variants share, those of one method, and what they are measured with."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path

from selftrans.config import RunConfig
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import decoded_images
from selftrans.data.manifest import Manifest
from selftrans.data.prepare import prepare_builtin
from selftrans.encoders.identity import identity_kind
from selftrans.evaluate.extractors import MAX_VALUES, extract, load_extractor
from selftrans.experiments.comparison.measurement import check_sizes, image_shape
from selftrans.experiments.train_classifier import classifier_from_data, data_of_classifier
from selftrans.methods.registry import REGISTRY, sections_of, stages
from selftrans.sections import fields_of
from selftrans.train.run_data import data_of


def shared_settings(config: RunConfig, out: Path, *, features: str | None = None) -> tuple[RunConfig, str, str | None]:
    """(the configuration that all variants share, the extractor, the file of its weights).

    Recipes with built-in data bring a classifier, too; the data are prepared, or checked if they are there. Other data are
    measured with `features`; None: data that are no pictures by their `values`, others by a small classifier trained on them
    (`out/classifier.safetensors`). Where the data are not pixels or have no classes to train it on, colour pictures are
    measured by Inception, and grey ones by their values, with a warning. Data of several sizes are measured by Inception, which
    takes any.
    """
    weights = None
    if config.data.path is None:
        builtin = config.data.builtin
        if builtin is None:
            raise ValueError(f"recipe {config.recipe} needs --data DIR, a directory made by `selftrans prepare`")
        prepare_builtin(builtin, out / "data")
        config = config.override({"data.path": str(out / "data")})
        features = features or "digits"
    if features == "digits":
        weights = str(out / "digits-classifier.safetensors")
    if features is None:
        dataset = data_of(config.data)
        manifest = dataset.manifest
        if len(dataset.parts) > 1:
            features = "inception"
        elif identity_kind(manifest.autoencoder) == "pixel" and manifest.num_classes > 1:
            features = str(classifier_of(config, dataset, out / "classifier.safetensors"))
        else:
            features = _extractor_without_classes(manifest)
    return equal_lengths(config).check(), features, weights


def override(config: RunConfig, *, data: str | None = None, steps: int | None = None) -> RunConfig:
    """The configuration with other data or student steps; None keeps them."""
    given = {"data.path": data, "train.steps": steps}
    return config.override({name: value for name, value in given.items() if value is not None}).check()


def equal_lengths(config: RunConfig) -> RunConfig:
    """Every stage as long as the student's training, unless the settings say otherwise: so is each row's teacher."""
    unset = {
        f"{section.key}.{name}": config.train.steps
        for section in (config.section(kind) for kind in sections_of(REGISTRY.every()).values())
        for name, value, _, length in fields_of(section)
        if length and value is None
    }
    return config.override(unset)


def for_method(config: RunConfig, method: str | None = None) -> RunConfig:
    """The configuration for one method (None: its own), with its sections: its run is the same whatever it is compared with."""
    config = dataclasses.replace(config, method=method or config.method).restricted()
    plan = stages(config)
    if len(plan) > 1:
        return config
    lengths = {  # a stage alone is as long as train.steps says
        f"{key}.{name}": getattr(type(section)(), name)
        for key, section in config.sections.items()
        for name, _, _, length in fields_of(section)
        if length
    }
    return config.override(lengths)


def classifier_of(config: RunConfig, dataset: Dataset, file: Path) -> Path:
    """`file`: the classifier of these data, trained by the first call. ValueError for one that was trained on other data."""
    if not file.exists():
        print(classifier_from_data(str(config.data.path), file, epochs=12, seed=0))
    elif data_of_classifier(file) not in (None, dataset.manifest.shards_sha256()):
        raise ValueError(
            f"{file} was trained on other data than {config.data.path}; choose another --out, or give that classifier with "
            "--features"
        )
    return file


def check_measuring(config: RunConfig, features: str, weights: str | None) -> None:
    """Raise ValueError where the autoencoder is missing or the extractor does not take such images.

    Trains the digit classifier if it is the extractor: once, instead of in every worker.
    """
    dataset = data_of(config.data)
    shape, several = image_shape(dataset.manifest), len(dataset.parts) > 1
    try:
        extractor = load_extractor(features, weights=weights, shape=shape)
    except ValueError as error:
        small = "" if several else f", or --features values (the {math.prod(shape):,} values of a picture)"
        hint = small if features == "inception" and math.prod(shape) <= MAX_VALUES else ""
        raise ValueError(f"{error}{hint}") from error
    check_sizes(extractor, dataset)
    next(extract(next(decoded_images(dataset, 1, device="cpu")), extractor))


def _extractor_without_classes(manifest: Manifest) -> str:
    """The extractor for data without classes to train a classifier on."""
    if manifest.resolution is None:
        return "values"
    if manifest.image_channels == 3 or math.prod(image_shape(manifest)) > MAX_VALUES:
        return "inception"
    warnings.warn(
        "grey pictures without classes: the distance is of their values; give --features FILE for that of a classifier",
        stacklevel=4,
    )
    return "values"
