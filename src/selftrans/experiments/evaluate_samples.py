"""`selftrans evaluate`: compare images, or samples of a run, with a reference ⇒ a report, printed and written as json.

Shape legend: images are pictures, uint8 (n, H, W, C), or arrays that are not pictures, float32 (n, C, *S).
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from selftrans.checkpoints import hub
from selftrans.checkpoints.load import Weights
from selftrans.data.buckets import is_prepared, open_data
from selftrans.device import default_device
from selftrans.evaluate.clip_score import ClipScorer
from selftrans.evaluate.extractors import Extractor, OtherShape, load_extractor
from selftrans.evaluate.metrics import evaluate
from selftrans.experiments.comparison.measurement import check_sizes, image_shape
from selftrans.experiments.opened_samples import open_samples
from selftrans.experiments.reference import counted, described, reference_of
from selftrans.messages import filled, plural, printable
from selftrans.sample_config import beyond_defaults
from selftrans.storage import check_writable, write_json

#: settings of samples that a report always lists, known or not
SETTINGS = (
    "sampler", "steps", "guidance_scale", "guidance_interval", "autoencoder", "weights", "step", "seed", "labels", "precision",
)  # fmt: skip
LISTED = 12  #: numbers of a setting that are printed


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
    clip: str | None = None,
    text_encoder: str | None = None,
    show: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Compare images, or a run, with a reference; writes the report as json and returns it.

    Args:
        samples: a folder, zip or npz of images, prepared data, or a run, checkpoint or weights file, which is sampled
            in memory under `settings` (fields of SampleConfig; `weights` and `stage` choose the model). A run of text
            without prompts in its settings is sampled with captions: one of each picture of the reference, if that is
            prepared data with captions, else of the training data.
        reference: images in the same forms, `digits`, or an npz of statistics (`mu`, `sigma`). With prepared data of several
            sizes, a run is sampled in these sizes, in the same proportions.
        features: name or file of an extractor, see `load_extractor`; None: `inception` for pictures, else `values`.
        out: file for the report; None: next to the images, or in the run (ValueError for one on the hub).
        save_reference: npz file for the statistics of the reference, with ADM's names.
        clip: a CLIPModel by hub id or folder: the CLIP score of the images and their prompts is measured, too.
        text_encoder: where the encoder of the prompts lies, if not where it was.
        show: see `finished`.
    Raises ValueError for unknown features, invalid images, statistics of another extractor, and unknown prompts.
    """
    if out is None and hub.on_hub(samples):
        raise ValueError(f"{printable(samples)} is on the hub, where no report is written; give --out FILE")
    extractor = _named_extractor(features, reference)
    opened = open_samples(samples, settings or {}, weights, stage, reference=reference, text_encoder=text_encoder)
    for target in (out or opened.report, *([save_reference] if save_reference else [])):
        check_writable(target)
    images, scorer = opened.images, None
    if clip is not None:
        if opened.texts is None:
            raise ValueError(f"no prompts are recorded for the images of {samples}; leave out --clip")
        scorer = ClipScorer(clip, default_device())
        images = scorer.observe(images, opened.texts)
    if extractor is None:
        extractor, images = _extractor_of(features, images, opened.pictures)
    with _input_named("reference", reference):
        statistics = reference_of(reference, extractor)
    if save_reference is not None:
        statistics.save(save_reference)
    images = counted(images, opened.total, "samples")
    with _input_named("samples", samples):
        report = evaluate(images, statistics, extractor, labels=opened.labels, reference_name=described(reference))
    made = {name: (opened.settings or {}).get(name) for name in SETTINGS} | (opened.settings or {})
    report |= {"samples": str(samples), "made": made, "label_balance": _balance(opened.labels)}
    report |= scorer.report() if scorer else {}
    return finished(report, out or opened.report, show)


