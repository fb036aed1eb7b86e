"""Files at a URL: names of folders without secrets, and stores that read files whole or in part, with retries.

`http` and `https` need no package; every other protocol is one of fsspec (`s3`, `gs`, `hf`, `memory`, `file`, ...). Credentials
come from the environment or the configuration files of the store's own package, never from the URL.
"""

from __future__ import annotations

import errno
import http.client
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import quote, urlsplit

from selftrans.storage import first_line

#: protocol -> extra of this package that reads it
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
TIMEOUT = 60.0  #: seconds that a connection may be silent
ATTEMPTS = 5
FIRST_WAIT = 0.5  #: seconds before the second attempt; doubled before each further one
PIECE = 1 << 20  #: bytes that are copied at a time
WANTED = "give the URL of a folder made by `selftrans prepare`"

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_IN_TEXT = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^\s/?#'\"<>]*)([^\s?#'\"<>]*)(\?[^\s'\"<>]*)?(#[^\s'\"<>]*)?")
_NAMED = re.compile(
    r"(?i)\b([\w-]*(?:token|signature|password|passwd|secret|credential|access_?key(?:_?id)?))(\s*[=:]\s*)\S+"
)
_HEADER = re.compile(r"(?i)\b(authorization['\"]?\s*[=:]\s*)[^\r\n]+")
T = TypeVar("T")


def is_url(path: object) -> bool:
    """Whether a path names a place that is not a local path: `protocol://...`."""
    return isinstance(path, str) and _URL.match(path) is not None


def cleaned(text: object) -> str:
    """Text without secrets: URLs lose user, password, query and fragment; values of names such as `token=` are left out.

    Everything that is shown or written about a URL goes through this.
    """

    def one(found: re.Match[str]) -> str:
        protocol, host, rest, query, _ = found.groups()
        host = host.rpartition("@")[2]
        port = host.rpartition("]")[2].partition(":")[2]
        if port and not port.isdigit():  # a password with a slash in it
            return f"{protocol}…"
        return f"{protocol}{host}{rest}{'?…' if query else ''}"

    shown = _HEADER.sub(r"\1…", _IN_TEXT.sub(one, str(text)))
    return _NAMED.sub(r"\1\2…", shown)


def checked(url: str) -> str:
    """The URL of a folder without a final slash. ValueError where it holds credentials or a query, or names no folder."""
    url = url.strip()
    if cleaned(url) != url:
        raise ValueError(
            f"{cleaned(url)}: a URL with a user, password, token or query is refused, since paths are written to logs and "
            "checkpoints; give it without, and credentials as the store's own package reads them (see docs/streaming.md)"
        )
    protocol, _, rest = url.partition("://")
    if not rest.strip("/") or any(not character.isprintable() for character in url) or ".." in rest.split("/"):
        raise ValueError(f"{first_line(ascii(url)[1:-1])} names no folder; {WANTED}")
    return f"{protocol.lower()}://{rest.rstrip('/')}"


class Lasting(Exception):
    """An error that another attempt does not mend."""


class Store(Protocol):
    """A folder at a URL. Errors of the transport pass through; FileNotFoundError where there is no such file."""

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes start .. end of a file, or fewer where it is shorter."""
        ...

    def download(self, name: str, to: Path, advance: Callable[[int], object]) -> None:
        """Copy a file to the path `to`, which exists; `advance` gets the bytes of each piece."""
        ...


def store_of(url: str) -> Store:
    """The store of a folder. ValueError where its protocol is not known or its package is not installed."""
    url = checked(url)
    if url.startswith(("http://", "https://")):
        return HttpStore(url)
    return FsspecStore(url)


class HttpStore:
    """A folder of a web server. A server that ignores ranges is read from the start, as far as needed."""

    def __init__(self, url: str) -> None:
        self.url = url

    def read(self, name: str, start: int, end: int) -> bytes:
        with self._open(name, {"Range": f"bytes={start}-{end - 1}"}) as answer:
            if answer.status == 206:
                return answer.read(end - start)
            return answer.read(end)[start:]

    def download(self, name: str, to: Path, advance: Callable[[int], object]) -> None:
        with self._open(name, {}) as answer, open(to, "r+b") as file:
            while piece := answer.read(PIECE):
                file.write(piece)
                advance(len(piece))
            if answer.length:
                raise ConnectionError(f"{answer.length} bytes are missing at its end")

    def _open(self, name: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        address = urlsplit(self.url)
        path = f"{address.scheme}://{address.netloc}{quote(address.path, safe='/%')}/{quote(name)}"
        request = urllib.request.Request(
            path, headers={"User-Agent": "selftrans", "Accept-Encoding": "identity"} | headers
        )
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (404, 410):
                raise FileNotFoundError(f"the server has no {name}") from None
            if error.code == 416:  # a range after the end
                return self._open(name, {})
            raise


class FsspecStore:
    """A folder of any file system of fsspec."""

    def __init__(self, url: str) -> None:
        import fsspec

        protocol = url.partition("://")[0]
        try:
            self.system, self.root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            install = f"`pip install -c constraints.txt -e '.[{extra}]'`" if extra else f"({first_line(error)})"
            raise ValueError(f"{protocol}:// needs a package that is not installed: {install}") from error
        except ValueError as error:
            raise ValueError(f"{cleaned(url)} cannot be read ({cleaned(first_line(error))}); {WANTED}") from None

    def read(self, name: str, start: int, end: int) -> bytes:
        return bytes(self.system.cat_file(f"{self.root}/{name}", start=start, end=end))[: end - start]

    def download(self, name: str, to: Path, advance: Callable[[int], object]) -> None:
        with self.system.open(f"{self.root}/{name}", "rb", block_size=8 * PIECE) as source, open(to, "r+b") as file:
            while piece := source.read(PIECE):
                file.write(piece)
                advance(len(piece))


def retried(work: Callable[[], T], what: str) -> T:
    """The result of `work`, repeated after errors with growing waits. ValueError in one line, without secrets, at the end.

    What cannot succeed later is not repeated: a missing file, a refused permission. `what` names the file.
    """
    for attempt in range(ATTEMPTS):
        try:
            return work()
        except Exception as error:  # every store has its own types
            if _final(error):
                raise ValueError(f"{cleaned(what)} cannot be read ({_reason(error)})") from None
            if attempt == ATTEMPTS - 1:
                raise ValueError(f"{cleaned(what)} cannot be read ({_reason(error)}, {ATTEMPTS} attempts)") from None
            time.sleep(FIRST_WAIT * 2**attempt * random.uniform(0.75, 1.25))
    raise AssertionError("the last attempt returns or raises")


def _final(error: Exception) -> bool:
    """Whether another attempt is of no use."""
    status = getattr(error, "code", None) or getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    full = getattr(error, "errno", None) == errno.ENOSPC
    kinds = Lasting | FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError
    return refused or full or isinstance(error, kinds)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    reason = getattr(error, "reason", None)
    return cleaned(first_line(reason if isinstance(reason, Exception) else error))
