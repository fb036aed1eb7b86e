"""A folder of any file system of fsspec as a store: `s3`, `gs`, `hf`, `file`, `memory`, ...

The clients of object stores repeat a request by themselves, some without end (redirects in a circle), and some have no limit
of time: every request here has one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selftrans.data.streaming.remote import PIECE, TIMEOUT, WANTED, cleaned, http_status
from selftrans.messages import first_line

#: protocol -> extra of this package that reads it
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
RANGE = 8 * PIECE  #: bytes of one request
SLOWEST = 20e3  #: bytes per second of a link that is waited for
#: loggers of the clients: they write tracebacks and warnings for each request that fails, also where another attempt succeeds
LOGGERS = ("fsspec", "s3fs", "aiobotocore", "botocore", "gcsfs", "google", "aiohttp")


class FsspecStore:
    """A folder of a file system of fsspec. ValueError where its protocol is not known or its package is not installed."""

    ranges = True

    def __init__(self, url: str) -> None:
        import fsspec

        self.url, protocol = url, url.partition("://")[0]
        # without a handler Python shows warnings on stderr; those of an application still get them
        for name in LOGGERS:
            if not logging.getLogger(name).handlers:
                logging.getLogger(name).addHandler(logging.NullHandler())
        try:
            self.system, self.root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            install = f"`pip install -c constraints.txt -e '.[{extra}]'`" if extra else f"({first_line(error)})"
            raise ValueError(f"{protocol}:// needs a package that is not installed: {install}") from error
        except Exception as error:  # also of the client, for wrong settings in a configuration file
            raise ValueError(f"{cleaned(url)} cannot be read ({cleaned(first_line(error))}); {WANTED}") from None

    def read(self, name: str, start: int, end: int) -> bytes:
        path = f"{self.root}/{name}"
        # more than one range: the size of the file gives the time limit
        if end - start > RANGE:
            end = min(end, self._size(path))
        if end <= start:
            return b""
        try:
            seconds = TIMEOUT + (end - start) / SLOWEST
            found = self._call("cat_file", path, seconds=seconds, start=start, end=end)
        except Exception as error:
            if http_status(error) == 416:  # a range after the end; stores do so for an empty file
                return b""
            raise
        return bytes(found)[: end - start]

    def parts(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self.read(name, start, end) for start, end in spans]

    def download(self, name: str, to: Path) -> None:
        path = f"{self.root}/{name}"
        if not self.system.async_impl:  # in one go: a range of a zip is found by reading all before it
            self.system.get_file(path, str(to))
            return
        size = self._size(path)
        with open(to, "r+b") as file:
            for start in range(0, size, RANGE):
                piece = self.read(name, start, min(start + RANGE, size))
                if len(piece) < min(RANGE, size - start):
                    raise ConnectionError(f"{size - start - len(piece)} bytes are missing at its end")
                file.write(piece)

    def _size(self, path: str) -> int:
        """Bytes of a file."""
        return int(self._call("info", path, seconds=TIMEOUT)["size"])

    def _call(self, name: str, *args: object, seconds: float, **options: object) -> Any:
        """Call a method of the file system; of an asynchronous one for at most `seconds`, retries of its client included."""
        if not self.system.async_impl:
            return getattr(self.system, name)(*args, **options)
        from fsspec.asyn import sync
        from fsspec.exceptions import FSTimeoutError

        try:
            return sync(self.system.loop, getattr(self.system, f"_{name}"), *args, timeout=seconds, **options)
        except FSTimeoutError as error:  # it has no message; its cause has one where the client gave up before
            reason = str(error.__cause__ or "").strip() or f"not done within {seconds:g} seconds"
            raise ConnectionError(first_line(reason)) from error
