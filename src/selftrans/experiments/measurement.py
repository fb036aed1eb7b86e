"""Checkpoints measured along a run: distance, accuracy of the labels, and a linear probe of a shallow block.

Each point is measured once and kept in the run's `measured.json`. Shape legend: n images.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import FILES, load_model
from selftrans.config import RunConfig, SampleConfig
from selftrans.data.buckets import open_data
from selftrans.data.dataset import Dataset, Manifest
from selftrans.data.decoded import data_latents, decoded_images
from selftrans.data.sources.decode import sides
from selftrans.device import default_device
from selftrans.encoders.identity import identity_kind
from selftrans.evaluate.extractors import Extractor, load_extractor
from selftrans.evaluate.metrics import evaluate
from selftrans.evaluate.probes import collect, linear_probe
from selftrans.evaluate.statistics import Statistics
from selftrans.flow import PATHS
from selftrans.sampling.conditioning import Conditioning, LabelConditioning, captions_of
from selftrans.sampling.images import Sampler, as_possible, decoder_dtype
from selftrans.sampling.in_sizes import InSizes
from selftrans.sampling.samplers import EVALUATIONS
from selftrans.storage import write_json
from selftrans.train.data_window import cache_of

POINTS = 5  #: measurements along a run
PROBE_T = 0.4  #: noise level of the linear probe, the paper's
PROBED_BLOCK = (
    2  #: the block that is probed where a method guides none; the first guided one in every published setting
)

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
    ) -> Measurement:
        """Distances to the training data, on the device at hand.

        Args:
            config: data and sampler. features: an extractor, by name or file; weights: where a named one is kept.
            images: samples for each distance. block: the one that is probed (1-based). total: see the field.
        """
        assert config.data.path is not None
        dataset = open_data(config.data.path, text_encoder=config.data.text_encoder, cache=cache_of(config.data))
        device = default_device()
        extractor = load_extractor(features, weights=weights, device=device, shape=image_shape(dataset.manifest))
        dtype = decoder_dtype(device, config.sample.precision)
        decoded = decoded_images(dataset, device=device, dtype=dtype)
        reference = Statistics.of(decoded, extractor, source="training data", keep=False)
        sample = dataclasses.replace(config.sample, num=images, batch_size=min(500, images))
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
    """Steps at which a run of `steps` is measured: every interval, and the end; beyond `dense` every other interval."""
    every = every or interval(steps)
    often = [
        step for step in range(every, steps + 1, every) if dense is None or step <= dense or step % (2 * every) == 0
    ]
    return sorted({*often, steps})


def measure_run(
    run: Path,
    measurement: Measurement,
    progress: Progress,
    cost: int,
    *,
    every: int | None = None,
    dense: int | None = None,
) -> list[dict[str, Any]]:
    """Measured points of a run's last stage, oldest first; those measured before are read, not measured again.

    They are at the `measured_steps`.
    """
    stage = json.loads((run / "run.json").read_text())["stages"][-1]["stage"]
    path = run / "measured.json"
    known = measured_before(path, measurement)
    entries = []
    held = checkpoint.steps(run / stage / "checkpoints")
    wanted = measured_steps(held[-1][0], every, dense)
    due = [folder for step, folder in held if step in wanted]
    for folder in due:  # an interruption leaves a checkpoint at another step, which is no point of the curve
        digest = checkpoint.read(folder).state["sha256"][FILES["ema"]]
        entries.append(known.get(digest) or measure_checkpoint(folder, measurement) | {"sha256": digest})
        progress(cost)
        write_json(path, entries)
    return entries


def measured_before(path: Path, measurement: Measurement) -> dict[str, dict[str, Any]]:
    """Points that were measured in the same way, by the hash of their weights; none for a missing or damaged file."""
    same = measurement.identity.items()
    try:
        return {entry["sha256"]: entry for entry in json.loads(path.read_text()) if same <= entry.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


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


def probe(model: Any, measurement: Measurement, path: Any, most: int = 4000) -> float:
    """Accuracy of a linear classifier on the shallow block's features at t = 0.4, under the null condition."""
    z0, labels = data_latents(measurement.dataset, most)
    feats = collect(model, z0, model.null(labels), t=PROBE_T, taps=(measurement.block,), path=path, pooled=True)
    return linear_probe(feats[measurement.block].to(default_device()), labels, kind="ridge")


def samples_of(run: Path, sample: SampleConfig, num: int, conditioning: Conditioning | None = None) -> np.ndarray:
    """Images 0 .. num - 1 of a finished run: the same noise and conditions for every method."""
    loaded, settings = load_model(run), dataclasses.replace(sample, num=num, seed=1, batch_size=num)
    sampler = Sampler.of(loaded, as_possible(settings, loaded.model), conditioning=conditioning)
    return np.concatenate([batch.images for batch in sampler.sample()])
