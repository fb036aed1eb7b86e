"""The store of a file system of fsspec: limits of time, files that change, and which errors of clients are repeated."""

from __future__ import annotations

import asyncio
import errno
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem

from selftrans.data.streaming import fsspec_store, remote
from selftrans.data.streaming.fsspec_store import FsspecStore
from selftrans.data.streaming.remote import retried, store_of


class Client(AsyncFileSystem):  # type: ignore[misc]
    """A file system whose answers a test gives, as that of an object store works: a loop in another thread."""

    protocol, cachable = "answers", False

    def __init__(
        self, content: bytes = b"", size: int | None = None, error: Callable[[], Exception] | None = None
    ) -> None:
        super().__init__()
        self.content, self.size, self.error, self.asked, self.endless = content, size, error, 0, False

    async def _info(self, path: str, **_: object) -> dict[str, object]:
        while self.endless:
            await asyncio.sleep(0.01)
        return {"name": path, "size": len(self.content) if self.size is None else self.size, "type": "file"}

    async def _cat_file(self, path: str, start: int = 0, end: int = 0, **_: object) -> bytes:
        self.asked += 1
        while self.endless:  # as botocore follows redirects in a circle
            await asyncio.sleep(0.01)
        if self.error is not None:
            raise self.error()
        return self.content[start:end]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(fsspec_store, "RANGE", 100)


def store(client: Client) -> FsspecStore:
    made = store_of("memory://bucket/sets")
    assert isinstance(made, FsspecStore)
    made.system = client
    return made


def message(client: Client, url: str = "s3://bucket/sets/a") -> str:
    with pytest.raises(ValueError, match="cannot be read") as error:
        retried(lambda: store(client).read("a", 0, 9), url)
    assert "\n" not in str(error.value) and "hunter2" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("length", [0, 1, 99, 100, 101, 250])
def test_files_are_downloaded_in_ranges(length: int, tmp_path: Path) -> None:
    content = bytes(k % 251 for k in range(length))
    (tmp_path / "copy").write_bytes(b"")
    client = Client(content)
    store(client).download("a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content and client.asked == -(-length // 100)


def test_file_in_a_zip_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, opened = bytes(range(256)) * 64, list[str]()
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/a", content)
    found, to = store_of(f"zip://data::file://{tmp_path}/x.zip"), tmp_path / "copy"
    assert isinstance(found, FsspecStore)
    original = found.system.open

    def counted(path: str, *given: Any, **options: Any) -> Any:
        opened.append(path)
        return original(path, *given, **options)

    monkeypatch.setattr(found.system, "open", counted)
    to.touch()
    found.download("a", to)
    assert to.read_bytes() == content and opened == ["data/a"]


@pytest.mark.parametrize("length", [50, 100, 150])
def test_file_that_became_shorter_is_an_error_that_is_repeated(length: int, tmp_path: Path) -> None:
    (tmp_path / "copy").write_bytes(b"")
    of = store(Client(bytes(length), size=250))
    with pytest.raises(ConnectionError, match=f"^{250 - length} bytes are missing at its end"):
        of.download("a", tmp_path / "copy")


def test_client_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec_store, "TIMEOUT", 0.2)
    monkeypatch.setattr(fsspec_store, "SLOWEST", 1e9)
    client = Client()
    client.endless = True
    assert message(client).endswith(
        "a cannot be read (not done within 0.2 seconds, 5 attempts); the same command tries again"
    )
    assert client.asked == 5


def test_limit_of_time_grows_with_the_bytes_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr("fsspec.asyn.sync", lambda *_, timeout, **__: limits.append(timeout) or b"")
    monkeypatch.setattr(fsspec_store, "RANGE", 8 << 20)
    of = store(Client())
    for size in (20_000, 8_000_000):
        of.read("a", 5, 5 + size)
    assert limits == [61, 460]


