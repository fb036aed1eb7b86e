"""`selftrans evaluate`: compare images, or samples of a run, with a reference ⇒ a report, printed and written as json.

Shape legend: images are pictures, uint8 (n, H, W, C), or arrays that are not pictures, float32 (n, C, *S).
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import Weights
from selftrans.data.sources.npz import npz_labels
from selftrans.device import default_device
from selftrans.evaluate.extractors import load_extractor
from selftrans.evaluate.metrics import evaluate
from selftrans.experiments.image_files import open_images
from selftrans.experiments.reference import counted, described, must_exist, reference_of
from selftrans.sampling.images import Sampler
from selftrans.storage import first_line, write_json

FOREIGN = (".pt", ".pth", ".ckpt")  #: suffixes of checkpoints that only `selftrans import` reads
#: settings of samples that a report always lists, known or not
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
    """The images to evaluate."""

    images: Iterator[np.ndarray]
    settings: dict[str, Any] | None  #: the sampling settings; None if they are not recorded
    labels: Any  #: (n,), or a list that fills while the images stream; None if unknown or without classes
    total: int | None  #: number of images, if known
    report: Path  #: default path of the report
    pictures: bool | None  #: whether they are pictures; None: only the first batch shows it


def evaluate_samples(
    samples: str | Path,
    reference: str | Path,
    features: str | None,
    *,
    settings: dict[str, Any] | None = None,
    weights: Weights = "ema",
    stage: str | None = None,
    out: Path | None = None,
    save_reference: Path | None = None,
) -> dict[str, Any]:
    """Compare images, or a run, with a reference; writes the report as json and returns it.

    Args:
        samples: a folder, zip or npz of images, prepared data, or a run, checkpoint or weights file, which is sampled
            in memory under `settings` (fields of SampleConfig; `weights` and `stage` choose the model).
        reference: images in the same forms, `digits`, or an npz of statistics (`mu`, `sigma`).
        features: name or file of an extractor, see `load_extractor`; None: `inception` for pictures, else `values`.
        out: file for the report; None: next to the images, or in the run.
        save_reference: npz file for the statistics of the reference, with ADM's names.
    Raises ValueError for unknown features, invalid images and statistics of another extractor.
    """
    device = default_device()
    extractor = None if features in (None, "values") else load_extractor(features, device=device)
    opened = open_samples(samples, settings or {}, weights, stage)
    images = opened.images
    if features is None and opened.pictures:  # before the first batch is sampled: inception may not be installed
        extractor = load_extractor("inception", device=device)
    if extractor is None:
        first = next(images)
        chosen = features or ("inception" if first.dtype == np.uint8 else "values")
        extractor = load_extractor(chosen, device=device, shape=first.shape[1:])
        images = itertools.chain([first], images)
    statistics = reference_of(reference, extractor)
    if save_reference is not None:
        statistics.save(save_reference)
    images = counted(images, opened.total)
    report = evaluate(images, statistics, extractor, labels=opened.labels, reference_name=described(reference))
    made = {name: (opened.settings or {}).get(name) for name in SETTINGS} | (opened.settings or {})
    report |= {"samples": str(samples), "made": made, "label_balance": _balance(opened.labels)}
    write_json(out or opened.report, report)
    return report


def open_samples(
    samples: str | Path, settings: dict[str, Any], weights: Weights = "ema", stage: str | None = None
) -> Samples:
    """Open stored images, or the images sampled from a run."""
    path = Path(samples)
    if path.suffix in FOREIGN:
        raise ValueError(f"{path} is a checkpoint of another code base; convert it with `selftrans import`")
    must_exist(path)
    if path.name == "samples.npz" and (path.parent / "samples.json").exists():
        path = path.parent  # written by `selftrans sample`: samples.json holds its settings
    if is_model(path):
        sampler = Sampler.load(path, settings, weights=weights, stage=stage)
        labels: list[int] | None = [] if sampler.model.conditions.num_classes > 1 else None

        def images() -> Iterator[np.ndarray]:
            for batch in sampler.sample():
                if labels is not None:
                    labels.extend(batch.labels.tolist())
                yield batch.images

        target = path if path.is_dir() else path.parent
        return Samples(
            images(),
            sampler.described,
            labels,
            sampler.settings.num,
            target / "evaluate.json",
            sampler.autoencoder.pictures,
        )
    for name in settings:
        warnings.warn(f"--{name.replace('_', '-')} is ignored: {path} holds images, not a run", stacklevel=3)
    recorded, stored_labels, stream = _stored(path)
    target = path / "evaluate.json" if path.is_dir() else path.with_suffix(".evaluate.json")
    return Samples(stream, recorded, stored_labels, None, target, None)


def is_model(path: Path) -> bool:
    """Whether `path` is a run, a stage, a checkpoint or a weights file, rather than images."""
    if path.is_file():
        return path.suffix == ".safetensors"
    return (path / "checkpoints").is_dir() or (path / checkpoint.STATE).exists() or (path / "config.json").exists()


def _stored(samples: Path) -> tuple[dict[str, Any] | None, np.ndarray | None, Iterator[np.ndarray]]:
    """The sampling settings if samples.json records them, the labels if they are known, and the images."""
    record, archive = samples / "samples.json", samples / "samples.npz"
    if not record.exists():
        return None, npz_labels(samples) if samples.suffix.lower() == ".npz" else None, open_images(samples)
    try:
        content = json.loads(record.read_text())
        complete, settings = content["complete"] and archive.exists(), content["settings"] | {"num": content["num"]}
        if complete:
            with np.load(archive, allow_pickle=False) as arrays:
                # `selftrans sample` does not compress the npz
                if arrays.zip.getinfo("arr_1.npy").file_size > archive.stat().st_size:
                    raise ValueError("its labels claim more bytes than the file has")
                labels = arrays["arr_1"]
    except Exception as error:  # json, zip and npz raise many types for damaged files
        raise ValueError(f"{samples} is damaged ({first_line(error)}); delete it and sample again") from error
    if not complete:
        raise ValueError(f"{samples} is not complete; repeat the `selftrans sample` command that began it")
    several = settings.get("num_classes", 2) > 1  # with one class, every accuracy would be 1
    return settings, labels if several else None, open_images(archive)


def _balance(labels: Any) -> dict[str, int] | None:
    """Number of classes that occur, and the fewest and most images of one of them."""
    if labels is None or not len(labels):
        return None
    counts = Counter(np.asarray(labels).tolist())
    return {"classes": len(counts), "fewest": min(counts.values()), "most": max(counts.values())}


#: key of a report -> its name in the table, in this order
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

#: key of a report -> how the text describes the parameters of a metric
COMPUTED = {
    "is_splits": "score over {is_splits} splits",
    "neighbours": "precision and recall with {neighbours} neighbours",
    "kernel_subsets": "kernel distance over {kernel_subsets} subsets of {kernel_subset_size} images",
}


def text(report: dict[str, Any]) -> str:
    """The report as text: the numbers, and below them what they depend on."""
    lines = []
    for key, name in METRICS.items():
        if key in report:
            deviation = f" ± {report[f'{key}_std']:.4g}" if f"{key}_std" in report else ""
            lines.append(f"{name:<26}{report[key]:.5g}{deviation}")
    made, balance = report["made"], report["label_balance"]
    made_with = [
        f"{name.replace('_', ' ')} {'unknown' if made[name] is None else _short(made[name])}" for name in SETTINGS
    ]
    if balance:
        made_with.append(f"{balance['fewest']} to {balance['most']} images of each of {balance['classes']} classes")
    elif made.get("num_classes") not in (0, 1):  # without classes there is no balance
        made_with.append("label balance unknown")
    computed = [form.format(**report) for key, form in COMPUTED.items() if key in report]
    reference = f"{report['reference']} ({report['reference_images'] or 'unknown number of'} images)"
    lines += [
        "",
        f"{report['num_images']:,} images of {report['samples']} against {reference}",
        f"features: {report['extractor']}, sha256 {report['extractor_sha256'][:12]}",
        *([", ".join(computed)] if computed else []),
        ", ".join(made_with),
    ]
    return "\n".join([*lines, *([f"note: {report['note']}"] if report["note"] else [])])


def _short(value: Any) -> str:
    return f"[{value[0]:g}, {value[1]:g}]" if isinstance(value, (list, tuple)) and len(value) == 2 else str(value)
