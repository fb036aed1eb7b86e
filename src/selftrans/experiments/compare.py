"""`selftrans compare`: methods x seeds with equal budgets, measured alike; a table, the curves and a page.

OUT/<method>-seed<k>/    ordinary run directories          OUT/compare.{json,csv,png,html}    what people open
OUT/reference-*.npz      statistics of the training data
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from selftrans.config import RunConfig, to_object
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import decoded_images
from selftrans.data.manifest import Manifest
from selftrans.data.prepare import prepare_builtin
from selftrans.encoders.identity import identity_kind
from selftrans.evaluate.extractors import MAX_VALUES, extract, load_extractor
from selftrans.experiments import html_report
from selftrans.experiments.comparison import Comparison
from selftrans.experiments.comparison_files import unchanged, write
from selftrans.experiments.finished_runs import FinishedRun, all_measured, finished_runs, with_samples
from selftrans.experiments.measurement import PROBED_BLOCK, check_sizes, image_shape
from selftrans.experiments.runner import Results, check_workers, processes, train_and_measure
from selftrans.experiments.schedule import Job
from selftrans.experiments.summary import AXES, mean_curve, rows, time_line, time_shares
from selftrans.experiments.train_classifier import classifier_from_data, data_of_classifier
from selftrans.methods.registry import METHODS, REGISTRY, find, meta_objective, sections_of, stages
from selftrans.sections import fields_of
from selftrans.storage import lock_file, removed_if_refused
from selftrans.train.data_window import data_of
from selftrans.train.given_weights import with_given_model
from selftrans.train.teachers import teacher_of


def compare_methods(
    config: RunConfig,
    out: Path,
    methods: Sequence[str] | None = None,
    *,
    seeds: Sequence[int] = (0,),
    images: int = 1000,
    features: str | None = None,
    workers: int | None = None,
    typed: Sequence[str] = (),
) -> dict[str, Any]:
    """Train and measure each method with each seed and write `out`; returns what compare.json holds.

    All share data, model, student steps, batch, sampler, extractor and number of images. Every stage is as long as the
    student's training, unless the settings say otherwise; a stage that another method trains alone, with the same settings
    and seed, is shared. Distances are to the training data. Repeating the call continues it; methods and seeds may be added.
    Runs that fail (`runner.FAILURES`) are listed in the result (`failed`), and the others go on; a repeated call tries them
    again.

    Args:
        methods: their names; None: the built-in ones that need no external encoder.
        features: an extractor's name or file; None: see `shared_settings`. typed: see `train`.
    Raises ValueError for unknown methods and seeds, and where every run fails.
    """
    if methods is None:
        methods = [name for name, spec in METHODS.items() if not any(s.encoder for s in spec.stages(config))]
    _check_options(methods, seeds, images)
    check_workers(workers)
    made = (out / name for name in ("data", "digits-classifier.safetensors", "classifier.safetensors", ".lock"))
    new = [path for path in (*made, out) if not path.exists()]
    with lock_file(out / ".lock"):
        with removed_if_refused(new, keep=out / "compare.json"):
            config, features, weights = shared_settings(config, out, features=features)
            config = with_given_model(config, typed)
            variants = {name: for_method(config, name) for name in methods}
            chosen = Comparison(config, variants, tuple(seeds), out, images, features, weights, probed_block(config))
            finished = finished_runs(chosen)
            check_before(chosen, finished)
        summary, done = None, all_measured(chosen, finished)
        if done:
            summary = unchanged(chosen, summarise(chosen, train_and_measure(chosen, finished=finished)))
        if summary is None:
            summary = _measured(chosen, with_samples(chosen, finished) if done else finished, workers)
    print(html_report.text_table(summary))
    if not done and (line := time_line(summary["time"])):
        print(f"\n{line}")
    print(f"\nOpen {out / 'compare.html'}")
    return summary


def _measured(chosen: Comparison, finished: Mapping[Job, FinishedRun], workers: int | None) -> dict[str, Any]:
    """Train and measure what is left, and write the files of the comparison; returns what compare.json holds."""
    started, failed = time.perf_counter(), dict[Job, str]()
    results = train_and_measure(chosen, workers=workers, finished=finished, failed=failed)
    if not results:
        (name, seed), reason = next(iter(failed.items()))
        raise ValueError(f"every run failed; first {name}, seed {seed}: {reason}")
    shares = time_shares(results, time.perf_counter() - started, processes(chosen, workers)[0])
    return write(chosen, summarise(chosen, results, failed) | {"time": shares})


def probed_block(config: RunConfig) -> int:
    """The shallow block whose features are probed in every run: the one that the recipe's method guides first."""
    manifest, first = data_of(config.data).manifest, stages(config)[0]
    with torch.device("meta"):
        student = config.build_model(manifest.shape, manifest.conditions)
        guidances = [] if first.encoder else first.guide(student, None)
    return guidances[0].taps[0] if guidances else min(PROBED_BLOCK, student.depth)


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


