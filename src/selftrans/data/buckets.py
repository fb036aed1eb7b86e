"""Prepared pictures of several aspect ratios: one folder of prepared data for each size, read as one data set.

On disk: `buckets.json`, which names the folders, and a folder of prepared data (see `manifest`) for each bucket, named by
the size of its pictures. A batch is of one bucket, since its latents must have one shape.
Shape legend: N batch.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from selftrans.data.dataset import Dataset, by_part
from selftrans.data.manifest import BUCKETS, FILE, REMEDY, Manifest
from selftrans.data.resolution import sides, size_text
from selftrans.data.streaming.remote import is_url
from selftrans.data.streaming.shard_cache import CacheOptions
from selftrans.messages import plural
from selftrans.plain_json import from_plain, matching, parse_object, read_text, within
from selftrans.storage import write_text

VERSION = 1
MOST = 1024  #: folders that a buckets.json may name
#: fields of the manifests in which buckets must agree
SHARED = ("conditions", "classes", "latent_space", "autoencoder", "image_channels", "dtype", "copies")


@dataclass(frozen=True)
class Contents:
    """What `buckets.json` holds."""

    version: Annotated[int, within(VERSION, VERSION)]
    buckets: tuple[Annotated[str, matching("[1-9][0-9]{0,5}x[1-9][0-9]{0,5}", "the size of pictures, as 192x336")], ...]


class Buckets(Dataset):
    """Folders of prepared pictures of different sizes as one data set: row numbers run through the buckets in order.

    `manifest` is that of the base, the bucket nearest to a square, with the count and the shards of all of them: `shape` and
    `resolution` are the base's. Opened by `open_data`. Raises ValueError when the buckets do not belong together.
    """

    def __init__(
        self,
        path: Path,
        buckets: Sequence[Dataset],
        *,
        origin: str | None = None,
        cache: CacheOptions = CacheOptions(),  # noqa: B008 - a tuple
    ) -> None:
        self.buckets = tuple(buckets)
        self.base = min(buckets, key=lambda each: abs(np.log(_aspect(each.manifest))))
        for bucket in buckets:
            _check_alike(bucket, self.base)
        shards = [shard for bucket in buckets for shard in bucket.manifest.shards]
        shards = [replace(shard, index=i) for i, shard in enumerate(shards)]
        count = sum(shard.count for shard in shards)
        manifest = replace(self.base.manifest, count=count, shards=tuple(shards), features=None)
        labels = np.concatenate([bucket.labels for bucket in buckets])
        counts = [bucket.counts for bucket in buckets if bucket.counts is not None]
        super().__init__(path, manifest, self.base._tensors, labels, np.concatenate(counts) if counts else None)
        self._begins = np.cumsum([0, *self.parts])[:-1]
        self.origin, self.cache = origin or str(path), cache

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(open_data, text_encoder=self.text_encoder, cache=self.cache), (self.origin,)

    def fetch(self, *, progress: bool = True) -> None:
        for bucket in self.buckets:
            bucket.fetch(progress=progress)

    def dry_run_data(self) -> Dataset:
        # `open_streamed` has checked that all of them fit into the cache
        of_each = [bucket.dry_run_data() for bucket in self.buckets]
        buckets = Buckets(self.path, of_each, origin=self.origin, cache=self.cache)
        buckets.text_encoder = self.text_encoder
        return buckets

    @property
    def of_one_shape(self) -> tuple[Dataset, ...]:
        return self.buckets

    def read(
        self, rows: np.ndarray | Tensor, names: Collection[str] | None = None, which: np.ndarray | None = None
    ) -> dict[str, Tensor]:
        """As `Dataset.read`. Raises ValueError for moments of rows of several buckets, which have different shapes."""
        rows, read = np.asarray(rows, dtype=np.int64).reshape(-1), dict[str, Tensor]()
        self._check_range(rows)
        for k, at, local in by_part(self._begins, rows):
            if len(at) < len(rows) and "moments" in (self.names if names is None else names):
                raise ValueError(f"the rows are of several buckets of {self.path}; read moments of one at a time")
            chosen = None if which is None else np.asarray(which)[at]
            for name, tensor in self.buckets[k].read(local, names, chosen).items():
                if name not in read:
                    read[name] = tensor.new_empty((len(rows), *tensor.shape[1:]))
                read[name][torch.from_numpy(at)] = tensor
        return read if len(rows) else self.base.read(rows, names, which)

    def captions(self, rows: np.ndarray | Tensor) -> list[list[str]]:
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        found: list[list[str]] = [[] for _ in rows]
        self._check_range(rows)
        for k, at, local in by_part(self._begins, rows):
            for i, captions in zip(at, self.buckets[k].captions(local), strict=True):
                found[i] = captions
        return found

    def null(self) -> Any:
        return self.base.null()

    def open_features(self) -> NoReturn:
        """Buckets have no stored features: always a ValueError."""
        raise ValueError(f"{self.path} holds buckets, for which no features are stored; give data of one --resolution")

    def verify(self) -> None:
        for bucket in self.buckets:
            bucket.verify()

    def damaged(self, *, features: bool = True) -> Iterator[str]:
        """As `Dataset.damaged`, with the folder of the bucket before each name."""
        for bucket in self.buckets:
            yield from (f"{Path(bucket.origin).name}/{name}" for name in bucket.damaged(features=features))

    def summary(self) -> str:
        """A few lines to print."""
        sizes = ", ".join(f"{Path(bucket.origin).name} ({len(bucket):,})" for bucket in self.buckets)
        left_out = f"\n{len(skipped):,} left out, listed in their {FILE}" if (skipped := self.manifest.skipped) else ""
        return f"{plural(len(self), 'picture')} in {plural(len(self.buckets), 'bucket')}: {sizes}{left_out}"


def open_data(
    path: str | Path,
    *,
    verify: bool = False,
    text_encoder: str | None = None,
    cache: CacheOptions = CacheOptions(),  # noqa: B008 - a tuple
) -> Dataset:
    """Open a folder made by `prepare` or by `prepare_buckets`, here or at a URL, whose shards are then fetched into `cache`.

    Raises ValueError as `Dataset.open` and `open_buckets`.
    """
    if is_url(path) or not Path(path, BUCKETS).is_file():
        return Dataset.open(path, verify=verify, text_encoder=text_encoder, cache=cache)
    buckets = open_buckets(Path(path))
    buckets.text_encoder = text_encoder
    if verify:
        buckets.verify()
    return buckets


def open_buckets(path: Path) -> Buckets:
    """The buckets in a folder made by `prepare_buckets`. ValueError as `Dataset.open`, and when `buckets.json` is invalid."""
    return Buckets(path, [Dataset.open(path / name) for name in read_names(path)])


def open_of_one_shape(path: str | Path, *, text_encoder: str | None = None) -> Dataset:
    """As `open_data`, for callers that take latents of one shape: of buckets only the base is opened, with a warning."""
    data = open_data(path, text_encoder=text_encoder)
    if not isinstance(data, Buckets):
        return data
    base = data.base
    base.text_encoder = text_encoder
    warnings.warn(
        f"{path} holds buckets of several sizes, of which {base.path.name} ({plural(len(base), 'picture')}) is read: it is "
        "nearest to a square, and the model is built for its size",
        stacklevel=3,
    )
    return base


def is_prepared(path: str | Path) -> bool:
    """Whether a folder was made by `prepare` or by `prepare_buckets`; a URL is taken to be one, and checked when opened."""
    if is_url(path):
        return True
    return Path(path, FILE).exists() or Path(path, BUCKETS).exists()


def read_names(path: Path) -> tuple[str, ...]:
    """The folders that `buckets.json` in `path` names. Raises ValueError when it is missing or invalid."""
    if not (path / BUCKETS).is_file():
        raise ValueError(f"no {BUCKETS} in {path}: not finished; repeat its `selftrans prepare` to make it")
    try:
        return names_in(read_text(path / BUCKETS))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def names_in(text: str) -> tuple[str, ...]:
    """The folders that the text of a `buckets.json` names. Raises ValueError when it is invalid."""
    plain = parse_object(text, BUCKETS, REMEDY)
    try:
        names: tuple[str, ...] = from_plain(Contents, plain, "").buckets
    except ValueError as error:
        raise ValueError(f"{BUCKETS}: {error}; {REMEDY}") from error
    if not 1 <= len(names) <= MOST or len(set(names)) < len(names):
        raise ValueError(f"{BUCKETS}: field 'buckets' should name 1 to {MOST} different folders; {REMEDY}")
    return names


def write_names(path: Path, names: Sequence[str]) -> None:
    """Write `buckets.json`: from then on the folder can be opened."""
    write_text(path / BUCKETS, json.dumps(asdict(Contents(VERSION, tuple(names))), indent=1))


def _aspect(manifest: Manifest) -> float:
    height, width = sides(manifest.resolution or 1)
    return height / width


def _check_alike(bucket: Dataset, base: Dataset) -> None:
    """Raise ValueError unless a bucket has pictures of the size that names it, and agrees with the base in all else."""
    own, other = bucket.manifest, base.manifest
    if own.resolution is None or size_text(own.resolution) != Path(bucket.origin).name:
        raise ValueError(f"{bucket.origin} does not hold pictures of {Path(bucket.origin).name}; {REMEDY}")
    alike = {name: getattr(own, name) == getattr(other, name) for name in SHARED}
    own_text, other_text = ((text.stored, text.dtype) if text else None for text in (own.text, other.text))
    alike |= {"text": own_text == other_text, "shape": own.shape[0] == other.shape[0] and len(own.shape) == 3}
    for name, same in alike.items():
        if not same:
            raise ValueError(f"{bucket.origin} and {base.origin} differ in '{name}'; {REMEDY}")
