"""Checkpoints measured along a run: distance, accuracy of the labels, and a linear probe of a shallow block.

Each point is measured once and kept in the run's `measured.json`. Shape legend: n images.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import FILES, load_model
from selftrans.config import RunConfig, SampleConfig
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import data_latents
from selftrans.data.manifest import Manifest
from selftrans.data.resolution import sides
from selftrans.device import default_device
from selftrans.encoders.identity import identity_kind
from selftrans.evaluate.extractors import Extractor, FeaturesNotFinite, load_extractor
from selftrans.evaluate.metrics import evaluate
from selftrans.evaluate.probes import can_be_probed, collect, linear_probe
from selftrans.evaluate.statistics import Statistics
from selftrans.experiments.reference import decoder_sha256, training_statistics
from selftrans.flow import PATHS
from selftrans.plain_json import recorded
from selftrans.sampling.conditioning import Conditioning, LabelConditioning, captions_of
from selftrans.sampling.images import NotFinite, SampledBatch, Sampler, decoder_dtype
from selftrans.sampling.run_settings import applicable_settings
from selftrans.sampling.sized_sampler import SizedSampler
from selftrans.storage import write_json
from selftrans.train.run_data import data_of

MEASURED = "measured.json"  #: of a run: its points, oldest first
DECODED_BY = "autoencoder_sha256"  #: entry of a point: a hash of the files of the autoencoder that decoded its samples
SHARED = ("sampler", "images", "extractor_sha256", "block")  #: entries that all points of a table have in common
BATCH = {"cpu": 125, "other": 500}  #: images sampled at a time; larger batches leave the caches of a core
PROBE_T = 0.4  #: noise level of the linear probe, the paper's
PROBED_BLOCK = 2  #: where a method guides no block; the first guided one in every published setting

Point: TypeAlias = dict[str, Any]  #: what was measured of a checkpoint, as in MEASURED
#: called with the number of training steps done, or their equivalent in measuring
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Measurement:
    """How a process measures checkpoints."""

    extractor: Extractor
    reference: Statistics
    dataset: Dataset
    sample: SampleConfig  #: how many images, and how
    block: int  #: the shallow block that is probed (1-based)
    conditioning: Conditioning  #: the conditions of the images: labels, or captions stored with the data
    identity: dict[str, Any]  #: see `identity_of`
    total: int | None = None  #: images that the process samples in all, from which compilation may save time
    decoder: torch.dtype = torch.float32  #: of the autoencoder's network, for samples and reference alike

    @classmethod
    def of(
        cls,
        config: RunConfig,
        features: str,
        *,
        weights: str | None,
        images: int,
        block: int,
        total: int | None = None,
        kept: Path | None = None,
    ) -> Measurement:
        """Distances to the training data, on the device at hand.

        Args:
            config: data and sampler. features: an extractor, by name or file; weights: where a named one is kept.
            images: samples for each distance. block: the one that is probed (1-based). total: see the field.
            kept: the folder that keeps the statistics of the training data; None: they are computed anew.
        """
        dataset, device = data_of(config.data), default_device()
        extractor = load_extractor(features, weights=weights, device=device, shape=image_shape(dataset.manifest))
        dtype = decoder_dtype(device, config.sample.precision)
        reference = training_statistics(dataset, extractor, dtype=dtype, folder=kept)
        most = BATCH["cpu" if device.type == "cpu" else "other"]
        sample = dataclasses.replace(config.sample, num=images, batch_size=min(most, images))
        conditioning = stored_conditions(dataset, sample)
        identity = identity_of(sample, dataset, conditioning, extractor.sha256, block)
        return cls(extractor, reference, dataset, sample, block, conditioning, identity, total, dtype)


def identity_of(
    sample: SampleConfig, dataset: Dataset, conditioning: Conditioning, extractor_sha256: str, block: int
) -> dict[str, Any]:
    """What two measured points must share to be comparable, as json has it; see `Measurement` for the parts.

    No autoencoder is loaded for it, and no image decoded.
    """
    found = {
        "sampler": json.loads(json.dumps(sample.settings() | conditioning.described)),
        "images": sample.num,
        "extractor_sha256": extractor_sha256,
        "block": block,
    }
    found |= {} if decoder_dtype(default_device(), sample.precision) == torch.float32 else {"decoder": "bf16"}
    decoded_by = decoder_sha256(dataset.manifest.autoencoder)
    return found | ({DECODED_BY: decoded_by} if decoded_by else {})


def stored_conditions(dataset: Dataset, sample: SampleConfig) -> Conditioning:
    """Labels as `sample` says; of data with captions, these, whose tokens are stored: no encoder is needed."""
    conditions = dataset.manifest.conditions
    if conditions.kind == "text":
        return captions_of(dataset, conditions, sample.seed, device=default_device())
    return LabelConditioning(conditions, sample.labels, sample.seed, dataset.present)


def image_shape(manifest: Manifest) -> tuple[int, ...]:
    """The shape of one decoded image: (H, W, C) of a picture, else (C, *S)."""
    if manifest.resolution is None or manifest.image_channels is None:
        return manifest.shape  # an autoencoder of arrays that are no pictures changes none
    if identity_kind(manifest.autoencoder):
        return *manifest.shape[1:], manifest.shape[0]
    return *sides(manifest.resolution), manifest.image_channels


def check_sizes(extractor: Extractor, dataset: Dataset) -> None:
    """ValueError unless the extractor takes pictures of every size of the data, where they have several."""
    parts = dataset.of_one_shape if len(dataset.of_one_shape) > 1 else ()
    for part in parts:
        try:
            extractor(np.zeros((1, *image_shape(part.manifest)), dtype=np.uint8))
        except ValueError as error:
            raise ValueError(
                f"{dataset.path} holds buckets of several sizes, and {error}; of the built-in features, inception takes any "
                "size of colour pictures"
            ) from error


def measure_point(run: Path, folder: Path, measurement: Measurement) -> Point:
    """A checkpoint of a run, measured, or as it was measured before. `NotFinite` where samples or their features are not."""
    digest = checkpoint.read(folder).state["sha256"][FILES["ema"]]
    known = measured_before(run / MEASURED, measurement.identity).get(digest)
    try:
        return known or measure_checkpoint(folder, measurement) | {"sha256": digest}
    except (NotFinite, FeaturesNotFinite) as error:
        raise NotFinite(f"{folder} cannot be measured: {error}; leave its method out, or train it again") from error


def stored_points(path: Path) -> list[Point]:
    """The points in a MEASURED file; nothing if it is missing or damaged."""
    found: Any = recorded(path, lambda held: held, [])
    points = found if isinstance(found, list) else []
    return [point for point in points if isinstance(point, dict) and isinstance(point.get("sha256"), str)]


def measured_before(path: Path, identity: dict[str, Any]) -> dict[str, Point]:
    """Points that were measured in the same way, by the hash of their weights; none for a missing or damaged file.

    Incomplete points are left out, and so measured again. Earlier versions did not record the autoencoder's files: those are
    taken to be the same.
    """
    same = {"decoder": None} | identity  # without the key: fp32
    unrecorded = {DECODED_BY: identity.get(DECODED_BY)}
    return {
        point["sha256"]: point
        for point in stored_points(path)
        if _is_complete(point) and same.items() <= (unrecorded | {"decoder": None} | point).items()
    }


def _is_complete(point: Point) -> bool:
    """Whether a point has all that tables and curves are made of, in these types of json."""
    kinds: dict[str, set[type]] = {"step": {int}, "seconds": {int, float}, "metric": {str}, "distance": {int, float}}
    kinds |= {key: {int, float, type(None)} for key in ("tflops", "accuracy", "probe")}
    return all(key in point and type(point[key]) in allowed for key, allowed in kinds.items())


def check_alike(points: Iterable[Point], features: str) -> None:
    """ValueError unless points were measured in the same way: a file may be replaced while a comparison is measured."""
    first: Point = {}
    for point in points:
        entries = {key: point[key] for key in (*SHARED, "decoder", DECODED_BY) if key in point}
        if any(first.get(key, value) != value for key, value in entries.items()):
            raise ValueError(
                f"not all was measured in the same way: features {features}, or the autoencoder, changed meanwhile; the same "
                "command measures again what differs"
            )
        first = entries | first


class PointsFile:
    """MEASURED of a run: the points at its checkpoints `due`, which are measured in any order.

    `known`: those that the file has already.
    """

    def __init__(self, run: Path, due: Sequence[Path], known: Mapping[Path, Point] | None = None) -> None:
        self.path = run / MEASURED
        self._points: dict[Path, Point | None] = {folder: (known or {}).get(folder) for folder in due}
        self._before = stored_points(self.path)

    @property
    def points(self) -> list[Point]:
        """Those that are measured, oldest first."""
        return [point for point in self._points.values() if point]

    def add(self, folder: Path, point: Point) -> None:
        """Note a point, and write the file. Earlier ones stay in it until all are there: they may yet be needed."""
        self._points[folder] = point
        known = {point["sha256"] for point in self.points}
        earlier = [] if all(self._points.values()) else [p for p in self._before if p["sha256"] not in known]
        write_json(self.path, self.points + earlier)


def measure_checkpoint(folder: Path, measurement: Measurement) -> dict[str, Any]:
    """Distance, accuracy and shallow probe of a checkpoint's EMA, and what training has cost up to it."""
    loaded, device = load_model(folder, weights="ema"), default_device()
    classes = loaded.model.conditions.num_classes
    path = PATHS[loaded.config.train.path]
    # first: a sampler casts and compiles the model in place
    probed = probe(loaded.model.to(device), measurement, path) if classes > 1 else None
    settings = applicable_settings(measurement.sample, loaded.model)
    sampler = Sampler.of(
        loaded, settings, device=device, conditioning=measurement.conditioning, total=measurement.total
    )
    found = measure_samples(list(SizedSampler(sampler, measurement.dataset).sample()), measurement)
    spent = checkpoint.read_header(folder / FILES["ema"])
    cost = {"step": loaded.step, "seconds": spent["seconds"], "tflops": spent["tflops"]}
    return cost | found | {"probe": probed} | measurement.identity


