"""The job that draws features of a picture as PCA maps over blocks and t, of a student and of the model that guides it.

The picture is a row of a run's data, or an uploaded one, as latents of its model.
Shape legend: N pictures, T tokens, D width, (C, *S) latent, (H, W, C) picture.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from selftrans.checkpoints.load import LoadedModel
from selftrans.data.buckets import is_prepared, open_data
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import decode_images, latents_of
from selftrans.data.resolution import resolution_of
from selftrans.data.sources.decode import check_pixels, open_picture, to_array, unreadable
from selftrans.encoders.autoencoder import Autoencoder, DiffusersAutoencoder, from_uint8, load_autoencoder
from selftrans.evaluate.plots import as_pictures, flat_map, middle_slices
from selftrans.evaluate.probes import collect, pca_basis, pca_maps, spread_blocks
from selftrans.experiments.analyse_run import null_of
from selftrans.flow import PATHS
from selftrans.messages import plural, printable
from selftrans.sample_config import SampleConfig
from selftrans.sampling.conditioning import conditioning_of
from selftrans.types import Cond, map_cond
from selftrans.ui.contained import Contained, part
from selftrans.ui.jobs import Job
from selftrans.ui.models_of_runs import ModelCache, Source, counted_passes, source_of, take
from selftrans.ui.run_plan import Guided, guided_blocks
from selftrans.ui.run_state import RunState
from selftrans.ui.sampling_jobs import Run, Work, add_sheet

MOST_TIMES = 8
NULL = "null"  #: name of the null condition
OTHERS = 7  #: further pictures of the data from which the components are computed
UPLOAD_BYTES, UPLOAD_PIXELS = 16 << 20, 50_000_000  #: of an uploaded picture


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request for maps. The condition is `prompt` or `label`, else the label of the row; with `null`, or without any of
    these, the null condition."""

    times: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    row: int = 0
    null: bool = False
    label: int | None = None
    prompt: str | None = None
    scale: float = 1.0
    """w of the teacher's features, f_u + w (f_c - f_u)"""


def features(
    raw: Mapping[str, Any], run: Run, models: ModelCache, roots: Sequence[Path]
) -> tuple[dict[str, Any], Work]:
    """(the request as the page shows it, the work) for maps of a student, and of a teacher if one is named.

    `roots`: the folders of the page, in which the data of the run may lie.
    """
    student = source_of(raw.get("student"), run, "student")
    teacher = source_of(raw["teacher"], run, "teacher") if raw.get("teacher") is not None else None
    asked: Asked = take(raw, "maps", Asked, Asked())
    if not 1 <= len(asked.times) <= MOST_TIMES or not all(0 <= t <= 1 for t in asked.times):
        raise ValueError(f"t = {list(asked.times)[:9]}: choose 1 to {MOST_TIMES} values in [0, 1]")
    if not 0 <= asked.scale <= 1000:
        raise ValueError(f"w = {asked.scale:g} is out of range; use 0 to 1000")
    upload = decoded_upload(take(raw, "upload", str))
    sources = [each for each in (teacher, student) if each is not None]

    def work(job: Job) -> None:
        loaded = [models.load(source, job) for source in sources]
        if len({(tuple(each.model.shape), each.model.conditions) for each in loaded}) > 1:
            raise ValueError("teacher and student have other latents or conditions; choose models of the same data")
        job.doing = "reading the picture"
        found = pictures(loaded[-1], data_of(student.state, roots), asked.row, upload, models.device)
        add_sheet(job, found.shown, role="picture", label=None if found.labels is None else int(found.labels[0]))
        conditions = [_condition(each, asked, found, models.device) for each in loaded]
        scales = [
            asked.scale if source is teacher and said != NULL else 1.0
            for source, (_, said) in zip(sources, conditions, strict=True)
        ]
        job.total = sum(len(asked.times) * (2 if w != 1 else 1) for w in scales)
        for each, source, w, (cond, said) in zip(loaded, sources, scales, conditions, strict=True):
            job.doing, guided = f"features of {source.text}", _guided(source, each)
            with counted_passes(each.model, job):
                maps, blocks = _maps(each, found.z0, cond, asked.times, w, guided)
            add_sheet(
                job,
                maps,
                columns=len(asked.times),
                role="teacher" if source is teacher else "student",
                of=dataclasses.asdict(source.wanted),
                name=source.text,
                blocks=blocks,
                guided=guided and guided._asdict(),
                times=list(asked.times),
                condition=said if w == 1 else f"{said}, w = {w:g}",
            )

    about = {"models": [dataclasses.asdict(each.wanted) for each in sources], "maps": dataclasses.asdict(asked)}
    return about | {"uploaded": upload is not None}, work


