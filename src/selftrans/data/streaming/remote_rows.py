"""Parts of a shard at a URL without the rest of it: its small tensors, and single rows.

What is read here is not compared with a sha256. So labels are compared again with the shards when these are opened, and single
rows are only shown, or used as conditions of previews.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from selftrans.data.dataset import Dataset, by_part
from selftrans.data.manifest import Manifest, Shard
from selftrans.data.shard_file import DTYPES, numpy_dtype
from selftrans.data.streaming.remote import Store, retried
from selftrans.data.views import View
from selftrans.messages import first_line

AT_A_TIME = 16  #: requests at the same time
HEADER = 1 << 16  #: bytes that are read at the start of a shard; its header is shorter


class Start(NamedTuple):
    """The first bytes of a shard, and where its tensors are."""

    content: bytes
    spans: dict[str, tuple[int, int]]  #: name -> first byte of the tensor, and the one after its last


def start_of(url: str, store: Store, manifest: Manifest, shard: Shard, names: Collection[str], size: int) -> Start:
    """The first `size` bytes of a shard, HEADER at least. ValueError where the file is not what the manifest says."""
    size = max(size, HEADER)
    content = retried(lambda: store.read(shard.file, 0, size), f"{url}/{shard.file}")
    try:
        length = int.from_bytes(content[:8], "little")
        if not 2 <= length <= size - 8:
            raise ValueError("its header is not that of a safetensors file")
        header = json.loads(content[8 : 8 + length])
        spans = {}
        for name in names:
            dtype, row = manifest.layout[name]
            begin, end = map(int, header[name]["data_offsets"])
            expected = shard.count * math.prod(row) * numpy_dtype(dtype).itemsize
            if header[name]["dtype"] != DTYPES[dtype] or end - begin != expected or begin < 0:
                raise ValueError(f"its {name} are not {(shard.count, *row)} of {DTYPES[dtype]}")
            spans[name] = begin + 8 + length, end + 8 + length
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _unusable(url, shard, error) from error
    return Start(content, spans)


def small_tensors(url: str, store: Store, manifest: Manifest, shard: Shard, names: list[str]) -> dict[str, np.ndarray]:
    """Small tensors of a shard; in shards that `prepare` wrote, they are at the start. ValueError as `start_of`."""
    start = start_of(url, store, manifest, shard, names, HEADER + sum(8 * shard.count for _ in names))
    found = {}
    for name, (begin, end) in start.spans.items():
        content = start.content[begin:end]
        if end > len(start.content):
            content = retried(partial(store.read, shard.file, begin, end), f"{url}/{shard.file}")
        if len(content) < end - begin:
            raise _unusable(url, shard, "it is cut off")
        found[name] = np.frombuffer(content, dtype=numpy_dtype(manifest.layout[name][0])).copy()
    return found


class RemoteShard:
    """A shard of which single rows are read, and kept in memory: for a few rows that are far apart."""

    def __init__(self, url: str, store: Store, manifest: Manifest, shard: Shard) -> None:
        self.url, self.store, self.manifest, self.shard = url, store, manifest, shard
        self._kept: dict[tuple[int, int], bytes] = {}  #: first byte and the one after the last -> content

    @cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Where its tensors are."""
        return start_of(self.url, self.store, self.manifest, self.shard, self.manifest.layout, HEADER).spans

    def fetch(self, spans: Collection[tuple[int, int]]) -> None:
        """Read these parts of the file, where they are not kept. ValueError where they cannot be read."""
        missing = sorted({span for span in spans if span not in self._kept})
        if not missing:
            return
        found = retried(lambda: self.store.parts(self.shard.file, missing), f"{self.url}/{self.shard.file}")
        for (begin, end), content in zip(missing, found, strict=True):
            if len(content) < end - begin:
                raise _unusable(self.url, self.shard, "it is cut off")
            self._kept[begin, end] = content

    def content(self, span: tuple[int, int]) -> bytes:
        """The bytes of a span that `fetch` has read."""
        return self._kept[span]


class RemoteRows:
    """A tensor of a `RemoteShard`, indexed by rows (N,), or by rows and an entry of each, both (N,)."""

    def __init__(self, shard: RemoteShard, name: str) -> None:
        self.shard, self.name = shard, name

    def spans(self, at: Any) -> list[tuple[int, int]]:
        """Where these rows are in the file."""
        dtype, shape = self.shard.manifest.layout[self.name]
        rows, entries = at if isinstance(at, tuple) else (at, None)
        size = math.prod(shape) * numpy_dtype(dtype).itemsize
        starts = self.shard.spans[self.name][0] + size * np.asarray(rows, dtype=np.int64)
        if entries is not None:
            size //= shape[0]
            starts = starts + size * np.asarray(entries, dtype=np.int64)
        return [(start, start + size) for start in starts.tolist()]

    def __getitem__(self, at: Any) -> np.ndarray:
        dtype, shape = self.shard.manifest.layout[self.name]
        spans = self.spans(at)
        self.shard.fetch(spans)
        content = b"".join(map(self.shard.content, spans))
        return np.frombuffer(content, dtype=numpy_dtype(dtype)).reshape(-1, *shape[isinstance(at, tuple) :])


class RandomAccess(View):
    """A data set at a URL whose rows are read one by one, several at the same time, without the cache.

    A server without ranges sends each shard once for all rows of a `read`. The cache is not used: while training holds all of
    it, a preview would wait for space.
    """

    def __init__(self, of: Dataset, store: Store) -> None:
        parts = [RemoteShard(of.origin, store, of.manifest, shard) for shard in of.manifest.shards]
        stored = [name for name in of._tensors if name in of.manifest.layout]  # without features
        tensors: Any = {name: [RemoteRows(part, name) for part in parts] for name in stored}
        super().__init__(of, of.labels, of.counts)
        self._tensors, self._store, self._parts = tensors, store, parts

    def __reduce__(self) -> tuple[Any, ...]:
        return attrgetter("random_access"), (self._dataset,)

    def _gather(self, name: str, rows: np.ndarray, which: np.ndarray | None = None) -> Tensor:
        tensors, by_shard = self._tensors[name], list(by_part(self._starts, rows))
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            list(pool.map(lambda k: self._parts[k].spans, [k for k, *_ in by_shard]))  # their headers
            jobs: list[tuple[int, list[tuple[int, int]]]] = []
            for k, at, local in by_shard:
                spans = tensors[k].spans(local if which is None else (local, which[at]))
                jobs += [(k, [span]) for span in set(spans)] if self._store.ranges else [(k, spans)]
            list(pool.map(lambda job: self._parts[job[0]].fetch(job[1]), jobs))
        return super()._gather(name, rows, which)


def _unusable(url: str, shard: Shard, why: object) -> ValueError:
    return ValueError(f"{url}/{shard.file} cannot be used ({first_line(why)}); copy the folder there again")
