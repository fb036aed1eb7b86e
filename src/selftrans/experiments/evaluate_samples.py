"""`selftrans evaluate`: pictures, or a run that is sampled on the way, against a reference: one report, printed and kept.

Statistics of a reference are computed once and kept in the user's cache. Shape legend: (n, R, R, C) uint8 images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

import numpy as np
import torch
from tqdm import tqdm

from selftrans.checkpoints.load import Weights
from selftrans.data.dataset import Dataset
from selftrans.data.sources.npz import npz_labels
from selftrans.data.sources.open_source import iter_images
from selftrans.evaluate.classifier import digits
from selftrans.evaluate.extractors import Extractor, load_extractor
from selftrans.evaluate.metrics import evaluate
from selftrans.evaluate.statistics import Statistics
from selftrans.experiments.analyse_run import shard_images
from selftrans.sampling.images import is_model, sampling
from selftrans.storage import first_line, write_json

WANTED = "give a folder, zip or npz of pictures, prepared data, or statistics"
FOREIGN = (".pt", ".pth", ".ckpt")  #: checkpoints that only `selftrans import` reads
#: settings of samples that a report always names, known or not
SETTINGS = (
    "sampler",
    "steps",
    "guidance_scale",
    "guidance_interval",
    "autoencoder",
    "weights",
    "step",
    "seed",
    "labels",
)


class Samples(NamedTuple):
    """What is measured."""

    images: Iterator[np.ndarray]
    made: dict[str, Any] | None  #: how; None where nobody has written it down
    labels: Any  #: (n,) or a list that fills while the images stream; None where there are none to be right about
    total: int | None  #: images to come, where that is known
    report: Path  #: where the report is kept, unless told otherwise


def evaluate_samples(
    samples: str | Path,
    reference: str | Path,
    features: str,
    *,
    settings: dict[str, Any] | None = None,
    weights: Weights = "ema",
    stage: str | None = None,
    out: Path | None = None,
    save_reference: Path | None = None,
) -> dict[str, Any]:
    """Measure pictures, or a run, against a reference and keep the report as json; returns it.

    Args:
        samples: a folder, zip or npz of pictures, or a run, checkpoint or weights file, which is sampled without touching
            the disk under `settings` (fields of SampleConfig; `weights`, `stage` choose the model).
        reference: pictures in the same forms, prepared data, `digits`, or an npz of statistics (`mu`, `sigma`).
        out: of the report; None: beside the pictures, or in the run. save_reference: an npz for the statistics, as ADM's.
    Raises ValueError for unknown features, unfit pictures and statistics of another extractor.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor = load_extractor(features, device=device)
    given = open_samples(samples, settings or {}, weights, stage)
    statistics = reference_of(reference, extractor)
    if save_reference is not None:
        statistics.save(save_reference)
    images = _counted(given.images, given.total)
    report = evaluate(images, statistics, extractor, labels=given.labels, reference_name=_described(reference))
    made = {name: (given.made or {}).get(name) for name in SETTINGS} | (given.made or {})
    report |= {"samples": str(samples), "made": made, "label_balance": _balance(given.labels)}
    write_json(out or given.report, report)
    return report


def open_samples(
    samples: str | Path, settings: dict[str, Any], weights: Weights = "ema", stage: str | None = None
) -> Samples:
    """Pictures as they lie there, or as a run makes them."""
    path = Path(samples)
    if path.suffix in FOREIGN:
        raise ValueError(f"{path} is a checkpoint of another code; make a run of it with `selftrans import`")
    _must_exist(path)
    if path.name == "samples.npz" and (path.parent / "samples.json").exists():
        path = path.parent  # ours: what it was made with lies beside it
    if is_model(path):
        made = sampling(path, settings, weights=weights, stage=stage)
        labels: list[int] | None = [] if made.described["num_classes"] > 1 else None

        def images() -> Iterator[np.ndarray]:
            for _, conditions, batch in made.sample(np.arange(made.config.num)):
                if labels is not None:
                    labels.extend(conditions.tolist())
                yield batch

        target = path if path.is_dir() else path.parent
        return Samples(images(), made.described, labels, made.config.num, target / "evaluate.json")
    for name in settings:
        warnings.warn(f"--{name.replace('_', '-')} is ignored: {path} holds pictures, not a run", stacklevel=3)
    described, found, stream = _sampled(path)
    target = path / "evaluate.json" if path.is_dir() else path.with_suffix(".evaluate.json")
    return Samples(stream, described, found, None, target)


