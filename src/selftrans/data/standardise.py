"""Zero mean and unit variance of pixels and values: mean and deviation of each channel over all shards, as shift and scale.

What is stored stays the pixels in [-1, 1], or the values. Shift and scale are known when the last shard is written; then the
manifest gets them, and the name of an autoencoder that undoes them.
Shape legend: n rows, (C, *S) values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from selftrans.data.manifest import FILE, Manifest, Shard
from selftrans.data.shard_file import WRITE_REMEDY, open_tensors
from selftrans.encoders.identity import identity_kind, standardised_name
from selftrans.encoders.latent_space import UNSCALED, LatentSpace
from selftrans.encoders.media import rounded
from selftrans.plain_json import Option
from selftrans.progress import progress_bar
from selftrans.storage import write_text

CHUNK = 256  #: rows read at a time
#: a channel of smaller deviation is constant and is shifted only: of pixels an eighth of a grey level, of values, which may
#: have any unit, about the rounding of float32 at the mean
CONSTANT, ROUNDING = 1e-3, 1e-6
#: deviation and mean of which scale and shift can be written in the name of an autoencoder
SMALLEST, LARGEST = 1e-29, 1e30
OPTION = "standardise"  #: among the manifest's options
#: a folder, its plan or manifest, and its finished shards
Prepared: TypeAlias = tuple[Path, Manifest, Iterable[Shard]]


def standardise_option(
    asked: bool | None, autoencoder: str, before: Manifest | None, *, media: bool
) -> dict[str, Option]:
    """The option to record: {OPTION: True} for a folder that is standardised, else {}, as in older manifests.

    Only pixels and values can be standardised. asked: whether to; None: as the folder was begun, and yes in a new folder.
    The name of an autoencoder with numbers in brackets (see `identity`) sets shift and scale instead.
    Raises ValueError where `asked` is given for data whose latents have a scale of their own.
    """
    if media or autoencoder not in ("pixel", "values"):
        if asked is not None:
            what = "sounds and videos have" if media else f"autoencoder {autoencoder} has"
            raise ValueError(f"standardise is for pixels and values; {what} a known scale: leave it out")
        return {}
    if asked is None:
        asked = before is None or bool(before.options.get(OPTION))
    return {OPTION: True} if asked else {}


def without_statistics(plan: Manifest) -> Manifest:
    """A plan as it was before the statistics were known."""
    kind = identity_kind(plan.autoencoder)
    return replace(plan, autoencoder=kind, latent_space=UNSCALED) if plan.options.get(OPTION) and kind else plan


def standardised(plan: Manifest, out: Path, shards: Iterable[Shard], progress: bool) -> Manifest:
    """The plan with the statistics of these shards, if its options ask for them."""
    return with_statistics(plan, statistics([(out, plan, shards)], progress)) if plan.options.get(OPTION) else plan


def with_statistics(manifest: Manifest, space: LatentSpace) -> Manifest:
    """The manifest with this shift and scale."""
    kind = identity_kind(manifest.autoencoder)
    assert kind is not None, "only pixels and values are standardised"
    return replace(manifest, latent_space=space, autoencoder=standardised_name(kind, space))


def share_statistics(folders: Sequence[Path], progress: bool) -> None:
    """Give several prepared folders, each standardised by itself, the statistics of all of them together."""
    manifests = [Manifest.load(folder) for folder in folders]
    if not manifests[0].options.get(OPTION) or len({each.latent_space for each in manifests}) == 1:
        return
    space = statistics([(each, m, m.shards) for each, m in zip(folders, manifests, strict=True)], progress)
    for folder, manifest in zip(folders, manifests, strict=True):
        write_text(folder / FILE, with_statistics(manifest, space).to_json(), remedy=WRITE_REMEDY)


def statistics(folders: Sequence[Prepared], progress: bool) -> LatentSpace:
    """Shift and scale per channel that give all these shards zero mean and unit variance, each of six digits or more.

    One pass over the shards, with sums in float64. A constant channel has scale 1. ValueError for a mean that a manifest
    cannot hold.
    """
    channels, count = folders[0][1].shape[0], 0
    origin, total, squares = (np.zeros(channels) for _ in range(3))
    for rows in _rows(folders, progress):  # (n, C, cells)
        values = rows.astype(np.float64)
        if not count:
            origin = values.mean(axis=(0, 2))  # squares of distances from it lose no digits where the mean is large
        values -= origin[:, None]
        total += values.sum(axis=(0, 2))
        squares += np.square(values).sum(axis=(0, 2))
        count += values.shape[0] * values.shape[2]
    mean = total / max(1, count)
    deviation = np.sqrt(np.maximum(0.0, squares / max(1, count) - mean**2))
    pixels = identity_kind(folders[0][1].autoencoder) == "pixel"
    least = np.full(channels, CONSTANT) if pixels else np.maximum(SMALLEST, ROUNDING * np.abs(origin))
    scale = np.where(deviation > least, 1 / np.maximum(deviation, least), 1.0)
    shift = origin + mean
    if (largest := float(np.abs(shift).max())) >= LARGEST:
        raise ValueError(
            f"a channel has the mean {largest:g}; divide the values, so that means stay below {LARGEST:g}, in a new folder"
        )
    # rounded, so that sums that differ in their last bits give the same numbers
    return LatentSpace(tuple(map(_rounded_shift, shift, scale)), tuple(map(rounded, scale)), stochastic=False)


def _rounded_shift(shift: float, scale: float) -> float:
    """Six significant digits, and more where the mean is many deviations: the error stays below a thousandth of one."""
    deviations = abs(shift) * scale
    return float(f"{shift:.{6 + max(0, math.ceil(math.log10(max(deviations, 1))) - 3)}g}")


def _rows(folders: Sequence[Prepared], progress: bool) -> Iterator[np.ndarray]:
    """The moments of all shards, without mirrored copies, which have the same statistics: (n, C, cells).

    In order of the shards, so that sums are the same however they were made.
    """
    shards = [(f, m, shard) for f, m, each in folders for shard in sorted(each, key=lambda shard: shard.index)]
    total = sum(shard.count for *_, shard in shards)
    with progress_bar(total=total, desc="mean and deviation", unit=" samples", disable=not progress) as bar:
        for folder, manifest, shard in shards:
            moments = open_tensors(folder / shard.file, manifest.layout, shard.count)["moments"]
            for start in range(0, shard.count, CHUNK):
                rows = moments[start : start + CHUNK, 0]
                yield rows.reshape(len(rows), manifest.shape[0], -1)
                bar.update(len(rows))
