"""`selftrans quickstart`: train and measure the method on real digits, in minutes on two CPU cores, and write a report.

vanilla, stage 1 alone and both stages are trained for the same number of student steps from the same seeds. The report
shows the measurements and assumes no order of the methods.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import load_model
from selftrans.config import RunConfig
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import decode_images, latents_of
from selftrans.data.prepare import prepare_digits
from selftrans.device import default_device
from selftrans.encoders.autoencoder import load_autoencoder
from selftrans.evaluate.extractors import load_extractor
from selftrans.evaluate.plots import as_pictures, save
from selftrans.evaluate.probes import collect, pca_basis, pca_maps
from selftrans.experiments import html_report
from selftrans.experiments.compare import equal_lengths, for_method
from selftrans.experiments.measurement import PROBE_T, samples_of
from selftrans.experiments.runner import Comparison, Results, compare
from selftrans.experiments.summary import as_csv, mean_curve, rows
from selftrans.flow import PATHS
from selftrans.methods.self_transcendence import SELF_TRANSCENDENCE, STRUCTURE, Stage1
from selftrans.methods.vanilla import VANILLA
from selftrans.recipes.digits import digits
from selftrans.storage import lock_file, write_json, write_text

#: name of the method -> its title in the report; stage 1 precedes stage 2, which it teaches
METHODS = {spec.name: spec.title for spec in (VANILLA, STRUCTURE, SELF_TRANSCENDENCE)}
IMAGES = 1000  #: samples for each distance
SHOWN = 42  #: samples in the report, per method
MAPPED = 8  #: digits whose features are shown as PCA maps


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
    if not seeds or len(set(seeds)) < len(seeds) or images < 2:
        raise ValueError("the quickstart needs seeds that differ from each other, and at least two images")
    started = time.perf_counter()
    config = digits()
    if steps is not None:
        config = config.override({"train.steps": steps}).check()
    with lock_file(out / ".lock"):
        dataset = prepare_digits(out / "data")
        config = config.override({"data.path": str(out / "data")})
        classifier = out / "digits-classifier.safetensors"
        load_extractor("digits", weights=classifier)  # trained once, before the workers load it
        # the teacher is the final stage 1, so that all rows of the table have the same number of steps
        config = equal_lengths(config)
        variants = {name: for_method(config, name) for name in METHODS}
        chosen = Comparison(config, variants, tuple(seeds), out, images, "digits", str(classifier))
        results = compare(chosen, workers=workers)
        summary = summarise(chosen, results)
        summary["seconds"] = round(time.perf_counter() - started + _seconds_before(out, summary), 1)
        write(out, summary, dataset, config, seeds[0])
    print(html_report.text_table(summary["table"], METHODS, summary["metric"]))
    print(f"\n{summary['seconds']:.0f} s. Open {out / 'report.html'}")
    return summary


def _seconds_before(out: Path, summary: dict[str, Any]) -> float:
    """Seconds that earlier calls for the same comparison took; 0 if unknown."""
    try:
        before = json.loads((out / "table.json").read_text())
        return float(before["seconds"]) if before["table"] == summary["table"] else 0.0
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # the first call, or a damaged table
        return 0.0


def summarise(chosen: Comparison, results: Results) -> dict[str, Any]:
    """The content of table.json."""
    shared, point = chosen.shared, next(iter(results.values()))[1][-1]
    return {
        "table": rows(results, tuple(METHODS)),
        "metric": point["metric"],
        "sampler": point["sampler"],
        "extractor_sha256": point["extractor_sha256"],
        "curves": {name: mean_curve(results, name) for name in METHODS},
        "seeds": list(chosen.seeds),
        "steps": shared.train.steps,
        "teacher_steps": shared.section(Stage1).steps,
        "block": chosen.block,
        "images": chosen.images,
    }


def write(out: Path, summary: dict[str, Any], dataset: Dataset, config: RunConfig, seed: int) -> None:
    """Write the table, the overview picture and the report."""
    grids = {label: samples_of(out / f"{name}-seed{seed}", config.sample, SHOWN) for name, label in METHODS.items()}
    maps = {label: maps_of(out / f"{name}-seed{seed}", dataset, summary["block"]) for name, label in METHODS.items()}
    curves = {METHODS[name]: curve for name, curve in summary["curves"].items()}
    save(html_report.overview(curves, grids, summary["metric"]), out / "quickstart.png")
    page = html_report.page(summary, METHODS, curves, grids, maps)
    write_json(out / "table.json", summary)
    write_text(out / "table.csv", as_csv(summary["table"]))
    write_text(out / "report.html", page)


def maps_of(run: Path, dataset: Dataset, block: int) -> dict[str, np.ndarray]:
    """Row name -> pictures: the digits, and PCA maps of the shallow block at every checkpoint in the last one's basis."""
    z0, labels = latents_of(dataset, np.arange(min(MAPPED, len(dataset))))
    stage, device = json.loads((run / "run.json").read_text())["stages"][-1]["stage"], default_device()
    loaded = [load_model(folder) for _, folder in checkpoint.steps(run / stage / "checkpoints")]
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