def _must_exist(path: Path, wanted: str = "give a folder, zip or npz of pictures, or a run") -> None:
    """ValueError where nothing is at `path`: a name with one slash would be looked for on the hub, slowly."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; {wanted}")


def _sampled(samples: Path) -> tuple[dict[str, Any] | None, np.ndarray | None, Iterator[np.ndarray]]:
    """How the images were made, where `selftrans sample` has written it, their labels, where known, and the images."""
    record, archive = samples / "samples.json", samples / "samples.npz"
    if not record.exists():
        return None, npz_labels(samples) if samples.suffix.lower() == ".npz" else None, iter_images(samples)
    try:
        made = json.loads(record.read_text())
        complete, settings = made["complete"] and archive.exists(), made["settings"] | {"num": made["num"]}
        if complete:
            with np.load(archive, allow_pickle=False) as arrays:
                if arrays.zip.getinfo("arr_1.npy").file_size > archive.stat().st_size:  # ours are not packed
                    raise ValueError("its labels would expand beyond the file")
                labels = arrays["arr_1"]
    except Exception as error:  # of json, zip and npz: as many kinds as there are ways to be torn
        raise ValueError(f"{samples} is damaged ({first_line(error)}); delete it and sample again") from error
    if not complete:
        raise ValueError(f"{samples} is not complete; repeat the `selftrans sample` command that began it")
    told = settings.get("num_classes", 2) > 1  # with one label for all, any accuracy would look fine
    return settings, labels if told else None, iter_images(archive)


def _balance(labels: Any) -> dict[str, int] | None:
    """Fewest and most images of a class that occurs, and how many classes do."""
    if labels is None or not len(labels):
        return None
    counts = Counter(np.asarray(labels).tolist())
    return {"classes": len(counts), "fewest": min(counts.values()), "most": max(counts.values())}


def _counted(batches: Iterator[np.ndarray], total: int | None) -> Iterator[np.ndarray]:
    """The same batches, with a progress bar."""
    with tqdm(desc="measuring", unit="img", total=total) as bar:
        for images in batches:
            yield images
            bar.update(len(images))


def reference_of(reference: str | Path, extractor: Extractor) -> Statistics:
    """Statistics of a reference (see `evaluate_samples`) in the features of `extractor`, from the cache if they are there.

    An npz of statistics that holds pictures, too (ADM's reference batches), has its features from those.
    """
    path = Path(reference)
    if str(reference) == "digits":
        return Statistics.of(digits()[0], extractor, source="digits")
    if path.suffix == ".npz" and (names := _names(path)) & {"mu"}:
        statistics = Statistics.load(path)
        if statistics.features is not None or not names & {"arr_0"} or statistics.dim != extractor.dim:
            return statistics
        return dataclasses.replace(statistics, features=_cached(path, extractor).features)  # of fewer than mu and sigma
    return _cached(path, extractor)


def _cached(path: Path, extractor: Extractor) -> Statistics:
    """Statistics of pictures: from the cache, or computed and put there; a cache that refuses to be written is no harm."""
    _must_exist(path, WANTED)
    kept = cache() / f"{_identity(path, extractor)}.npz"
    if kept.exists():
        with contextlib.suppress(ValueError):  # damaged: computed again
            return Statistics.load(kept)
    images = shard_images(Dataset.open(path)) if (path / "manifest.json").exists() else iter_images(path)
    statistics = Statistics.of(_counted(iter(images), None), extractor, source=_described(path))
    with contextlib.suppress(ValueError):  # a full disk, or a home that cannot be written
        statistics.save(kept)
    return statistics


def _described(reference: str | Path) -> str:
    """A reference in words: what is decoded from latents is not what the VAE was given."""
    if not Path(reference, "manifest.json").exists():
        return str(reference)
    manifest = Dataset.open(reference).manifest
    return str(reference) + (f", decoded by {manifest.autoencoder}" if manifest.latent_space.stochastic else "")


def cache() -> Path:
    """Where statistics of references are kept: XDG_CACHE_HOME, by default ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "selftrans", "statistics")