def _condition(loaded: LoadedModel, asked: Asked, found: Pictures, device: torch.device) -> tuple[Cond, str]:
    """The condition of each picture, and its name. The further pictures have their own labels or the same prompt."""
    model, count = loaded.model, len(found.z0)
    kind = model.conditions.kind
    if kind == "text" and asked.prompt and not asked.null:
        conditioning = conditioning_of(model.conditions, SampleConfig(prompts=(asked.prompt,)), device=device)
        row, _ = conditioning.of(np.zeros(1, dtype=np.int64))
        return map_cond(lambda x: x.expand(count, *x.shape[1:]).to(device), row), printable(asked.prompt, 80)
    labels = found.labels
    if asked.label is not None and kind == "labels":
        if not 0 <= asked.label < model.conditions.num_classes:
            raise ValueError(
                f"label {asked.label} is none of the model's {plural(model.conditions.num_classes, 'class')}"
            )
        labels = torch.full((count,), asked.label)
        if found.labels is not None:
            labels[1:] = found.labels[1:]
    if kind != "labels" or labels is None or asked.null:
        return null_of(model, count), NULL
    first = int(labels[0])
    name = loaded.classes[first] if first < len(loaded.classes) else str(first)
    return labels.to(device), printable(f"label {name}", 80)


def _guided(source: Source, loaded: LoadedModel) -> Guided | None:
    """The guided blocks of the stage whose weights these are; None if its settings do not say."""
    plan = source.state.read().plan
    stage = next((each for each in plan.stages if each.name == loaded.stage), None)
    if plan.config is None or stage is None:
        return None
    try:
        return guided_blocks(plan.config, stage, loaded.model)
    except (ValueError, RuntimeError, TypeError):  # the method needs what a run's folder does not hold
        return None


def _maps(
    loaded: LoadedModel,
    z0: Tensor,
    cond: Cond,
    times: tuple[float, ...],
    scale: float,
    guided: Guided | None,
) -> tuple[np.ndarray, list[int]]:
    """Colour maps (blocks x times, h, w, 3) uint8 of the first picture, and the blocks (1-based).

    The components of a block are those of its features of all pictures at all t, so colours may be compared along a row.
    """
    model, path = loaded.model, PATHS[loaded.config.train.path]
    blocks = spread_blocks(model.depth, 10, [*guided.student, guided.teacher] if guided else [])
    found: dict[int, list[Tensor]] = {k: [] for k in blocks}
    for t in times:
        feats = collect(model, z0, cond, t=t, taps=blocks, path=path)
        if scale != 1:
            plain = collect(model, z0, null_of(model, len(z0)), t=t, taps=blocks, path=path)
            feats = {k: plain[k] + scale * (feats[k] - plain[k]) for k in blocks}
        for k in blocks:
            found[k].append(feats[k])  # (N, T, D)
    rows = []
    for k in blocks:
        basis = pca_basis(torch.cat(found[k]))
        rows += [flat_map(pca_maps(each[:1], model.grid, basis=basis)[0]) for each in found[k]]
    return np.round(255 * np.stack(rows)).astype(np.uint8), list(blocks)


