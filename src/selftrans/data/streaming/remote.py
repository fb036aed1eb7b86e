"""Files at a URL: names of folders without secrets, and stores that read files whole or in part, with retries.

`http` and `https` need no package; every other protocol is one of fsspec (`s3`, `gs`, `hf`, `memory`, `file`, ...). Credentials
come from the environment or the configuration files of the store's own package, never from the URL.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import random
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import quote, urlsplit

from selftrans.messages import first_line, page, printable

#: protocol -> where its package looks for credentials
CREDENTIALS = {
    "s3": "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "HF_TOKEN",
}
CREDENTIALS |= {"s3a": CREDENTIALS["s3"], "gcs": CREDENTIALS["gs"]}
TIMEOUT = 60.0  #: seconds that a connection may be silent, and that a request of an object store may take
ATTEMPTS = 5
FIRST_WAIT = 0.5  #: seconds before the second attempt; doubled before each further one
PIECE = 1 << 20  #: bytes that are copied at a time
WANTED = "give the URL of a folder made by `selftrans prepare`"

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_NEXT = r"(?:::)?[A-Za-z][A-Za-z0-9+.-]{0,15}://"  #: another URL in the same word, such as zip://a::s3://b
_IN_TEXT = re.compile(
    rf"([A-Za-z][A-Za-z0-9+.-]*://)((?:(?!{_NEXT})[^\s/?#'\"<>])*)((?:(?!{_NEXT})[^\s?#'\"<>])*)"
    r"(\?[^\s'\"<>]*)?(#[^\s'\"<>]*)?"
)
_PARAMETER = re.compile(r"(?i)[;&][\w-]*(token|signature|password|secret|credential|access_?key)[\w-]*=")
_NAMED = re.compile(
    r"(?i)\b([\w-]*(?:token|signature|password|passwd|secret|credential|access_?key(?:_?id)?))(\s*[=:]\s*)\S+"
)
_HEADER = re.compile(r"(?i)\b(authorization['\"]?\s*[=:]\s*)[^\r\n]+")
#: names of error classes of botocore and google-auth, which may not be installed
_ACCESS = re.compile(
    r"(No|Partial|Unknown|Default)Credentials?Error|ProfileNotFound|NoAuthTokenError|(SSO|Login|Refresh)Error"
)
_SETTINGS = re.compile(r"\w*Config\w*Error|ConfigNotFound|ParamValidationError")
T = TypeVar("T")


def is_url(path: object) -> bool:
    """Whether a path names a place that is not a local path: `protocol://...`."""
    return isinstance(path, str) and _URL.match(path) is not None


def cleaned(text: object) -> str:
    """Text without secrets: URLs lose user, password, query and fragment; values of names such as `token=` are left out.

    Everything that is shown or written about a URL goes through this.
    """

    def without_secrets(found: re.Match[str]) -> str:
        protocol, host, rest, query, _ = found.groups()
        host = host.rpartition("@")[2]
        if _has_invalid_port(host):
            return f"{protocol}…"
        return f"{protocol}{host}{rest}{'?…' if query else ''}"

    shown = _HEADER.sub(r"\1…", _IN_TEXT.sub(without_secrets, str(text)))
    return _NAMED.sub(r"\1\2…", shown)


def _has_invalid_port(host: str) -> bool:
    """Whether the colon of a host is not followed by a port: it is then part of a password that contains a slash."""
    _, colon, port = host.rpartition("]")[2].partition(":")
    return bool(colon) and not port.isdigit()


def refuse_secrets(text: str, *, queries: bool = True) -> None:
    """ValueError, which does not repeat them, where a URL in the text holds credentials or (if `queries`) a query."""
    for found in _IN_TEXT.finditer(text):
        protocol, host, rest, query, fragment = found.groups("")
        if "@" in host or _has_invalid_port(host) or "@" in fragment:
            part = "a user or password"
        elif queries and (query or _PARAMETER.search(rest)):
            part = "a query"
        elif queries and fragment and protocol.lower() in ("http://", "https://"):
            part = "a fragment (#)"
        else:
            continue
        raise ValueError(
            f"{cleaned(found[0])}: a URL with {part} is refused, since paths are written to logs and "
            "checkpoints; give it without, and credentials as the store's own package reads them "
            f"(see {page('streaming.md')})"
        )


def checked(url: str) -> str:
    """The URL of a folder without a final slash. ValueError where it holds credentials or a query, or names no folder."""
    url = url.strip()
    refuse_secrets(url)
    protocol, _, rest = url.partition("://")
    if not rest.strip("/") or any(not character.isprintable() for character in url) or ".." in rest.split("/"):
        raise ValueError(f"{first_line(ascii(url)[1:-1])} names no folder; {WANTED}")
    return f"{protocol.lower()}://{rest.rstrip('/')}"


class Lasting(Exception):
    """An error that remains after another attempt."""


class Store(Protocol):
    """A folder at a URL. Errors of the transport pass through; FileNotFoundError where there is no such file."""

    url: str  #: of the folder
    ranges: bool  #: False once a file was sent whole although a part was asked for

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes start .. end of a file, or fewer where it is shorter."""
        ...

    def parts(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several parts, which follow one another in the file; without ranges the file is read once for all of them."""
        ...

    def download(self, name: str, to: Path) -> None:
        """Copy a file to the path `to`, which exists."""
        ...


def store_of(url: str) -> Store:
    """The store of a folder. ValueError where its protocol is not known or its package is not installed."""
    url = checked(url)
    if url.startswith(("http://", "https://")):
        return HttpStore(url)
    from selftrans.data.streaming.fsspec_store import FsspecStore  # it imports this module

    return FsspecStore(url)


class HttpStore:
    """A folder of a web server. A server that ignores ranges is read from the start, as far as needed."""

    def __init__(self, url: str) -> None:
        self.url, self.ranges = url, True

    def read(self, name: str, start: int, end: int) -> bytes:
        with self._open(name, {"Range": f"bytes={start}-{end - 1}"}) as answer:
            first = start if answer.status == 206 else 0
            return next(_spans_of(answer, [(start - first, end - first)]))

    def parts(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        if self.ranges:
            return [self.read(name, start, end) for start, end in spans]
        with self._open(name, {}) as answer:
            return list(_spans_of(answer, spans))

    def download(self, name: str, to: Path) -> None:
        with self._open(name, {}) as answer, open(to, "r+b") as file:
            shutil.copyfileobj(answer, file, PIECE)
            if answer.length:
                raise ConnectionError(f"{answer.length} bytes are missing at its end")

    def _open(self, name: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        address = urlsplit(self.url)
        path = f"{address.scheme}://{address.netloc}{quote(address.path, safe='/%')}/{quote(name)}"
        request = urllib.request.Request(
            path, headers={"User-Agent": "selftrans", "Accept-Encoding": "identity"} | headers
        )
        try:
            answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
            self.ranges = self.ranges and (answer.status == 206 or "Range" not in headers)
            return answer
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (404, 410):
                raise FileNotFoundError(f"the server has no {name}") from None
            if error.code == 416:  # a range after the end
                return self._open(name, {})
            raise


def _spans_of(answer: http.client.HTTPResponse, spans: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """The bytes of an answer in these spans, in order; bytes before and between them are dropped, a PIECE at a time."""
    at = 0
    for start, end in spans:
        while at < start and (piece := answer.read(min(PIECE, start - at))):
            at += len(piece)
        content = answer.read(end - start) if at == start else b""
        at += len(content)
        if len(content) < end - start and answer.length:
            raise ConnectionError(f"{answer.length} bytes are missing at its end")
        yield content


def retried(work: Callable[[], T], what: str) -> T:
    """The result of `work`, repeated after errors with growing waits. ValueError in one line, without secrets, at the end.

    What cannot succeed later is not repeated: a missing file, a refused permission, missing credentials, wrong settings.
    `what`: the URL of the file.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work()
        except Exception as error:  # every store has its own types
            if _final(error) or attempt == ATTEMPTS:
                raise _failure(error, cleaned(what), attempt) from None
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))
    raise AssertionError("the last attempt returns or raises")


