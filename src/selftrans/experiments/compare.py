"""`selftrans compare`: methods x seeds under one budget, measured alike; a table, the curves, and a page.

OUT/<method>-seed<k>/    ordinary run directories          OUT/compare.{json,csv,png,html}    what people open
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from selftrans.config import RunConfig, to_json
from selftrans.data.dataset import Shards
from selftrans.data.prepare import prepare_digits
from selftrans.evaluate.extractors import load_extractor
from selftrans.evaluate.plots import save
from selftrans.experiments import report
from selftrans.experiments.analyse_run import classifier_from_data
from selftrans.experiments.runner import Comparison, Results, compare, samples_of
from selftrans.experiments.table import AXES, as_csv, mean_curve, rows
from selftrans.methods import METHODS, stages
from selftrans.recipes import recipe
from selftrans.storage import write_json, write_text
from selftrans.suggest import nearest
from selftrans.train.run import put_together, teacher_of
from selftrans.train.signals import lock

NEIGHBOURS = ("repa", "sra", "layersync", "dispersive")  #: methods with a section of their own in the configuration
SHOWN = 32  #: samples on the page, per method


def compare_methods(
    config: RunConfig,
    out: Path,
    methods: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    images: int = 1000,
    features: str | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Train and measure each method with each seed and write `out`; returns what compare.json holds.

    All share data, model, student steps, batch, sampler, extractor and number of images. A teacher is a run of stage 1
    for as many steps as the student, unless `stage1.steps` says otherwise, and shared with the method `structure` of the
    same seed. Distances are to the training data. `features`: an extractor's name or file; None: see `base`.
    Repeating the call continues it; methods and seeds may be added. Raises ValueError for unknown methods and seeds.
    """
    _check(methods, seeds, images)
    with lock(out):
        config, features, weights = base(config, out, features=features)
        variants = {name: only(config, name) for name in methods}
        rehearse(variants)
        chosen = Comparison(config, variants, tuple(seeds), out, images, features, weights)
        results = compare(chosen, workers=workers)
        summary = summarise(chosen, results)
        write(chosen, summary)
    names = {name: name for name in methods}
    print(report.text_table(summary["table"], names, summary["metric"]))
    print(f"\nOpen {out / 'compare.html'}")
    return summary


def only(config: RunConfig, method: str) -> RunConfig:
    """The configuration for one method; settings of the others that are not its own are the recipe's again.

    So a run's directory is the same whatever is compared with it.
    """
    plain = recipe(config.recipe)
    own = {"self_transcendence": {"stage1", "stage2"}, "structure": {"stage1"}}.get(method, {method})
    others = {name: getattr(plain, name) for name in (*NEIGHBOURS, "stage1", "stage2") if name not in own}
    if method == "structure":  # its length is train.steps
        others["stage1"] = dataclasses.replace(config.stage1, steps=plain.stage1.steps)
    return dataclasses.replace(config, method=method, **others)


def rehearse(variants: Mapping[str, RunConfig]) -> None:
    """Build each method once, without memory for its weights: what cannot work is said now, not after the others' days."""
    for config in variants.values():
        shards = Shards.open(str(config.data.path))
        for stage in stages(config):
            given: Any = None
            if stage.encoder or (stage.teacher and config.stage2.teacher):
                given = teacher_of(config, stage, config.stage2.teacher or "", shards, torch.device("cpu"))
            put_together(config, stage, shards.manifest, given)


def _check(methods: Sequence[str], seeds: Sequence[int], images: int) -> None:
    if not methods or len(set(methods)) < len(methods):
        raise ValueError("give one method at least, and each of them once")
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"method '{name}' is unknown{nearest(name, METHODS)}")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or images < 2:
        raise ValueError("a comparison needs seeds that differ from each other, from 0 on, and at least two images")


def base(config: RunConfig, out: Path, *, features: str | None = None) -> tuple[RunConfig, str, str | None]:
    """(the configuration that all variants share, the extractor, the file of its weights).

    Recipes named digits... bring data and classifier. Other data are measured with `features`; None: a small classifier
    trained on them (`out/classifier.safetensors`), or Inception where there are no pixels or no classes to train it on.
    """
    weights = None
    if config.data.path is None:
        if not config.recipe.startswith("digits"):
            raise ValueError(f"recipe {config.recipe} needs --data DIR, a directory made by `selftrans prepare`")
        prepare_digits(out / "data")
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(out / "data")))
        features = features or "digits"
    if features == "digits":
        weights = str(out / "digits-classifier.safetensors")
    if features is None:
        manifest = Shards.open(str(config.data.path)).manifest
        features, own = "inception", out / "classifier.safetensors"
        if manifest.autoencoder == "pixel" and manifest.num_classes > 1:
            features = str(own)
            if not own.exists():
                print(classifier_from_data(str(config.data.path), own, epochs=12, seed=0))
    load_extractor(features, weights=weights)  # what is missing is said, or trained, once and now
    if config.stage1.steps is None:  # every row of the table has had the same number of steps, its teacher too
        config = dataclasses.replace(config, stage1=dataclasses.replace(config.stage1, steps=config.train.steps))
    return config.check(), features, weights


def on(config: RunConfig, data: str | None, steps: int | None) -> RunConfig:
    """The same configuration on these data, with this many student steps; None leaves it as it is."""
    if data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=data))
    if steps is not None:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    return config.check()


def summarise(chosen: Comparison, results: Results) -> dict[str, Any]:
    """What compare.json holds: the table, the curves over both axes, and everything the numbers depend on."""
    point, names, config = next(iter(results.values()))[1][-1], tuple(chosen.variants), chosen.shared
    teachers = {json.dumps(run["teacher"]): run["teacher"] for run, _ in results.values() if run.get("teacher")}
    return {
        "table": rows(results, names),
        "curves": {axis: {name: mean_curve(results, name, axis) for name in names} for axis in AXES},
        **{key: point[key] for key in ("metric", "sampler", "extractor_sha256")},
        "features": chosen.features,
        "images": chosen.images,
        "labels": point["sampler"].get("labels", "balanced"),
        "seeds": list(chosen.seeds),
        "autoencoder": config.data.autoencoder or Shards.open(str(config.data.path)).manifest.autoencoder,
        "teachers": list(teachers.values()),
        "config": json.loads(to_json(config)),
    }


def write(chosen: Comparison, summary: dict[str, Any]) -> None:
    """compare.json, .csv, .png and .html in the directory of the comparison."""
    runs = {name: chosen.run((name, chosen.seeds[0])) for name in chosen.variants}
    grids = {name: samples_of(run, chosen.shared.sample, SHOWN) for name, run in runs.items()}
    figure = report.convergence(summary["curves"], summary["metric"])
    save(figure, chosen.out / "compare.png")
    write_json(chosen.out / "compare.json", summary)
    write_text(chosen.out / "compare.csv", as_csv(summary["table"]))
    write_text(chosen.out / "compare.html", report.comparison_page(summary, figure, grids))