class Pictures(NamedTuple):
    """Latents; the first is the one that is looked at."""

    z0: Tensor  #: (N, C, *S)
    labels: Tensor | None  #: (N,) of pictures of the data; None for an uploaded one
    shown: np.ndarray  #: (1, H, W, C) uint8, the first as it is decoded


def data_of(state: RunState, roots: Sequence[Path]) -> Dataset | None:
    """The prepared data of a run; None where they are in none of the folders `roots`, or cannot be read."""
    named = part(state.read().config, "data", dict).get("path")
    places = [_place(named, roots)] if isinstance(named, str) and "\0" not in named else []
    for place in [*places, state.place / "data"]:
        if place is not None and is_prepared(place.path) and not _has_links(place):
            try:
                return open_data(place.path)
            except ValueError:
                return None
    return None


def _place(named: str, roots: Sequence[Path]) -> Contained | None:
    path = Path(os.path.realpath(named))
    root = next((root for root in roots if path.is_relative_to(root)), None)
    return None if root is None else Contained(root, path.relative_to(root).parts)


def _has_links(place: Contained) -> bool:
    """Whether a folder of data is reached through a symbolic link, or holds one."""
    return not place.inside() or any(
        os.path.islink(os.path.join(folder, name))
        for folder, below, names in os.walk(place.path)
        for name in (*below, *names)
    )


def decoded_upload(text: str | None) -> bytes | None:
    """The content of a picture from base64. ValueError where it is too large or no base64."""
    if text is None:
        return None
    if len(text) > UPLOAD_BYTES * 4 // 3:
        raise ValueError(f"the picture is larger than {UPLOAD_BYTES >> 20} MB")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("the picture is not sent as base64") from error


def pictures(
    loaded: LoadedModel, dataset: Dataset | None, row: int, upload: bytes | None, device: torch.device
) -> Pictures:
    """The latents of an upload, or of a row of the data, and of OTHERS rows. ValueError where there is no such picture."""
    autoencoder, shape = load_autoencoder(loaded.autoencoder, device=device), tuple(loaded.model.shape)
    parts = () if dataset is None else dataset.of_one_shape
    fitting = next((part for part in parts if tuple(part.manifest.shape) == shape), None)
    others = np.random.default_rng(0).permutation(len(fitting))[:OTHERS] if fitting else np.zeros(0, dtype=np.int64)
    if upload is not None:
        first, labels = encoded(upload, autoencoder, shape), None
        z0 = torch.cat([first.cpu(), latents_of(fitting, others)[0]]) if fitting else first.cpu()
    elif fitting is None:
        raise ValueError(
            "the data of this run are not in the folders of this page; start it with their folder, too, or choose a picture"
        )
    elif not 0 <= row < len(fitting):
        raise ValueError(f"row {row:,} is not in the data; use 0 to {len(fitting) - 1:,}")
    else:
        z0, labels = latents_of(fitting, np.append(row, others))
    return Pictures(z0, labels, as_pictures(middle_slices(decode_images(autoencoder, z0[:1].to(device)))))


def encoded(content: bytes, autoencoder: Autoencoder, shape: tuple[int, ...]) -> Tensor:
    """The latent (1, C, H, W) of a picture file, cropped and resized as `prepare` does. ValueError where it has none."""
    if not autoencoder.pictures or len(shape) != 3:
        raise ValueError("this model is not one of pictures; choose a row of its data")
    height, width = (side * autoencoder.downsample for side in shape[1:])
    channels = autoencoder.pixel_channels if isinstance(autoencoder, DiffusersAutoencoder) else shape[0]
    try:
        image = open_picture(io.BytesIO(content))
        check_pixels(image.size, UPLOAD_PIXELS)
        array = to_array(image, resolution_of(height, width), channels)
    except Exception as error:  # decoders raise many types
        raise unreadable("the picture", error) from error
    return autoencoder.latent_space.mean(autoencoder.encode(from_uint8(torch.from_numpy(array[None]))).stack())