def _failure(error: Exception, url: str, attempts: int) -> ValueError:
    """What was wrong, and what to do, in one line without secrets."""
    local = getattr(error, "filename", None)
    if isinstance(local, str | Path) and os.path.isabs(local) and not url.startswith(("file:", "local:")):
        return ValueError(
            f"{printable(local)} cannot be used ({_strerror(error)}) for {url}; make it writable, or choose another "
            "--data.cache-dir"
        )
    reason = "it does not exist" if isinstance(error, FileNotFoundError) else _strerror(error)
    tried = "" if _final(error) else f", {attempts} attempts"
    return ValueError(f"{url} cannot be read ({reason}{tried}){_remedy(error, url.partition('://')[0])}")


def http_status(error: BaseException) -> int | None:
    """The HTTP status that an error of any client is about; None where it has none."""
    answer = getattr(error, "response", None)
    if answer is None:  # s3fs raises errors of Python from those of botocore
        answer = getattr(error.__cause__, "response", None)
    metadata = answer.get("ResponseMetadata", {}) if isinstance(answer, dict) else {}
    for value in (
        *(getattr(error, name, None) for name in ("status", "code")),
        metadata.get("HTTPStatusCode"),
        getattr(answer, "status_code", None),
    ):
        text = str(value)
        if text.isdigit() and 100 <= int(text) < 600:
            return int(text)
    return None