def finished(
    report: dict[str, Any], file: Path, show: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Show the report, write it, and return it. In this order, so that it is not lost where the disk is full."""
    if show is not None:
        show(report)
    write_json(file, report)
    return report


@contextlib.contextmanager
def _input_named(what: str, path: str | Path) -> Iterator[None]:
    """Within the block, errors about the shape of images name the input that they are from."""
    try:
        yield
    except OtherShape as error:
        raise ValueError(f"{what} {printable(path)}: {error}") from error


def _named_extractor(features: str | None, reference: str | Path) -> Extractor | None:
    """The extractor, where its name or a reference of several sizes says which; None where the images do.

    ValueError unless it takes all sizes of the reference.
    """
    if is_prepared(reference) and len((dataset := open_data(reference)).parts) > 1:
        extractor = _loaded(features or "inception", image_shape(dataset.manifest))
        check_sizes(extractor, dataset)
        return extractor
    return None if features in (None, "values") else _loaded(features)


def _extractor_of(
    features: str | None, images: Iterator[np.ndarray], pictures: bool | None
) -> tuple[Extractor, Iterator[np.ndarray]]:
    """The extractor that fits the images, and all images. `pictures`: whether they are known to be pictures."""
    if features is None and pictures:
        return _loaded("inception"), images  # it may not be installed: before anything is sampled
    first = next(images)
    extractor = _loaded(features or ("inception" if first.dtype == np.uint8 else "values"), first.shape[1:])
    return extractor, itertools.chain([first], images)


def _loaded(features: str, shape: tuple[int, ...] | None = None) -> Extractor:
    return load_extractor(features, device=default_device(), shape=shape)


def _balance(labels: Any) -> dict[str, int] | None:
    """Number of classes that occur, and the fewest and most images of one of them."""
    if labels is None or not len(labels):
        return None
    counts = Counter(np.asarray(labels).tolist())
    return {"classes": len(counts), "fewest": min(counts.values()), "most": max(counts.values())}


#: key of a report -> its name in the table, in this order
TITLES = {
    "fid": "FID",
    "frechet_distance": "Fréchet distance",
    "sfid": "sFID",
    "spatial_frechet_distance": "spatial Fréchet distance",
    "inception_score": "Inception Score",
    "classifier_score": "classifier score",
    "precision": "precision",
    "recall": "recall",
    "authenticity": "authenticity",
    "kid": "KID",
    "kernel_distance": "kernel distance",
    "accuracy": "accuracy of the labels",
    "clip_score": "CLIP score",
}

#: key of a report -> what the text says of the parameters of a metric
COMPUTED: dict[str, Callable[[dict[str, Any]], str]] = {
    "is_splits": lambda r: f"score over {plural(r['is_splits'], 'split')}",
    "neighbours": lambda r: (
        f"precision and recall with {plural(r['neighbours'], 'neighbour')}"
        + (f" of {r['manifold_images']:,} images at most" if "manifold_images" in r else "")
    ),
    "kernel_subsets": lambda r: (
        f"kernel distance over {plural(r['kernel_subsets'], 'subset')} of {plural(r['kernel_subset_size'], 'image')}"
    ),
    "clip_model": lambda r: (
        f"CLIP score is the mean of 100 max(cos, 0) by {r['clip_model']}, sha256 {r['clip_model_sha256']:.12}"
    ),
}


def text(report: dict[str, Any]) -> str:
    """The report as text: the numbers, and below them what they depend on."""
    lines = []
    for key, name in TITLES.items():
        if key in report:
            deviation = f" ± {report[f'{key}_std']:.4g}" if f"{key}_std" in report else ""
            lines.append(f"{name:<26}{report[key]:.5g}{deviation}")
    made, balance = report["made"], report["label_balance"]
    prompts = _prompt_source(made)
    texts = [printable(said) for said in beyond_defaults(made)] + prompts + _sizes(made)
    made_with = [
        f"{name.replace('_', ' ')} {'unknown' if made[name] is None else _setting_text(made[name])}"
        for name in SETTINGS
        if not (prompts and name == "labels")
    ] + texts
    if balance:
        few, most = balance["fewest"], balance["most"]
        each = plural(few, "image") if few == most else f"{few} to {most} images"
        made_with.append(f"{each} of each of {plural(balance['classes'], 'class')}")
    elif made.get("num_classes") not in (0, 1):  # without classes there is no balance
        made_with.append("label balance unknown")
    if not texts and not balance and all(made[name] is None for name in SETTINGS):  # not written by `selftrans sample`
        made_with = ["how the samples were made is not recorded: settings and labels are unknown"]
    computed = [parameters(report) for key, parameters in COMPUTED.items() if key in report]
    count = report["reference_images"]
    reference = f"{report['reference']} ({'unknown number of images' if count is None else plural(count, 'image')})"
    lines += [
        "",
        f"{plural(report['num_images'], 'image')} of {report['samples']} against {reference}",
        f"features: {report['extractor']}, sha256 {report['extractor_sha256'][:12]}",
        *([", ".join(computed)] if computed else []),
        ", ".join(made_with),
    ]
    return "\n".join(map(filled, [*lines, *([f"note: {report['note']}"] if report["note"] else [])]))


def _prompt_source(made: dict[str, Any]) -> list[str]:
    """Where the prompts of the samples are from; nothing without prompts."""
    if made.get("prompts"):
        return [plural(len(made["prompts"]), "prompt")]
    return [f"captions of {printable(made['captions'])}"] if made.get("captions") else []


def _sizes(made: dict[str, Any]) -> list[str]:
    """How many images have which size; nothing where all have the same."""
    sizes = made.get("sizes")
    if not isinstance(sizes, dict):
        return []
    return [f"sizes {', '.join(f'{printable(size)} ({count})' for size, count in sizes.items())}"]


def _setting_text(value: Any) -> str:
    if not isinstance(value, (list, tuple)):
        return str(value)
    return f"[{', '.join(f'{each:g}' for each in value)}]" if len(value) <= LISTED else f"{len(value):,} listed"
