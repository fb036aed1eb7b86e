"""Prepared data at a URL as a data set: the manifest first, then labels, then whole shards through a cache.

    CACHE/sets/<hash of the URL>/     manifest.json, null.safetensors and the labels of every row      (see `shard_cache`)
Shape legend: N rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from selftrans.data.buckets import Buckets, names_in
from selftrans.data.dataset import Dataset, check_index
from selftrans.data.manifest import BUCKETS, FILE, Features, Manifest
from selftrans.data.manifest_text import COUNT, NULL
from selftrans.data.shard_file import open_tensors, row_bytes
from selftrans.data.streaming.remote import WANTED, Store, retried, store_of
from selftrans.data.streaming.remote_rows import AT_A_TIME, HEADER, RandomAccess, RemoteShard
from selftrans.data.streaming.shard_cache import CacheOptions, ShardCache
from selftrans.data.streaming.shard_reader import ShardReader, StreamedTensor
from selftrans.data.views import one_shard
from selftrans.plain_json import MAX_BYTES
from selftrans.progress import progress_bar
from selftrans.storage import atomic_write, sha256_file, write_text

INDEX = ("labels", COUNT)  #: tensors of a shard that are read when the data are opened


class Streamed(Dataset):
    """Prepared data at a URL. Shards are fetched when they are read; `prefetch` and `fetch` bring them earlier."""

    def __init__(
        self,
        folder: Path,
        reader: ShardReader,
        labels: np.ndarray,
        counts: np.ndarray | None,
        cache: CacheOptions,
    ) -> None:
        tensors = {name: StreamedTensor(reader, name) for name in reader.manifest.layout if name not in INDEX}
        super().__init__(folder, reader.manifest, dict(tensors), labels, counts)
        self.origin, self.reader, self.cache = reader.store.url, reader, cache
        self._whole = False  #: whether all shards have been fetched

    def prefetch(self, now: Collection[int], then: Collection[int]) -> None:
        self.reader.prefetch(now, then)

    def fetch(self, *, progress: bool = True) -> None:
        """Bring every shard into the cache, if all fit; then features that are opened later are fetched, too."""
        if self.reader.fits:
            self._whole = True
            self.reader.fetch(self.reader.filled, progress=progress)

    def dry_run_data(self) -> Dataset:
        """As `Dataset.dry_run_data`: these data if the cache holds them all, else rows of one shard, which may be fetched."""
        reader = self.reader
        missing = {k: reader.missing(k, features=True) / reader.bytes[k] for k in reader.filled}
        if not any(missing.values()):
            return self
        shard = min(missing, key=missing.__getitem__)
        reader.fetch([shard], progress=True)
        return one_shard(self, shard)

    @cached_property
    def random_access(self) -> Dataset:
        """Where the cache does not hold all shards, each row is read alone."""
        if self.reader.fits:
            return self
        return RandomAccess(self, self.reader.store)

    def open_features(self) -> Features:
        """As `Dataset.open_features`; their files are fetched with those of the shards."""
        found = self.manifest.features
        if found is None:
            return super().open_features()  # raises
        self.reader.features = True
        self._tensors["features"] = StreamedTensor(self.reader, "features")
        if self._whole:
            self.fetch()
        return found

    def verify(self) -> None:
        """Remove damaged files from the cache, so that they are fetched again. Each download is always verified."""
        self.reader.remove_damaged()


def open_streamed(url: str, *, verify: bool, text_encoder: str | None, cache: CacheOptions) -> Dataset:
    """Open prepared data at a URL, also buckets. ValueError, in one line, as `Dataset.open`, and where it cannot be read."""
    store = store_of(url)
    dataset: Dataset
    if (text := _text(store, FILE)) is not None:
        dataset = _open_one(store, text, cache)
    elif (text := _text(store, BUCKETS)) is not None:
        dataset = _open_buckets(store.url, text, cache)
    else:
        raise _no_manifest(store.url)
    dataset.text_encoder = text_encoder
    if verify:
        dataset.verify()
    return dataset


def _open_buckets(url: str, text: str, cache: CacheOptions) -> Buckets:
    """Open the buckets that `text`, a buckets.json, names. ValueError as `open_streamed`."""
    try:
        names = names_in(text)
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from error
    parts = []
    for name in names:
        store = store_of(f"{url}/{name}")
        if (manifest := _text(store, FILE)) is None:
            raise _no_manifest(store.url)
        parts.append(_open_one(store, manifest, cache))
    opened, total = parts[0].reader.cache, sum(sum(part.reader.bytes) for part in parts)
    if total > opened.limit:
        raise ValueError(
            f"{url} holds buckets, which are streamed only if all of them, {total / 1e9:.1f} GB, fit into the cache, "
            f"{opened.limit / 1e9:g} GB; raise --data.cache-gb"
        )
    return Buckets(_folder(opened, url), parts, origin=url, cache=cache)


def _no_manifest(url: str) -> ValueError:
    return ValueError(f"no {FILE} at {url}: not prepared or not complete; {WANTED}")


def _text(store: Store, file: str) -> str | None:
    """A small text file; None where there is none."""

    def read() -> bytes | None:
        try:
            return store.read(file, 0, MAX_BYTES + 1)
        except FileNotFoundError:
            return None

    found = retried(read, f"{store.url}/{file}")
    if found is None:
        return None
    if len(found) > MAX_BYTES:
        raise ValueError(f"{store.url}/{file} is larger than {MAX_BYTES} bytes")
    try:
        return found.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{store.url}/{file} is not text; {WANTED}") from error


def _open_one(store: Store, text: str, options: CacheOptions) -> Streamed:
    """Open data of one shape, whose manifest is `text`. ValueError as `open_streamed`."""
    try:
        manifest = Manifest.from_json(text)
        if not manifest.count:
            raise ValueError(f"{FILE}: field 'count' is 0")
    except ValueError as error:
        raise ValueError(f"{store.url}: {error}") from error
    cache = options.open()
    folder = _folder(cache, store.url)
    write_text(folder / FILE, text)
    index_file = folder / f"index-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    index = _index(store, manifest, index_file)
    if manifest.text:
        size = row_bytes(manifest.text.null_layout(manifest.conditions)) + HEADER
        _fetch_null(store, folder, manifest.text.null, size)
    reader = ShardReader(store, cache, manifest, index, index_file)
    return Streamed(folder, reader, index["labels"], index.get(COUNT), options)


def _folder(cache: ShardCache, url: str) -> Path:
    return cache.folder / "sets" / hashlib.sha256(url.encode()).hexdigest()[:16]


def _fetch_null(store: Store, folder: Path, sha256: str, size: int) -> None:
    path = folder / NULL
    if path.is_file() and sha256_file(path) == sha256:
        return
    content = retried(lambda: store.read(NULL, 0, size), f"{store.url}/{NULL}")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{store.url}/{NULL} fails its sha256; copy the folder there again")
    with atomic_write(path) as file:
        file.write(content)


def _index(store: Store, manifest: Manifest, path: Path) -> dict[str, np.ndarray]:
    """Labels (N,) and numbers of captions (N,) of all rows: from the file `path`, or else from the start of every shard.

    ValueError where a shard is not what the manifest says, or a label is out of range.
    """
    layout = {name: manifest.layout[name] for name in INDEX if name in manifest.layout}
    if not path.is_symlink():
        with suppress(ValueError):  # it is missing or damaged
            return {name: kept.copy() for name, kept in open_tensors(path, layout, manifest.count).items()}
    filled = [shard for shard in manifest.shards if shard.count]
    hidden = os.environ.get("RANK", "0") != "0"
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        each = pool.map(lambda shard: RemoteShard(store, manifest, shard).small_tensors(layout), filled)
        parts = list(
            progress_bar(each, desc="reading labels", total=len(filled), unit="shard", delay=2, disable=hidden)
        )
    for shard, part in zip(filled, parts, strict=True):
        check_index(f"{store.url}/{shard.file}", manifest, part)
    found = {name: np.concatenate([part[name] for part in parts]) for name in layout}
    with atomic_write(path) as file:
        file.write(save(found))
    for other in path.parent.glob("index-*.safetensors"):  # of an earlier manifest
        if other != path:
            other.unlink(missing_ok=True)
    return found