def _final(error: Exception) -> bool:
    """Whether another attempt cannot succeed."""
    status = http_status(error)
    answered = status is not None and 300 <= status < 500 and status not in (408, 425, 429)
    refused = answered and not isinstance(error, TimeoutError | ConnectionError)  # S3 says 400 for a slow client
    full = getattr(error, "errno", None) == errno.ENOSPC
    kinds = (
        Lasting | FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError | ValueError | TypeError
    )
    # the answer was cut off, or it is the html page of a gateway
    cut_off = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
    lasting = isinstance(error, kinds) and not cut_off
    return refused or full or lasting or _named(error, _SETTINGS) or _about_credentials(error)


def _about_credentials(error: Exception) -> bool:
    """Whether credentials are missing, wrong or insufficient; False where their server may only be busy."""
    forbidden = isinstance(error, OSError) and str(error).startswith("Forbidden")  # of gcsfs, which drops the status
    named = _named(error, _ACCESS) and not getattr(error, "retryable", False)
    return named or forbidden or isinstance(error, PermissionError) or http_status(error) in (401, 403)


def _named(error: Exception, names: re.Pattern[str]) -> bool:
    return any(names.fullmatch(kind.__name__) for kind in type(error).__mro__)


def _remedy(error: Exception, protocol: str) -> str:
    if isinstance(error, FileNotFoundError | Lasting):
        return "; copy the folder there again"
    if _about_credentials(error):
        variables = CREDENTIALS.get(protocol)
        if variables:
            return f"; credentials come from {variables} ({page('streaming.md')})"
        return "; http and https are read without credentials" if protocol.startswith("http") else ""
    if "endpoint" in str(error).lower() and protocol in ("s3", "s3a"):
        return "; the endpoint comes from AWS_ENDPOINT_URL, such as https://host:9000"
    return "" if _final(error) else "; the same command tries again"


def _strerror(error: Exception) -> str:
    """What was wrong, in one line without secrets."""
    reason = getattr(error, "reason", None)
    chosen: object = reason if isinstance(reason, Exception) else error
    if not str(chosen).strip() and error.__cause__ is not None:
        chosen = error.__cause__
    return cleaned(first_line(getattr(chosen, "strerror", None) or chosen))