def _identity(path: Path, extractor: Extractor) -> str:
    """A hash of the extractor's weights and of which pictures these are: place, names, sizes, times of change."""
    lines = [extractor.sha256, str(path.resolve())]
    files = (
        [path]
        if path.is_file()
        else sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != ".json")
    )
    if (path / "manifest.json").exists():
        files = [path / "manifest.json"]  # holds the sha256 of every shard
        lines.append("posterior means")  # how they are decoded; at first they were drawn
    for file in files:
        about = file.stat()
        lines.append(f"{file.relative_to(path) if file != path else ''}|{about.st_size}|{about.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:40]


def _names(path: Path) -> set[str]:
    """Arrays of an npz. ValueError where there is none."""
    _must_exist(path, WANTED)
    try:
        with ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception as error:  # a damaged directory makes zipfile raise more than BadZipFile
        raise ValueError(f"{path} cannot be read ({first_line(error)}); {WANTED}") from error


#: key of a report -> what the table calls it; in this order
METRICS = {
    "fid": "FID",
    "frechet_distance": "Fréchet distance",
    "sfid": "sFID",
    "spatial_frechet_distance": "spatial Fréchet distance",
    "inception_score": "Inception Score",
    "classifier_score": "classifier score",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID",
    "kernel_distance": "kernel distance",
    "accuracy": "accuracy of the labels",
}

#: key of a report -> what the table says of how its numbers were computed
COMPUTED = {
    "is_splits": "score over {is_splits} splits",
    "neighbours": "precision and recall with {neighbours} neighbours",
    "kernel_subsets": "kernel distance over {kernel_subsets} subsets of {kernel_subset_size} images",
}


def text(report: dict[str, Any]) -> str:
    """The report for a terminal: the numbers, and below them all that they depend on."""
    lines = []
    for key, name in METRICS.items():
        if key in report:
            deviation = f" ± {report[f'{key}_std']:.4g}" if f"{key}_std" in report else ""
            lines.append(f"{name:<26}{report[key]:.5g}{deviation}")
    made, balance = report["made"], report["label_balance"]
    told = [f"{name.replace('_', ' ')} {'unknown' if made[name] is None else _short(made[name])}" for name in SETTINGS]
    if balance:
        told.append(f"{balance['fewest']} to {balance['most']} images of each of {balance['classes']} classes")
    elif made.get("num_classes") not in (0, 1):  # without classes there is nothing to balance
        told.append("label balance unknown")
    computed = [form.format(**report) for key, form in COMPUTED.items() if key in report]
    against = f"{report['reference']} ({report['reference_images'] or 'unknown number of'} images)"
    lines += [
        "",
        f"{report['num_images']:,} images of {report['samples']} against {against}",
        f"features: {report['extractor']}, sha256 {report['extractor_sha256'][:12]}",
        *([", ".join(computed)] if computed else []),
        ", ".join(told),
    ]
    return "\n".join([*lines, *([f"note: {report['note']}"] if report["note"] else [])])


def _short(value: Any) -> str:
    return f"[{value[0]:g}, {value[1]:g}]" if isinstance(value, (list, tuple)) and len(value) == 2 else str(value)