@pytest.mark.parametrize(("length", "seconds"), [(5, 60), (200, 60.01), (100_000, 65)])
def test_limit_of_time_for_as_much_as_there_is_is_that_of_its_size(
    length: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose size is not known, such as a manifest, is read with one request, after one for its size."""
    limits: list[float] = []
    client, whole = Client(content := bytes(length)), fsspec.asyn.sync

    def timed(*given: Any, timeout: float, **options: Any) -> Any:
        limits.append(timeout)
        return whole(*given, timeout=timeout, **options)

    monkeypatch.setattr("fsspec.asyn.sync", timed)
    assert store(client).read("a", 0, 1 << 28) == content
    assert limits == pytest.approx([60, seconds], abs=1e-3) and client.asked == 1


def test_client_that_never_says_a_size_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec_store, "TIMEOUT", 0.1)
    client = Client()
    client.endless = True
    with pytest.raises(ConnectionError, match=r"not done within 0\.1 seconds"):
        store(client).read("manifest.json", 0, 1 << 28)
    assert not client.asked


def named(name: str, text: str, **attributes: object) -> Callable[[], Exception]:
    """An error of a package that may not be installed."""

    def make() -> Exception:
        error = type(name, (Exception,), {})(text)
        for key, value in attributes.items():
            setattr(error, key, value)
        return error

    return make


def caused(error: Exception, status: int) -> Callable[[], Exception]:
    """As s3fs: an error of Python, whose cause is that of botocore."""
    error.__cause__ = named("ClientError", "x", response={"ResponseMetadata": {"HTTPStatusCode": status}})()
    return lambda: error


@pytest.mark.parametrize(
    ("error", "url", "shown"),
    [
        (
            lambda: PermissionError("Access Denied"),
            "s3://b/a",
            "(Access Denied); credentials come from AWS_PROFILE, or AWS_",
        ),
        (
            named("NoCredentialsError", "Unable to locate credentials"),
            "s3://b/a",
            "); credentials come from AWS_PROFILE",
        ),
        (
            named("ProfileNotFound", "profile (x) could not be found"),
            "s3://b/a",
            "); credentials come from AWS_PROFILE",
        ),
        (
            lambda: OSError("Forbidden: https://h/b/a?x=hunter2\ndenied"),
            "gs://b/a",
            "); credentials come from GOOGLE_APPLI",
        ),
        (
            named("RefreshError", "invalid_grant", retryable=False),
            "gs://b/a",
            "); credentials come from GOOGLE_APPLICATION",
        ),
        (
            named("HttpError", "Invalid Credentials, 401", code=401),
            "gcs://b/a",
            "); credentials come from GOOGLE_APPLICATIO",
        ),
        (
            named("HfHubHTTPError", "x", response=named("R", "", status_code=403)()),
            "hf://a",
            "); credentials come from HF_T",
        ),
        (caused(OSError(errno.EINVAL, "token=hunter2 has expired"), 400), "s3://b/a", "token=… has expired)"),
        (
            caused(OSError(errno.EREMCHG, "use the specified endpoint"), 301),
            "s3://b/a",
            "; the endpoint comes from AWS_E",
        ),
        (
            lambda: ValueError("Invalid endpoint: h:9000"),
            "s3://b/a",
            "h:9000); the endpoint comes from AWS_ENDPOINT_URL",
        ),
        (named("ParamValidationError", "Invalid bucket name"), "s3://b/a", "(Invalid bucket name)"),
    ],
)
def test_what_another_attempt_does_not_mend_is_tried_once(error: Callable[[], Exception], url: str, shown: str) -> None:
    client = Client(error=error)
    assert shown in message(client, url) and client.asked == 1


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (caused(OSError(errno.EBUSY, "Please reduce your request rate"), 503), "(Please reduce your request rate, 5"),
        (caused(TimeoutError("Your socket connection was not read from"), 400), "(Your socket connection was not read"),
        (named("RefreshError", "503 of the metadata server", retryable=True), "(503 of the metadata server, 5"),
        (named("CredentialRetrievalError", "Error when retrieving credentials"), "(Error when retrieving cred"),
        (
            named("ClientPayloadError", "not completed", __cause__=named("LengthError", "", code=400)()),
            "(not completed, 5",
        ),
        (named("ProxyError", "", __cause__=OSError("bad gateway")), "(bad gateway, 5 attempts)"),
        (named("Unknown", ""), "(Unknown, 5 attempts)"),
    ],
)
def test_what_may_pass_is_repeated(error: Callable[[], Exception], shown: str) -> None:
    client = Client(error=error)
    assert shown in message(client) and client.asked == 5


def test_empty_file_is_empty() -> None:
    """A range of no bytes cannot be asked for."""
    assert store(client := Client()).read("a", 0, 1 << 28) == b"" and not client.asked


def test_range_after_the_end_is_empty() -> None:
    client = Client(error=caused(OSError(errno.EINVAL, "The requested range is not satisfiable"), 416))
    assert store(client).read("a", 0, 9) == b""


def test_clients_do_not_write_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    store_of("memory://a")
    logger = logging.getLogger("gcsfs")
    assert any(isinstance(handler, logging.NullHandler) for handler in logger.handlers)
    logger.propagate = False  # pytest's own handlers
    try:
        logger.error("a traceback")
    finally:
        logger.propagate = True
    assert capfd.readouterr().err == ""
