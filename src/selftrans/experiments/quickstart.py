"""`selftrans quickstart`: train and measure the method on real digits, in minutes on two CPU cores, and write a report.

vanilla, stage 1 alone and both stages are trained for the same number of student steps from the same seeds. The teacher is
an early checkpoint of stage 1, and vanilla goes on until it has had the total compute of both stages. The report assumes no
order of the methods.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selftrans.checkpoints.load import load_model
from selftrans.config import RunConfig
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import decode_images, latents_of
from selftrans.data.prepare import prepare_builtin
from selftrans.device import default_device, load_average
from selftrans.encoders.autoencoder import load_autoencoder
from selftrans.evaluate.extractors import load_extractor
from selftrans.evaluate.plots import as_pictures, save
from selftrans.evaluate.probes import collect, pca_basis, pca_maps
from selftrans.experiments.comparison.compared_runs import (
    WRITTEN,
    Comparison,
    checkpoints_of,
    interval,
    seconds_trained,
)
from selftrans.experiments.comparison.comparison_settings import for_method
from selftrans.experiments.comparison.measurement import PROBE_T, samples_of
from selftrans.experiments.comparison.runner import Results, check_counts, train_and_measure
from selftrans.experiments.comparison.summary import as_csv, mean_curve, rows
from selftrans.experiments.quickstart_report import compared, cut, duration, overview, page, sentence, text
from selftrans.flow import PATHS
from selftrans.messages import escaped, printable
from selftrans.methods.registry import meta_objective, stages
from selftrans.methods.self_transcendence import SELF_TRANSCENDENCE, STRUCTURE, Stage1
from selftrans.methods.vanilla import VANILLA
from selftrans.plain_json import recorded
from selftrans.recipes.digits import digits
from selftrans.storage import lock_file, remove_stale_temporaries, write_json, write_text
from selftrans.train.flops import stage_flops
from selftrans.train.resume import differences, settings_before

#: name of the method -> its title in the report; stage 1 precedes stage 2, which it teaches
METHODS = {spec.name: spec.title for spec in (VANILLA, STRUCTURE, SELF_TRANSCENDENCE)}
STEPS = 800  #: of each student, four fifths of the recipe's: all in less than four minutes of two cores
IMAGES = 1000  #: samples for each distance
SHOWN = 42  #: samples in the report, per method
MAPPED = 8  #: digits whose features are shown as PCA maps
TAUGHT = 2  #: intervals of stage 1 that train the teacher: two fifths of the steps


def quickstart(
    out: Path,
    *,
    steps: int | None = None,
    seeds: Sequence[int] = (0,),
    images: int = IMAGES,
    workers: int | None = None,
) -> dict[str, Any]:
    """Train, measure and write `out`: report.html, quickstart.png, table.json, table.csv and a run directory per method.

    Runs train in parallel, one per core; with one worker it takes longer, but the seconds of the methods are comparable.
    Repeating the call continues it; for a finished directory it only writes the report again. Returns the content of
    table.json.
    """
    check_counts(seeds, images, workers)
    started, load = time.perf_counter(), load_average()  # the load of others: nothing is prepared or trained here yet
    config = digits().override({"train.steps": STEPS if steps is None else steps}).check()
    every = interval(config.train.steps)
    # the teacher is a checkpoint of stage 1 alone, which is trained on for its own row of the table
    config = config.override({"stage1.steps": min(TAUGHT * every, config.train.steps)})
    with lock_file(out / ".lock"):
        remove_stale_temporaries(out, *WRITTEN)
        dataset = prepare_builtin("digits", out / "data")
        config = config.override({"data.path": str(out / "data")})
        variants = {name: for_method(config, name) for name in METHODS}
        longer = equal_compute(variants[VANILLA.name], variants[SELF_TRANSCENDENCE.name], dataset)
        variants[VANILLA.name] = variants[VANILLA.name].override({"train.steps": longer})
        classifier = out / "digits-classifier.safetensors"
        chosen = Comparison(config, variants, tuple(seeds), out, images, "digits", str(classifier), every=every)
        check_earlier(chosen)
        load_extractor("digits", weights=classifier)  # trained once, before the workers load it
        begun = any(seconds_trained(chosen.run(job)) for job in chosen.jobs)
        results = train_and_measure(chosen, workers=workers, load=load)
        summary = summarise(chosen, results)
        now = round(time.perf_counter() - started, 1), begun
        summary["seconds"], summary["continued"] = time_taken(out, summary["table"], results, now)
        print(f"All is trained and measured; drawing {escaped(out / 'report.html')}", flush=True)
        write(chosen, summary, dataset)
    print(text(summary, METHODS))
    print(f"\n{duration(summary)}. Open {escaped(out / 'report.html')}")
    return summary


def check_earlier(chosen: Comparison) -> None:
    """ValueError if the folder holds runs with other settings: of an earlier version, or with other steps."""
    out = chosen.out
    for name, seed in chosen.jobs:
        config, before = chosen.variants[name].override({"train.seed": seed}), settings_before(chosen.run((name, seed)))
        if before is None:
            continue
        changed = [("train.steps", before.train.steps, config.train.steps, "free")]  # may grow elsewhere, not here
        changed += [each for each in differences(before, config) if not each[0].startswith("data.")]
        for setting, was, now, _ in changed:
            if was != now:
                other = f"{setting} {printable(str(was))}, now {now}"
                raise ValueError(f"{out} holds a quickstart with {other}; remove that folder, or give another --out")


def equal_compute(config: RunConfig, other: RunConfig, dataset: Dataset) -> int:
    """Steps of a run of one stage until it has had the total compute of another run; its own steps at least."""

    def flops(run: RunConfig) -> int:
        shape, conditions, batch = dataset.manifest.shape, dataset.manifest.conditions, run.train.batch_size
        built = ((meta_objective(run, stage, shape, conditions), stage.steps) for stage in stages(run))
        return sum(stage_flops(objective, conditions.example(), batch, steps) for objective, steps in built)

    return max(config.train.steps, math.ceil(flops(other) / flops(config) * config.train.steps))


def time_taken(out: Path, table: Any, results: Results, now: tuple[float, bool]) -> tuple[float, bool]:
    """(seconds, whether earlier calls are not in them): those of this call, `now`; where it found everything trained and
    measured, those in the table.json of the earlier call that made the same table."""
    if any(sum(run["spent"].values()) for run, _ in results.values()):
        return now

    def before(held: dict[str, Any]) -> tuple[float, bool]:
        return (float(held["seconds"]), bool(held["continued"])) if held["table"] == table else now

    return recorded(out / "table.json", before, now)


def summarise(chosen: Comparison, results: Results) -> dict[str, Any]:
    """The content of table.json."""
    shared, point = chosen.shared, next(iter(results.values()))[1][-1]
    steps, names = shared.train.steps, tuple(METHODS)
    equal = {job: cut(run, steps) if job[0] == VANILLA.name else run for job, run in results.items()}
    found = compared(results, names, VANILLA.name, SELF_TRANSCENDENCE.name, steps)
    return {
        "outcome": sentence(found, SELF_TRANSCENDENCE.title, VANILLA.title),
        "compared": found,
        "table": rows(equal, names),
        "metric": point["metric"],
        "sampler": point["sampler"],
        "extractor_sha256": point["extractor_sha256"],
        "curves": {name: mean_curve(equal, name) for name in METHODS},
        "curves_tflops": {name: mean_curve(results, name, "tflops") for name in METHODS},
        "seeds": list(chosen.seeds),
        "steps": steps,
        "teacher_steps": shared.section(Stage1).steps,
        "block": chosen.block,
        "images": chosen.images,
    }


def write(chosen: Comparison, summary: dict[str, Any], dataset: Dataset) -> None:
    """Write the table, the overview picture and the report."""
    out = chosen.out
    found = {METHODS[name]: checkpoints_of(chosen.run((name, chosen.seeds[0]))) for name in METHODS}
    held = {label: [folder for step, folder in pairs if step <= summary["steps"]] for label, pairs in found.items()}
    grids = {label: samples_of(folders[-1], chosen.shared.sample, SHOWN) for label, folders in held.items()}
    maps = {label: maps_of(folders, dataset, summary["block"]) for label, folders in held.items()}
    both = {
        axis: {METHODS[name]: curve for name, curve in summary[key].items()}
        for axis, key in (("step", "curves"), ("tflops", "curves_tflops"))
    }
    figure = overview(both, grids, summary["metric"])
    save(figure, out / "quickstart.png")
    report = page(summary, METHODS, figure, grids, maps)
    write_json(out / "table.json", summary)
    write_text(out / "table.csv", as_csv(summary["table"]))
    write_text(out / "report.html", report)


def maps_of(folders: Sequence[Path], dataset: Dataset, block: int) -> dict[str, np.ndarray]:
    """Row name -> pictures: the digits, and PCA maps of the shallow block of every checkpoint in the last one's basis."""
    z0, labels = latents_of(dataset, np.arange(min(MAPPED, len(dataset))))
    device, loaded = default_device(), [load_model(folder) for folder in folders]
    feats = [
        collect(each.model.to(device), z0, labels, t=PROBE_T, taps=(block,), path=PATHS[each.config.train.path])[block]
        for each in loaded
    ]
    basis = pca_basis(feats[-1])
    decoded = decode_images(load_autoencoder(dataset.manifest.autoencoder, device=device), z0.to(device))
    return {"data": as_pictures(decoded)} | {
        f"step {each.step}": pca_maps(features, each.model.grid, basis=basis)
        for each, features in zip(loaded, feats, strict=True)
    }
