"""What teaches a student ⇒ its features, batch by batch: a model under several conditions, or an encoder of pictures.

Shape legend: N pictures, n of a batch, T tokens, D width, (C, *S) latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from selftrans.checkpoints.load import LoadedModel, Weights, load_model, stages_held
from selftrans.data.buckets import is_prepared, open_of_one_shape
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import decode_images, latents_of
from selftrans.encoders.autoencoder import from_uint8, load_autoencoder
from selftrans.encoders.vision import load_encoder
from selftrans.evaluate.target_measures import Parts
from selftrans.experiments.reference import fitting_data
from selftrans.flow import PATHS, interpolate
from selftrans.methods.registry import stages
from selftrans.methods.spec import TeacherSpec
from selftrans.train.teachers import find_teacher
from selftrans.types import MASK, TEXT, Backbone, Cond, cat_cond, map_cond

BATCH = 128  #: pictures at a time
ENCODER = 0  #: number that stands for the block of an encoder, which has one kind of features


class Pictures(NamedTuple):
    """The pictures that are measured; those that tables and probes are fitted on come first."""

    rows: np.ndarray  #: (N,) positions in the data
    labels: Tensor  #: (N,), 0 without classes
    others: Tensor  #: (N,) labels drawn at random, of the same classes
    fitted: Tensor  #: (N,) bool


#: features of pictures at timesteps after blocks: (pictures, timesteps, blocks, seed)
PartsOf = Callable[[Pictures, Sequence[float], Sequence[int], int], Iterator[Parts]]


class Teacher(NamedTuple):
    """A teacher that is measured, opened by `open_teacher`."""

    title: str
    about: dict[str, Any]  #: for the report
    dataset: Dataset
    grid: tuple[int, ...]
    depth: int  #: number of blocks; 0: an encoder
    block: int | None  #: the block that teaches, where the run's settings say so
    kind: str  #: what it is conditioned on: none, labels or text
    parts: PartsOf


def open_teacher(
    origin: str | Path,
    *,
    encoder: bool,
    data: str | None,
    grid: int | None,
    stage: str | None,
    weights: Weights | None,
    device: torch.device,
) -> Teacher:
    """Open a run, a checkpoint, a weights file; with `encoder` a vision model; or prepared data with stored features.

    A run whose settings have a stage that is taught is represented by its teacher, with the weights that teach, unless `stage`
    or `weights` say otherwise. ValueError where it does not exist, or does not fit the data.
    """
    if encoder:
        return _vision_model(str(origin), data, grid, device)
    if is_prepared(origin):
        return _stored(Path(origin))
    loaded, spec = _model(origin, stage, weights)
    dataset, model = fitting_data(origin, loaded, data, "the teacher"), loaded.model.to(device)
    about = {"source": loaded.source, "stage": loaded.stage, "step": loaded.step, "weights": loaded.weights}
    title = f"{loaded.stage}, step {loaded.step:,}, {loaded.weights} weights"
    path = PATHS[loaded.config.train.path]

    def parts(pictures: Pictures, times: Sequence[float], taps: Sequence[int], seed: int) -> Iterator[Parts]:
        return _features(model, dataset, pictures, times, tuple(taps), path=path, seed=seed)

    block = spec.block(model.depth) if spec else None
    return Teacher(title, about, dataset, model.grid, model.depth, block, model.conditions.kind, parts)


def _model(origin: str | Path, stage: str | None, weights: Weights | None) -> tuple[LoadedModel, TeacherSpec | None]:
    """The model that teaches, and how its run says that it does, if it does."""
    loaded = load_model(origin, stage=stage, weights=weights or "raw")
    taught = [each.teacher for each in stages(loaded.config) if each.teacher]
    if not taught or not Path(origin).is_dir() or not stages_held(Path(origin)):
        return loaded, taught[-1] if taught and loaded.stage == taught[-1].stage else None
    spec = dataclasses.replace(taught[-1], weights=weights or taught[-1].weights)
    if stage not in (None, spec.stage):
        return loaded, None
    return load_model(find_teacher(spec.given or origin, spec), weights=spec.weights), spec


@torch.no_grad()
def _features(
    model: Backbone,
    dataset: Dataset,
    pictures: Pictures,
    times: Sequence[float],
    taps: tuple[int, ...],
    *,
    path: Any,
    seed: int,
) -> Iterator[Parts]:
    """f_u and f_c - f_u of a model, in fp32; with labels also of the labels drawn, at the first time."""
    z0, labels = latents_of(dataset, pictures.rows)
    device, kind = next(model.parameters()).device, model.conditions.kind

    def moved(cond: Cond) -> Cond:
        return map_cond(lambda x: x.to(device), cond)

    for rows in _batches(pictures):
        true = moved(dataset.text(pictures.rows[rows.numpy()]) if kind == "text" else labels[rows])
        for time, t in enumerate(times):
            # drawn for all pictures, so that the noise of one does not depend on the batch
            noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed((seed << 16) + time))
            zt, _ = interpolate(path, z0[rows].float(), noise[rows], torch.tensor(float(t)))
            conds = [model.null(true)] if kind == "none" else [model.null(true), true]
            if kind == "labels" and time == 0:
                conds.append(moved(pictures.others[rows]))
            zt = torch.cat([zt.to(device)] * len(conds))
            out = model(zt, torch.full((len(zt),), float(t), device=device), cat_cond(*conds), taps=taps, stop=True)
            chunks = {k: out.feats[k].float().cpu().chunk(len(conds)) for k in taps}  # (n, T, D) under each condition
            null = {k: chunks[k][0] for k in taps}
            differences = [{k: chunks[k][i] - null[k] for k in taps} for i in range(1, len(conds))]
            own, drawn, *_ = (*differences, None, None)
            yield Parts(rows, time, null, own, drawn)


def _batches(pictures: Pictures) -> Iterator[Tensor]:
    """Positions (n,) of the fitted pictures, then of those held out."""
    for part in (pictures.fitted, ~pictures.fitted):
        yield from torch.nonzero(part)[:, 0].split(BATCH)


def _vision_model(name: str, data: str | None, grid: int | None, device: torch.device) -> Teacher:
    """A vision model of transformers on the pictures of prepared data, which are decoded."""
    if data is None:
        raise ValueError("an encoder needs pictures: give prepared data with --data DIR")
    dataset = open_of_one_shape(data)
    manifest = dataset.manifest
    if manifest.resolution is None:
        raise ValueError(f"encoder {name} reads pictures, which the data of {data} are not; give other data")
    encoder = load_encoder(name, grid or max(1, min(manifest.shape[1:]) // 2), device=device)
    autoencoder = load_autoencoder(manifest.autoencoder, device=device)

    def encode(rows: np.ndarray) -> Tensor:
        pixels = from_uint8(torch.from_numpy(decode_images(autoencoder, latents_of(dataset, rows)[0].to(device))))
        return encoder.encode(pixels.to(device)).float().cpu()

    return _encoder(f"encoder {name}", encoder.source, dataset, encoder.grid, encode)


def _stored(path: Path) -> Teacher:
    """The features of an encoder that are stored with data."""
    dataset = Dataset.open(path)
    found = dataset.open_features()

    def encode(rows: np.ndarray) -> Tensor:
        return dataset.read(rows, ["features"])["features"][:, 0].float()

    source = {"path": found.encoder, "sha256": found.sha256, "weights": found.sha256}
    return _encoder(f"stored features of {found.encoder}", source, dataset, (found.grid, found.grid), encode)


def _encoder(
    title: str, source: dict[str, Any], dataset: Dataset, grid: tuple[int, ...], encode: Callable[[np.ndarray], Tensor]
) -> Teacher:
    def parts(pictures: Pictures, times: Sequence[float], taps: Sequence[int], seed: int) -> Iterator[Parts]:
        for rows in _batches(pictures):
            yield Parts(rows, 0, {ENCODER: encode(pictures.rows[rows.numpy()])}, None)

    return Teacher(title, {"source": source}, dataset, grid, 0, None, "none", parts)


def mean_text(cond: Cond) -> Tensor:
    """Mean (N, E) of the tokens of a text condition that are no padding."""
    assert isinstance(cond, dict)
    mask = cond[MASK].unsqueeze(dim=-1).float()  # (N, L, 1)
    return (cond[TEXT] * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
