"""Files ⇒ numbers: what `selftrans evaluate` and `selftrans classifier` do. Shape legend: (n, R, R, C) uint8 images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selftrans.data.images import iter_images
from selftrans.data.shards import Shards
from selftrans.evaluate.classifier import digits, train_classifier, write_beside
from selftrans.evaluate.features import Extractor, load_extractor
from selftrans.evaluate.metrics import evaluate
from selftrans.evaluate.statistics import Statistics
from selftrans.latents import load_autoencoder, sample_latents, to_uint8


def evaluate_samples(samples: str | Path, reference: str | Path, features: str) -> dict[str, Any]:
    """Measure a folder, zip or npz against a reference and write the report beside it as json.

    `reference`: pictures in the same forms, prepared data, `digits`, or an npz of statistics (`mu`, `sigma`).
    ValueError for unknown features, unfit pictures and statistics of another extractor.
    """
    samples, device = Path(samples), "cuda" if torch.cuda.is_available() else "cpu"
    extractor = load_extractor(features, device=device)
    made, labels, images = _sampled(samples)
    report = evaluate(images, reference_of(reference, extractor), extractor, labels=labels, reference_name=str(reference))
    report |= {"samples": str(samples), "made": made}
    target = samples / "evaluate.json" if samples.is_dir() else samples.with_suffix(".evaluate.json")
    write_beside(target, lambda file: file.write(json.dumps(report, indent=2).encode()))
    return report


def _sampled(samples: Path) -> tuple[dict[str, Any] | None, np.ndarray | None, Iterator[np.ndarray]]:
    """How the images were made and their labels, where `selftrans sample` has written both, and the images."""
    record, archive = samples / "samples.json", samples / "samples.npz"
    if not record.exists():
        return None, None, iter_images(samples)
    made = json.loads(record.read_text())
    if not made.get("complete") or not archive.exists():
        raise ValueError(f"{samples} is not complete; repeat the `selftrans sample` command that began it")
    with np.load(archive, allow_pickle=False) as arrays:
        labels = arrays["arr_1"]
    return made["settings"] | {"num": made["num"]}, labels, iter_images(archive)


def reference_of(reference: str | Path, extractor: Extractor) -> Statistics:
    """Statistics of a reference (see `evaluate_samples`) in the features of `extractor`."""
    path = Path(reference)
    if str(reference) == "digits":
        return Statistics.of(digits()[0], extractor, source="digits")
    if path.suffix == ".npz" and _holds_statistics(path):
        return Statistics.load(path)
    images = shard_images(Shards.open(path)) if (path / "manifest.json").exists() else iter_images(path)
    return Statistics.of(images, extractor, source=str(reference))


def _holds_statistics(path: Path) -> bool:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a folder, zip or npz of pictures, prepared data, or statistics")
    with np.load(path, allow_pickle=False) as arrays:
        return "mu" in arrays.files


def shard_images(shards: Shards, batch_size: int = 256) -> Iterator[np.ndarray]:
    """Pictures of prepared data, decoded by its autoencoder, in order, unmirrored."""
    manifest = shards.manifest
    autoencoder = load_autoencoder(manifest.autoencoder)
    for start in range(0, len(shards), batch_size):
        moments, _ = shards.read(np.arange(start, min(start + batch_size, len(shards))))
        z0 = sample_latents(
            moments[:, 0], stochastic=manifest.stochastic, scale=manifest.scale, shift=manifest.shift
        )
        with torch.inference_mode():
            yield to_uint8(autoencoder.decode(z0)).numpy()


def classifier_from_data(data: str | Path, out: Path, *, epochs: int, seed: int) -> str:
    """Train a classifier on prepared data and save it; returns what to print. ValueError for data without classes."""
    shards = Shards.open(data)
    if shards.manifest.num_classes < 2:
        raise ValueError(f"{data} has {shards.manifest.num_classes} classes; a classifier needs at least two")
    images = np.concatenate(list(shard_images(shards)), axis=0)
    model = train_classifier(images, shards.labels, shards.manifest.num_classes, seed=seed, epochs=epochs)
    model.save(out)
    record = model.training_record
    assert record is not None
    return f"{out}: accuracy {record.accuracy:.3f} on {record.held_out} held-out images"