def check_before(chosen: Comparison, finished: Mapping[Job, FinishedRun]) -> None:
    """Raise ValueError, before anything is trained, for what would stop a run or a measurement later.

    Does nothing where all is trained and measured.
    """
    if not all_measured(chosen, finished):
        check_measuring(chosen.shared, chosen.features, chosen.weights)
        rehearse(chosen.variants)


def rehearse(variants: Mapping[str, RunConfig]) -> None:
    """Build each method once, without memory for its weights. Raises ValueError for a setting that cannot be used."""
    for config in variants.values():
        dataset = data_of(config.data)
        for stage in stages(config):
            given: Any = None
            if stage.encoder or (stage.teacher and stage.teacher.given):
                given = teacher_of(config, stage, "", dataset, torch.device("cpu"))
            meta_objective(config, stage, dataset.manifest.shape, dataset.manifest.conditions, given)


def _check_options(methods: Sequence[str], seeds: Sequence[int], images: int) -> None:
    if not methods or len(set(methods)) < len(methods):
        raise ValueError("give one method at least, and each of them once")
    for name in methods:
        find(name)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or images < 2:
        raise ValueError("a comparison needs seeds that differ from each other, from 0 on, and at least two images")


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
        manifest, several = dataset.manifest, len(dataset.parts) > 1
        features = "inception" if several else _extractor_without_classes(manifest)
        if identity_kind(manifest.autoencoder) == "pixel" and manifest.num_classes > 1 and not several:
            features = str(classifier_of(config, dataset, out / "classifier.safetensors"))
    return equal_lengths(config).check(), features, weights


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


def equal_lengths(config: RunConfig) -> RunConfig:
    """Every stage as long as the student's training, unless the settings say otherwise: so is each row's teacher."""
    unset = {
        f"{section.key}.{name}": config.train.steps
        for section in (config.section(kind) for kind in sections_of(REGISTRY.every()).values())
        for name, value, _, length in fields_of(section)
        if length and value is None
    }
    return config.override(unset)


def override(config: RunConfig, *, data: str | None = None, steps: int | None = None) -> RunConfig:
    """The configuration with other data or student steps; None keeps them."""
    given = {"data.path": data, "train.steps": steps}
    return config.override({name: value for name, value in given.items() if value is not None}).check()


def summarise(chosen: Comparison, results: Results, failed: Mapping[Job, str] | None = None) -> dict[str, Any]:
    """What compare.json holds: the table, the curves over both axes, and what the numbers depend on.

    `failed`: the runs that are not in `results`, and why.
    """
    failed = failed or {}
    point, names = next(iter(results.values()))[1][-1], tuple(chosen.variants)
    used = {key: section for variant in chosen.variants.values() for key, section in variant.sections.items()}
    config = dataclasses.replace(chosen.shared, sections=used)
    teachers = {json.dumps(run["teacher"]): run["teacher"] for run, _ in results.values() if run.get("teacher")}
    return {
        "table": rows(results, names, failed=failed),
        "failed": [{"method": job[0], "seed": job[1], "reason": failed[job]} for job in chosen.jobs if job in failed],
        "curves": {axis: {name: mean_curve(results, name, axis) for name in names} for axis in AXES},
        **{key: point[key] for key in ("metric", "sampler", "extractor_sha256")},
        "features": chosen.features,
        "images": chosen.images,
        "labels": point["sampler"].get("labels"),
        "seeds": list(chosen.seeds),
        "autoencoder": config.data.autoencoder or data_of(config.data).manifest.autoencoder,
        "teachers": list(teachers.values()),
        "config": to_object(config),
        "sections": list(used),
    }
