"""Parts of a shard at a URL without the rest of it: its small tensors, and single rows.

What is read here is not compared with a sha256. So labels are compared again with the shards when these are opened, and single
rows are only shown, or used as conditions of previews.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from operator import attrgetter
from typing import Any

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


class RemoteShard:
    """A shard of which parts are read: small tensors whole, and single rows, which are kept in memory."""

    def __init__(self, store: Store, manifest: Manifest, shard: Shard) -> None:
        self.store, self.manifest, self.shard, self.url = store, manifest, shard, f"{store.url}/{shard.file}"
        self._kept: dict[tuple[int, int], bytes] = {}  #: first byte and the one after the last -> content

    def small_tensors(self, names: Collection[str]) -> dict[str, np.ndarray]:
        """Tensors of a few bytes per row; in shards that `prepare` wrote, they are at the start. ValueError as `spans`."""
        start, spans = self._start(names, HEADER + sum(8 * self.shard.count for _ in names))
        found = {}
        for name, (begin, end) in spans.items():
            content = start[begin:end] if end <= len(start) else self.contents([(begin, end)])[0]
            found[name] = np.frombuffer(content, dtype=numpy_dtype(self.manifest.layout[name][0])).copy()
        return found

    @cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """First byte of each tensor, and the one after its last. ValueError where the file is not what the manifest says."""
        return self._start(self.manifest.layout, HEADER)[1]

    def contents(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of these parts of the file, read where they are not kept. ValueError where they cannot be read."""
        missing = sorted({span for span in spans if span not in self._kept})
        found = retried(lambda: self.store.parts(self.shard.file, missing), self.url) if missing else []
        for (begin, end), content in zip(missing, found, strict=True):
            if len(content) < end - begin:
                raise self._unusable("it is cut off")
            self._kept[begin, end] = content
        return [self._kept[span] for span in spans]

    def _start(self, names: Collection[str], size: int) -> tuple[bytes, dict[str, tuple[int, int]]]:
        """The first `size` bytes, and where these tensors are. ValueError where the file is not what the manifest says."""
        content = retried(lambda: self.store.read(self.shard.file, 0, size), self.url)
        try:
            length = int.from_bytes(content[:8], "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header is not that of a safetensors file")
            header = json.loads(content[8 : 8 + length])
            spans = {}
            for name in names:
                dtype, row = self.manifest.layout[name]
                begin, end = map(int, header[name]["data_offsets"])
                expected = self.shard.count * math.prod(row) * numpy_dtype(dtype).itemsize
                if header[name]["dtype"] != DTYPES[dtype] or end - begin != expected or begin < 0:
                    raise ValueError(f"its {name} are not {(self.shard.count, *row)} of {DTYPES[dtype]}")
                spans[name] = begin + 8 + length, end + 8 + length
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise self._unusable(error) from error
        return content, spans

    def _unusable(self, why: object) -> ValueError:
        return ValueError(f"{self.url} cannot be used ({first_line(why)}); copy the folder there again")


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
        content = b"".join(self.shard.contents(self.spans(at)))
        return np.frombuffer(content, dtype=numpy_dtype(dtype)).reshape(-1, *shape[isinstance(at, tuple) :])


class RandomAccess(View):
    """A data set at a URL whose rows are read one by one, several at the same time, without the cache.

    A server without ranges sends each shard once for all rows of a `read`. The cache is not used: while training holds all of
    it, a preview would wait for space.
    """

    def __init__(self, of: Dataset, store: Store) -> None:
        shards = [RemoteShard(store, of.manifest, each) for each in of.manifest.shards]
        stored = [name for name in of._tensors if name in of.manifest.layout]  # without features
        tensors: Any = {name: [RemoteRows(shard, name) for shard in shards] for name in stored}
        super().__init__(of, of.labels, of.counts)
        self._tensors, self._store, self._shards = tensors, store, shards

    def __reduce__(self) -> tuple[Any, ...]:
        return attrgetter("random_access"), (self._dataset,)

    def _gather(self, name: str, rows: np.ndarray, which: np.ndarray | None = None) -> Tensor:
        tensors, by_shard = self._tensors[name], list(by_part(self._starts, rows))
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            list(pool.map(lambda k: self._shards[k].spans, [k for k, *_ in by_shard]))  # their headers
            jobs: list[tuple[int, list[tuple[int, int]]]] = []
            for k, at, local in by_shard:
                spans = tensors[k].spans(local if which is None else (local, which[at]))
                jobs += [(k, [span]) for span in set(spans)] if self._store.ranges else [(k, spans)]
            list(pool.map(lambda job: self._shards[job[0]].contents(job[1]), jobs))
        return super()._gather(name, rows, which)
