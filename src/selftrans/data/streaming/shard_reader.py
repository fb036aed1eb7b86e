"""Shards at a URL => memory-mapped arrays, through a cache: fetched when they are read, and ahead of that."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from selftrans.data.manifest import Manifest
from selftrans.data.shard_file import PAGE, Layout, open_tensors, row_bytes
from selftrans.data.streaming.remote import Lasting, Store, retried
from selftrans.data.streaming.shard_cache import SUFFIX, ShardCache
from selftrans.data.windows import window_that_fits
from selftrans.progress import progress_bar
from selftrans.storage import sha256_file

THREADS = 4  #: that fetch ahead


class RemoteFile(NamedTuple):
    """A file of the data, and what it should hold."""

    name: str  #: at the URL
    sha256: str
    layout: Layout
    rows: int

    @property
    def cached(self) -> str:
        return self.sha256 + SUFFIX

    @property
    def size(self) -> int:
        """Bytes; `prepare` pads the header to a page."""
        return self.rows * row_bytes(self.layout) + PAGE


class ShardReader:
    """The shards of one data set. Safe from any thread.

    Shards that `prefetch` named are held in the cache. Without that they are held as they are read: all of them if they fit,
    else the last few.
    """

    def __init__(
        self,
        store: Store,
        cache: ShardCache,
        manifest: Manifest,
        index: Mapping[str, np.ndarray],
        index_file: Path,
    ) -> None:
        self.store, self.cache, self.manifest = store, cache, manifest
        ends = np.cumsum([shard.count for shard in manifest.shards])[:-1]
        #: labels and caption counts, which were read without a hash
        self._index = {name: np.split(values, ends) for name, values in index.items()}
        self._index_file = index_file
        self.features = False  #: whether files of features are fetched with their shards
        self.bytes = [sum(file.size for file in self._files(k, features=True)) for k in range(len(manifest.shards))]
        self._mutex = threading.RLock()
        self._open: dict[tuple[int, bool], dict[str, np.ndarray]] = {}  #: shard, whether of its features -> arrays
        self._prefetched: set[int] | None = None  #: by `prefetch`
        #: shards in the order in which they were opened, unless `prefetch` has named some
        self._recent: deque[int] = deque()
        self._held: set[int] = set()
        self._queue: deque[int] = deque()
        self._workers = 0

    @property
    def filled(self) -> list[int]:
        """The shards that have rows."""
        return [k for k, shard in enumerate(self.manifest.shards) if shard.count]

    @property
    def fits(self) -> bool:
        """Whether the cache can hold all shards at a time."""
        return sum(self.bytes) <= self.cache.limit

    def arrays(self, k: int, name: str) -> np.ndarray:
        """The tensor `name` (count, ...) of shard k. ValueError where it cannot be fetched or is not as the manifest says."""
        key = (k, name == "features")
        found = self._open.get(key)
        if found is None:
            file = self._files(k, features=True)[-1 if name == "features" else 0]
            self._hold_recent(k)
            self._obtain(file)
            found = self._opened(k, file)
            with self._mutex:
                self._open[key] = found
        return found[name]

    def prefetch(self, now: Collection[int], then: Collection[int]) -> None:
        """Hold exactly these shards: fetch those of `now` first, in this order, then those of `then`."""
        order = [k for k in dict.fromkeys((*now, *then)) if self.manifest.shards[k].count]
        with self._mutex:
            self._prefetched = set(order)
            self._hold(self._prefetched)
            self._fetch_ahead(order)

    def size(self, k: int) -> int:
        """Bytes of shard k, with its features if they are read."""
        return sum(file.size for file in self._files(k))

    def missing(self, k: int, *, features: bool | None = None) -> int:
        """Bytes of shard k that the cache does not hold now; with its features if `features` (None: if they are read)."""
        files = self._files(k, features=features)
        return sum(file.size for file in files if not (self.cache.folder / file.cached).is_file())

    def fetch(self, shards: Sequence[int], *, progress: bool) -> None:
        """Hold exactly these shards, which must fit into the cache, and fetch what is missing; shows a bar if `progress`."""
        missing = [k for k in shards if self.missing(k)]
        self.prefetch(shards, ())
        if not missing:
            return
        total = sum(map(self.size, missing))
        hidden = not progress or os.environ.get("RANK", "0") != "0"
        with progress_bar(desc="fetching data", total=total, unit="B", unit_scale=True, disable=hidden) as bar:
            for k in missing:
                for file in self._files(k):
                    self._obtain(file)
                    bar.update(file.size)

    def remove_damaged(self) -> None:
        """Remove cached files of these data whose sha256 is wrong: they are fetched again."""
        for k in range(len(self.manifest.shards)):
            for file in self._files(k, features=True):
                path = self.cache.folder / file.cached
                if path.is_file() and sha256_file(path) != file.sha256:
                    self.cache.discard(file.cached)

    def _files(self, k: int, *, features: bool | None = None) -> list[RemoteFile]:
        manifest = self.manifest
        shard, described = manifest.shards[k], manifest.features
        files = [RemoteFile(shard.file, shard.sha256, manifest.layout, shard.count)]
        if described and (self.features if features is None else features):
            of_shard = described.files[k]
            files.append(RemoteFile(of_shard.name, of_shard.sha256, described.layout(manifest), shard.count))
        return files

    def _opened(self, k: int, file: RemoteFile) -> dict[str, np.ndarray]:
        """The arrays of a cached file; a damaged one is fetched once more."""
        for attempt in range(2):
            try:
                found = open_tensors(self.cache.folder / file.cached, file.layout, file.rows)
                break
            except ValueError as error:
                self.cache.discard(file.cached)
                if attempt:
                    raise ValueError(f"{self.store.url}/{file.name}: {error}") from error
                self._obtain(file)
        for name, parts in self._index.items():
            if name in found and not np.array_equal(found[name], parts[k]):
                self._index_file.unlink(missing_ok=True)  # so that a repeated command reads both again
                self.cache.discard(file.cached)
                what = "labels" if name == "labels" else "numbers of captions"
                raise ValueError(
                    f"{self.store.url}/{file.name} has other {what} than when the data were opened; repeat the command"
                )
        return found

    def _obtain(self, file: RemoteFile, wanted: Callable[[], bool] = lambda: True) -> None:
        self.cache.obtain(file.cached, file.size, lambda to: self._download(file, to), wanted=wanted)

    def _download(self, file: RemoteFile, to: Path) -> None:
        """Fetch a file whole, with retries, and compare its sha256 with the manifest's."""
        differed = False

        def once() -> None:
            nonlocal differed
            os.truncate(to, 0)
            self.store.download(file.name, to)
            if sha256_file(to) != file.sha256:
                kind = Lasting if differed else ConnectionError
                differed = True
                raise kind("its sha256 is not the manifest's, fetched twice")

        retried(once, f"{self.store.url}/{file.name}")

    def _hold_recent(self, k: int) -> None:
        """Decide which shards to hold now that shard k is opened, unless `prefetch` has said which."""
        with self._mutex:
            if self._prefetched is not None:
                return
            follows = k == (self._recent[-1] + 1 if self._recent else 0)
            if k not in self._recent:
                self._recent.append(k)
            most = len(self.bytes) if self.fits else max(1, window_that_fits(self.bytes, self.cache.limit))
            while len(self._recent) > most:
                self._recent.popleft()
            ahead = [j for j in (k + 1, k + 2) if follows and j < len(self.bytes) and self.manifest.shards[j].count]
            ahead = ahead if self.fits or most > 1 else []
            self._hold({*self._recent, *ahead})
            self._fetch_ahead(ahead)

    def _hold(self, shards: Collection[int]) -> None:
        files = [file for k in shards for file in self._files(k)]
        self._open = {key: arrays for key, arrays in self._open.items() if key[0] in shards}
        self.cache.hold([file.cached for file in files])
        self._held = set(shards)

    def _fetch_ahead(self, order: Sequence[int]) -> None:
        """Let threads fetch these shards, in place of those that still wait."""
        self._queue = deque(order)
        while self._workers < min(THREADS, len(self._queue)):
            self._workers += 1
            threading.Thread(target=self._work, name="fetch", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._mutex:
                if not self._queue:
                    self._workers -= 1
                    return
                k = self._queue.popleft()
            try:
                for file in self._files(k):
                    self._obtain(file, wanted=lambda k=k: k in self._held)  # type: ignore[misc]
            except Exception:  # `arrays` tries again when the shard is read, and raises the error
                continue


class StreamedTensor:
    """One tensor of every shard, each opened when it is asked for."""

    def __init__(self, reader: ShardReader, name: str) -> None:
        self._reader, self._name = reader, name

    def __getitem__(self, k: int) -> np.ndarray:
        return self._reader.arrays(int(k), self._name)