def measure_samples(batches: Sequence[SampledBatch], measurement: Measurement) -> dict[str, Any]:
    """Distance of samples to the training data and, with classes that the extractor knows, accuracy of their labels."""
    labels, classes = np.concatenate([batch.labels for batch in batches]), measurement.dataset.manifest.num_classes
    metrics = ("frechet", "accuracy") if classes > 1 and measurement.extractor.head else ("frechet",)
    images = (batch.images for batch in batches)
    report = evaluate(images, measurement.reference, measurement.extractor, labels=labels, metrics=metrics)
    return {"metric": report["label"], "distance": report[report["metric"]], "accuracy": report.get("accuracy")}


def probe(model: Any, measurement: Measurement, path: Any, most: int = 4000) -> float | None:
    """Accuracy of a linear classifier on the shallow block's features at t = 0.4, under the null condition.

    None where the pictures that it would be fitted on have one class only.
    """
    z0, labels = data_latents(measurement.dataset, most)
    if not can_be_probed(labels):
        return None
    feats = collect(model, z0, model.null(labels), t=PROBE_T, taps=(measurement.block,), path=path, pooled=True)
    return linear_probe(feats[measurement.block].to(default_device()), labels)


def samples_of(run: Path, sample: SampleConfig, num: int, conditioning: Conditioning | None = None) -> np.ndarray:
    """Images 0 .. num - 1 of a finished run, or of a checkpoint: the same noise and conditions for every method."""
    loaded, settings = load_model(run), dataclasses.replace(sample, num=num, seed=1, batch_size=num)
    sampler = Sampler.of(loaded, applicable_settings(settings, loaded.model), conditioning=conditioning)
    return np.concatenate([batch.images for batch in sampler.sample()])
