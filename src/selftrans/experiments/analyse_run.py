"""Files ⇒ numbers: what the commands classifier and analyse do. Shape legend: (n, R, R, C) uint8 images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from selftrans.checkpoints.load import LoadedModel, Weights, load_model
from selftrans.data.dataset import Dataset
from selftrans.encoders.autoencoder import load_autoencoder, to_uint8
from selftrans.evaluate.classifier import train_classifier
from selftrans.evaluate.plots import curves, pca_grid, save, scatter
from selftrans.evaluate.probes import collect, linear_probe, pca_maps, tsne
from selftrans.flow import PATHS
from selftrans.storage import printable, write_json


def shard_images(shards: Dataset, batch_size: int = 256) -> Iterator[np.ndarray]:
    """Pictures of prepared data, its posterior means decoded by its autoencoder, in order, unmirrored: always the same."""
    manifest = shards.manifest
    autoencoder = load_autoencoder(manifest.autoencoder)
    for start in range(0, len(shards), batch_size):
        rows = np.arange(start, min(start + batch_size, len(shards)))
        z0 = manifest.latent_space.mean(shards.read(rows, ["moments"])["moments"][:, 0])
        with torch.inference_mode():
            yield to_uint8(autoencoder.decode(z0)).numpy()


def classifier_from_data(data: str | Path, out: Path, *, epochs: int, seed: int) -> str:
    """Train a classifier on prepared data and save it; returns what to print. ValueError for data without classes."""
    shards = Dataset.open(data)
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} must end in .safetensors, which is how evaluate knows a classifier")
    if shards.manifest.num_classes < 2:
        raise ValueError(f"{data} has {shards.manifest.num_classes} classes; a classifier needs at least two")
    images = np.concatenate(list(shard_images(shards)), axis=0)
    model = train_classifier(images, shards.labels, shards.manifest.num_classes, seed=seed, epochs=epochs)
    model.save(out)
    record = model.training_record
    assert record is not None
    about = dataclasses.asdict(record) | {"data": str(data), "classes": list(shards.manifest.classes)}
    write_json(out.with_suffix(".json"), about)
    return f"{out}: accuracy {record.accuracy:.3f} on {record.held_out} held-out images"


def analyse(
    origin: str | Path,
    out: Path,
    *,
    data: str | None,
    timesteps: Sequence[float],
    samples: int,
    weights: Weights,
    stage: str | None,
) -> dict[str, Any]:
    """Probes per block and timestep, PCA maps, t-SNE of a run's features, as pictures and analyse.json in `out`.

    Features are taken under the null condition, so that a probe cannot read the label from the conditioning. `data`:
    prepared data; None: what the run was trained on. ValueError for data of another shape or class count than the run's.
    """
    if samples < 20 or not timesteps:
        raise ValueError(
            f"{samples} samples at {len(timesteps)} timesteps are too few; give at least 20, and a timestep"
        )
    found = load_model(origin, stage=stage, weights=weights)
    shards = Dataset.open(_data_of(origin, found, data))
    if shards.manifest.shape != found.model.shape or shards.manifest.num_classes != found.model.num_classes:
        raise ValueError(
            f"the data are latents {shards.manifest.shape} with {shards.manifest.num_classes} classes; the run was trained on "
            f"{found.model.shape} with {found.model.num_classes}; give that data with --data"
        )
    z0, labels = data_latents(shards, samples)
    path, blocks = PATHS[found.config.train.path], tuple(range(1, found.model.depth + 1))
    null, maps = found.model.null(labels), dict[str, np.ndarray]()
    probes, clouds = dict[float, list[float]](), dict[float, np.ndarray]()
    for t in tqdm(timesteps, desc="timesteps", unit="t"):
        feats = collect(found.model, z0, null, t=t, taps=blocks, path=path)
        if shards.manifest.num_classes > 1:
            probes[t] = [linear_probe(feats[k], labels, kind="ridge") for k in blocks]
        maps |= {f"block {k}, t = {t:g}": pca_maps(feats[k][:8]) for k in _spread(blocks)}
        clouds[t] = tsne(feats[blocks[len(blocks) // 2]])
    with torch.inference_mode():
        pictures = to_uint8(load_autoencoder(found.autoencoder).decode(z0[:8])).numpy()
    save(pca_grid({"data": pictures} | maps, title="principal components of the features"), out / "pca.png")
    for t, cloud in clouds.items():
        title = f"t-SNE of block {blocks[len(blocks) // 2]} at t = {t:g}"
        names = [printable(name) for name in shards.manifest.classes] or None
        save(scatter(cloud, labels.numpy(), title=title, names=names), out / f"tsne-t{t:g}.png")
    if probes:
        series = {f"t = {t:g}": (blocks, accuracy) for t, accuracy in probes.items()}
        save(curves(series, xlabel="block", ylabel="linear probe accuracy"), out / "probes.png")
    report = {
        "source": found.source,
        "stage": found.stage,
        "step": found.step,
        "images": len(labels),
        "condition": "null",
        "blocks": list(blocks),
        "probe_accuracy": {f"{t:g}": accuracy for t, accuracy in probes.items()},
    }
    write_json(out / "analyse.json", report)
    return report


def _spread(blocks: Sequence[int]) -> list[int]:
    """A shallow, two middle and the last block."""
    return sorted({blocks[round(fraction * (len(blocks) - 1))] for fraction in (0.15, 0.4, 0.7, 1.0)})


def _data_of(origin: str | Path, found: LoadedModel, data: str | None) -> str:
    """Directory of the data: as given, else where the run found them."""
    known = data or found.config.data.path
    if known is None and (Path(origin) / "data" / "manifest.json").exists():
        known = str(Path(origin) / "data")
    if known is None:
        raise ValueError(f"{origin} does not say where its data are; give --data DIR")
    return known


def data_latents(shards: Dataset, most: int) -> tuple[Tensor, Tensor]:
    """At most `most` latents (N, C, H, W) of a fixed shuffle, and their labels (N,)."""
    return latents_of(shards, np.random.default_rng(0).permutation(len(shards))[:most])


def latents_of(shards: Dataset, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Latents (N, C, H, W) of these rows, the same posterior sample each time; torch's generator is left alone."""
    tensors = shards.read(rows, ["moments", "labels"])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        z0 = shards.manifest.latent_space.sample(tensors["moments"][:, 0])
    return z0, tensors["labels"]
