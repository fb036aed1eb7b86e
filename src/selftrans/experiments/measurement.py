"""Checkpoints measured along a run: distance, accuracy of the labels, and a linear probe of a shallow block.

Each point is measured once and kept in the run's `measured.json`. Shape legend: n images.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import FILES, load_model
from selftrans.config import RunConfig, SampleConfig
from selftrans.data.dataset import Dataset, Manifest
from selftrans.data.decoded import data_latents
from selftrans.data.sources.decode import sides
from selftrans.device import default_device
from selftrans.encoders.identity import identity_kind
from selftrans.evaluate.extractors import Extractor, load_extractor
from selftrans.evaluate.metrics import evaluate
from selftrans.evaluate.probes import can_be_probed, collect, linear_probe
from selftrans.evaluate.statistics import Statistics
from selftrans.experiments.reference import training_statistics
from selftrans.flow import PATHS
from selftrans.sampling.conditioning import Conditioning, LabelConditioning, captions_of
from selftrans.sampling.images import Sampler, as_possible, decoder_dtype
from selftrans.sampling.in_sizes import InSizes
from selftrans.sampling.samplers import EVALUATIONS
from selftrans.storage import recorded, write_json
from selftrans.train.data_window import data_of

MEASURED = "measured.json"  #: of a run: its points, oldest first
POINTS = 5  #: measurements along a run
BATCH = {"cpu": 125, "other": 500}  #: images sampled at a time; larger batches leave the caches of a core
PROBE_T = 0.4  #: noise level of the linear probe, the paper's
PROBED_BLOCK = (
    2  #: the block that is probed where a method guides none; the first guided one in every published setting
)

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
        assert config.data.path is not None
        dataset = data_of(config.data)
        device = default_device()
        extractor = load_extractor(features, weights=weights, device=device, shape=image_shape(dataset.manifest))
        dtype = decoder_dtype(device, config.sample.precision)
        reference = training_statistics(dataset, extractor, dtype=dtype, folder=kept)
        most = BATCH["cpu" if device.type == "cpu" else "other"]
        sample = dataclasses.replace(config.sample, num=images, batch_size=min(most, images))
        return cls(extractor, reference, dataset, sample, block, stored_conditions(dataset, sample), total, dtype)

    @property
    def identity(self) -> dict[str, Any]:
        """What two measured points must share to be comparable, as json has it."""
        return {
            "sampler": json.loads(json.dumps(self.sample.settings() | self.conditioning.described)),
            "images": self.sample.num,
            "extractor_sha256": self.extractor.sha256,
            "block": self.block,
        } | ({} if self.decoder == torch.float32 else {"decoder": "bf16"})


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


def measuring_cost(config: RunConfig, images: int) -> int:
    """What measuring one checkpoint costs, in training steps (a step is three forward passes of its batch)."""
    passes = config.sample.steps * EVALUATIONS[config.sample.sampler] * images / config.train.batch_size
    return max(1, round(passes / 3))


def interval(steps: int) -> int:
    """Steps between two measurements."""
    return max(1, steps // POINTS)


def measured_steps(steps: int, every: int | None = None, dense: int | None = None) -> list[int]:
    """Steps at which a run of `steps` is measured: every interval up to `dense` (None: all of the run), and the end."""
    every = every or interval(steps)
    return sorted({*range(every, min(steps, dense or steps) + 1, every), steps})


def due_checkpoints(run: Path, every: int | None = None, dense: int | None = None) -> list[Path]:
    """The checkpoints of a run's last stage that are points of its curve, oldest first: those at the `measured_steps`.

    An interruption leaves a checkpoint at another step, which is none.
    """
    stage = json.loads((run / "run.json").read_text())["stages"][-1]["stage"]
    held = checkpoint.steps(run / stage / "checkpoints")
    wanted = measured_steps(held[-1][0], every, dense)
    return [folder for step, folder in held if step in wanted]


def measure_point(run: Path, folder: Path, measurement: Measurement) -> Point:
    """A checkpoint of a run, measured, or as it was measured before."""
    digest = checkpoint.read(folder).state["sha256"][FILES["ema"]]
    known = measured_before(run / MEASURED, measurement).get(digest)
    return known or measure_checkpoint(folder, measurement) | {"sha256": digest}


def stored_points(path: Path) -> list[Point]:
    """What a MEASURED file holds; nothing if it is missing or damaged."""
    return recorded(path, lambda held: held if all(isinstance(point["sha256"], str) for point in held) else [], [])


def measured_before(path: Path, measurement: Measurement) -> dict[str, Point]:
    """Points that were measured in the same way, by the hash of their weights; none for a missing or damaged file."""
    same = {"decoder": None} | measurement.identity  # without the key: fp32
    return {
        point["sha256"]: point
        for point in stored_points(path)
        if all(point.get(key) == value for key, value in same.items())
    }


class Curve:
    """The points of a run at its checkpoints `due`, which are measured in any order, and the file that keeps them."""

    def __init__(self, run: Path, due: Sequence[Path]) -> None:
        self.path, self._points = run / MEASURED, dict[Path, Point | None](dict.fromkeys(due))
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
    settings = as_possible(measurement.sample, loaded.model)
    sampler = Sampler.of(
        loaded, settings, device=device, conditioning=measurement.conditioning, total=measurement.total
    )
    batches = list(InSizes(sampler, measurement.dataset).sample())
    labels = np.concatenate([batch.labels for batch in batches])
    images = (batch.images for batch in batches)
    metrics = ("frechet", "accuracy") if classes > 1 and measurement.extractor.head else ("frechet",)
    report = evaluate(images, measurement.reference, measurement.extractor, labels=labels, metrics=metrics)
    spent = checkpoint.read_header(folder / FILES["ema"])
    return {
        "step": loaded.step,
        "seconds": spent["seconds"],
        "tflops": spent["tflops"],
        "metric": report["label"],
        "distance": report[report["metric"]],
        "accuracy": report.get("accuracy"),
        "probe": probed,
    } | measurement.identity


def probe(model: Any, measurement: Measurement, path: Any, most: int = 4000) -> float | None:
    """Accuracy of a linear classifier on the shallow block's features at t = 0.4, under the null condition.

    None where the pictures that it would be fitted on have one class only.
    """
    z0, labels = data_latents(measurement.dataset, most)
    if not can_be_probed(labels):
        return None
    feats = collect(model, z0, model.null(labels), t=PROBE_T, taps=(measurement.block,), path=path, pooled=True)
    return linear_probe(feats[measurement.block].to(default_device()), labels, kind="ridge")


def samples_of(run: Path, sample: SampleConfig, num: int, conditioning: Conditioning | None = None) -> np.ndarray:
    """Images 0 .. num - 1 of a finished run: the same noise and conditions for every method."""
    loaded, settings = load_model(run), dataclasses.replace(sample, num=num, seed=1, batch_size=num)
    sampler = Sampler.of(loaded, as_possible(settings, loaded.model), conditioning=conditioning)
    return np.concatenate([batch.images for batch in sampler.sample()])
