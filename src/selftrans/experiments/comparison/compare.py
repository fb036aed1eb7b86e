"""`selftrans compare`: methods x seeds with equal budgets, measured alike; a table, the curves and a page.

OUT/<method>-seed<k>/    ordinary run directories          OUT/compare.{json,csv,png,html}    what people open
OUT/reference-*.npz      statistics of the training data

comparison_settings ⇒ compared_runs ⇒ finished_runs ⇒ runner (schedule, measurement) ⇒ summary ⇒ html_report
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selftrans.config import RunConfig, to_object
from selftrans.data.held_out import held_out_rows
from selftrans.device import load_average
from selftrans.evaluate import plots
from selftrans.experiments import html_report
from selftrans.experiments.comparison.compared_runs import WRITTEN, Comparison
from selftrans.experiments.comparison.comparison_settings import check_measuring, for_method, shared_settings
from selftrans.experiments.comparison.finished_runs import FinishedRun, all_measured, finished_runs, with_samples
from selftrans.experiments.comparison.measurement import (
    MEASURED,
    PROBED_BLOCK,
    samples_of,
    stored_conditions,
    stored_points,
)
from selftrans.experiments.comparison.runner import Results, check_counts, processes, train_and_measure
from selftrans.experiments.comparison.schedule import Job
from selftrans.experiments.comparison.summary import AXES, as_csv, mean_curve, rows, time_line, time_shares
from selftrans.messages import escaped
from selftrans.methods.registry import METHODS, find, meta_objective, stages
from selftrans.plain_json import recorded
from selftrans.sampling.images import NotFinite
from selftrans.storage import (
    lock_file,
    remove_stale_temporaries,
    removed_if_refused,
    sha256_file,
    write_json,
    write_text,
)
from selftrans.train.given_weights import with_given_model
from selftrans.train.run import check_decay, stages_to_run
from selftrans.train.run_data import data_of
from selftrans.train.teachers import teacher_of

SHOWN = 32  #: samples on the page, per method
JSON, DRAWN = "compare.json", ("compare.csv", "compare.png", "compare.html")
FILES = "files"  #: entry of compare.json: what the other files were made from, and their sha256


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
    Runs that fail (`worker.FAILURES`) are listed in the result (`failed`), and the others go on; a repeated call tries them
    again.

    Args:
        methods: their names; None: the built-in ones that need no external encoder.
        features: an extractor's name or file; None: see `shared_settings`. typed: see `train`.
    Raises ValueError for unknown methods and seeds, and where every run fails.
    """
    if methods is None:
        methods = [name for name, spec in METHODS.items() if not any(s.encoder for s in spec.stages(config))]
    if not methods or len(set(methods)) < len(methods):
        raise ValueError("give one method at least, and each of them once")
    for name in methods:
        find(name)
    check_counts(seeds, images, workers)
    load = load_average()  # of others: before anything is prepared or trained here
    made = (out / name for name in ("data", "digits-classifier.safetensors", "classifier.safetensors", ".lock"))
    new = [path for path in made if not path.exists()]
    with lock_file(out / ".lock"):
        remove_stale_temporaries(out, *WRITTEN)
        with removed_if_refused(new, keep=out / "compare.json"):
            config, features, weights = shared_settings(config, out, features=features)
            config = with_given_model(config, typed)
            variants = {name: for_method(config, name) for name in methods}
            chosen = Comparison(config, variants, tuple(seeds), out, images, features, weights, probed_block(config))
            for run in map(chosen.run, chosen.jobs):
                remove_stale_temporaries(run, MEASURED)
            finished = finished_runs(chosen)
            check_before(chosen, finished)
        summary = unchanged(chosen, finished) or _measured(chosen, finished, workers, load)
    print(html_report.text_table(summary))
    if not all_measured(chosen, finished) and (line := time_line(summary["time"])):
        print(f"\n{line}")
    print(f"\nOpen {escaped(out / 'compare.html')}")
    return summary


def _measured(
    chosen: Comparison, finished: Mapping[Job, FinishedRun], workers: int | None, load: float | None
) -> dict[str, Any]:
    """Train and measure what is left, and write the files of the comparison; returns what compare.json holds."""
    started, failed = time.perf_counter(), dict[Job, str]()
    readable = with_samples(chosen, finished)
    results = train_and_measure(chosen, workers=workers, finished=readable, failed=failed, load=load)
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
        for stage in stages_to_run(config):
            check_decay(config.train, stage)
        dataset = data_of(config.data)
        held_out_rows(dataset, config.data.held_out)
        for stage in stages(config):
            given: Any = None
            if stage.encoder or (stage.teacher and stage.teacher.given):
                given = teacher_of(config, stage, "", dataset, torch.device("cpu"))
            meta_objective(config, stage, dataset.manifest.shape, dataset.manifest.conditions, given)


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


def write(chosen: Comparison, summary: dict[str, Any]) -> dict[str, Any]:
    """Write compare.json, .csv, .png and .html to the directory of the comparison; returns what the first one holds."""
    failed = {(one["method"], one["seed"]) for one in summary["failed"]}
    conditioning = stored_conditions(data_of(chosen.shared.data), dataclasses.replace(chosen.shared.sample, seed=1))
    grids = {}
    for name in chosen.variants:
        job = name, chosen.seeds[0]
        if job not in failed:
            last = chosen.due(job)[-1]
            with contextlib.suppress(NotFinite):  # those that were measured have other noise, and are finite
                grids[name] = samples_of(last, chosen.shared.sample, SHOWN, conditioning)
    captions, figure = conditioning.texts(np.arange(SHOWN)), html_report.convergence(summary)
    plots.save(figure, chosen.out / "compare.png")
    write_text(chosen.out / "compare.csv", as_csv(summary["table"]))
    write_text(chosen.out / "compare.html", html_report.comparison_page(summary, figure, grids, captions))
    summary = summary | {FILES: _files(chosen)}
    write_json(chosen.out / JSON, summary)
    return summary


def unchanged(chosen: Comparison, finished: Mapping[Job, FinishedRun]) -> dict[str, Any] | None:
    """What compare.json holds, if all is measured, and this and the other files are as `write` would write them; else None."""
    if not all_measured(chosen, finished):
        return None
    summary = summarise(chosen, train_and_measure(chosen, finished=finished))

    def same(held: dict[str, Any]) -> dict[str, Any] | None:
        wanted = summary | {"time": held["time"], FILES: _files(chosen)}  # the time is that of the call that wrote them
        return held if held == json.loads(json.dumps(wanted)) else None

    return recorded(chosen.out / JSON, same, None)


def _files(chosen: Comparison) -> dict[str, str]:
    """sha256 of the files next to compare.json, and a hash of what they show besides its content: samples, by this code."""
    manifest = data_of(chosen.shared.data).manifest
    runs = [chosen.run((name, chosen.seeds[0])) for name in chosen.variants]
    weights = [sorted(point["sha256"] for point in stored_points(Path(run, MEASURED))) for run in runs]
    code = [sha256_file(Path(str(file))) for file in (__file__, html_report.__file__, plots.__file__)]
    made_from = hashlib.sha256(json.dumps([code, weights, manifest.to_json()]).encode()).hexdigest()
    return {"made_from": made_from} | {name: sha256_file(chosen.out / name) for name in DRAWN}
