"""Files of pictures as decoders read them: never more bytes than there are, or only some parts of a file."""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeAlias

#: (start, end) in a file, or bytes in place of some of it
Part: TypeAlias = tuple[int, int] | bytes


class SizedFile(io.BufferedReader):
    """A buffered file whose reads allocate at most its size, not the length that a malicious header claims."""

    def __init__(self, raw: io.RawIOBase, size: int) -> None:
        super().__init__(raw)
        self._size = size

    @classmethod
    def open(cls, path: Path) -> Self:
        """A file on the disk."""
        raw = io.FileIO(path)
        return cls(raw, os.fstat(raw.fileno()).st_size)

    def read(self, size: int | None = -1) -> bytes:
        return super().read(size if size is None else min(size, self._size))

    def __del__(self) -> None:
        self.close()  # PIL leaves it open


class PartFile(io.RawIOBase):
    """Some parts of a file, one after another, as a file. Reads at most what the parts hold."""

    def __init__(self, file: BinaryIO, parts: Sequence[Part]) -> None:
        self._file, self._parts, self._at = file, list(parts), 0
        self._ends = list(accumulate(len(p) if isinstance(p, bytes) else p[1] - p[0] for p in parts))
        self._size = self._ends[-1] if self._ends else 0

    def buffered(self) -> SizedFile:
        """The same with a buffer, for many small reads."""
        return SizedFile(self, self._size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """At most what is left of one part; 0 at the end, and where the file is shorter than it was."""
        k = bisect_right(self._ends, self._at)
        if k == len(self._ends):
            return 0
        part, begun = self._parts[k], self._at - (self._ends[k - 1] if k else 0)
        count = min(len(buffer), self._ends[k] - self._at)
        if isinstance(part, bytes):
            data = part[begun : begun + count]
        else:
            self._file.seek(part[0] + begun)
            data = self._file.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
