"""Data at s3:// and gs:// through their real clients, against local servers of these protocols; skipped without the packages.

pip install -c constraints.txt -e '.[s3,gcs]' 'moto[s3]' flask flask-cors gcp-storage-emulator
"""

from __future__ import annotations

import contextlib
import os
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch

from selftrans.data.dataset import Dataset
from selftrans.data.streaming import fsspec_store, remote
from selftrans.data.streaming.shard_cache import CacheOptions
from tests.support.served import folder_of

PREFIX, SHARDS = "sets/a", 3
SECRET = "hunter2"
ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>{}</Message></Error>'


class Faults:
    """How a server answers the next requests for a file, in place of its own answer."""

    def __init__(self) -> None:
        self.name, self.status, self.code, self.message, self.left = "", "", "", "", 0
        self.asked = 0

    def next(self, name: str, status: str, code: str, message: str, times: int = 999) -> None:
        self.name, self.status, self.code, self.message, self.left, self.asked = name, status, code, message, times, 0

    def __call__(self, application: Callable[..., Any]) -> Callable[..., Any]:
        def answer(environment: dict[str, Any], start: Callable[..., Any]) -> Any:
            if environment["REQUEST_METHOD"] != "GET" or not self.left or self.name not in environment["PATH_INFO"]:
                return application(environment, start)
            self.left, self.asked = self.left - 1, self.asked + 1
            if self.status == "cut":
                given: list[Any] = []
                body = b"".join(application(environment, lambda *head: given.extend(head)))
                start(*given[:2])
                return [body[: len(body) // 2]]
            text = ERROR.format(self.code, self.message).encode()
            start(self.status, [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))])
            return [text]

        return answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("data") / "a", SHARDS)


@pytest.fixture(scope="module")
def s3_server(folder: Path) -> Iterator[tuple[str, Faults]]:
    pytest.importorskip("s3fs", reason="the extra s3 is not installed")
    boto3 = pytest.importorskip("boto3", reason="moto[s3] is not installed")
    pytest.importorskip("moto", reason="moto[s3] is not installed")
    pytest.importorskip("flask_cors", reason="moto's server needs flask and flask-cors")
    import threading

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: Any) -> None:
            pass

    faults = Faults()
    application = faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
    )
    client.create_bucket(Bucket="bucket")
    for path in folder.iterdir():
        client.put_object(Bucket="bucket", Key=f"{PREFIX}/{path.name}", Body=path.read_bytes())
    client.put_object(Bucket="bucket", Key="empty/manifest.json", Body=b"")
    yield url, faults
    server.shutdown()


@pytest.fixture
def s3(s3_server: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Faults:
    import s3fs

    url, faults = s3_server
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "access")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    s3fs.S3FileSystem.clear_instance_cache()
    faults.left = 0
    return faults


def opened(url: str, cache: Path) -> Dataset:
    return Dataset.open(url, cache=CacheOptions(str(cache), 1))


def refused(url: str, cache: Path) -> str:
    with pytest.raises(ValueError, match=r"s3://|gs://") as error:
        opened(url, cache)
    assert "\n" not in str(error.value) and SECRET not in str(error.value)
    return str(error.value)


def same_as(folder: Path, dataset: Dataset) -> None:
    rows, local = np.arange(10 * SHARDS), Dataset.open(folder)
    assert np.array_equal(dataset.labels, local.labels)
    assert torch.equal(dataset.read(rows)["moments"], local.read(rows)["moments"])


def test_s3_gives_what_the_folder_holds(s3: Faults, folder: Path, tmp_path: Path) -> None:
    dataset = opened(f"s3://bucket/{PREFIX}", tmp_path)
    same_as(folder, dataset)
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) >= SHARDS and not any(SECRET.encode() in path.read_bytes() for path in kept)


def test_s3_ranges_make_the_same_files(s3: Faults, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(fsspec_store, "RANGE", 4096)
    same_as(folder, opened(f"s3://bucket/{PREFIX}", tmp_path))


@pytest.mark.parametrize(
    ("status", "code", "message", "times"),
    [
        ("503 Slow Down", "SlowDown", "Please reduce your request rate.", 2),
        ("500 Internal Server Error", "InternalError", "Please try again.", 2),
        ("cut", "", "", 2),
    ],
)
def test_s3_that_recovers(
    s3: Faults, folder: Path, tmp_path: Path, status: str, code: str, message: str, times: int
) -> None:
    s3.next("shard-00001", status, code, message, times)
    same_as(folder, opened(f"s3://bucket/{PREFIX}", tmp_path))
    assert s3.asked == times


@pytest.mark.parametrize(
    ("url", "fault", "message"),
    [
        ("s3://bucket/none", None, "no manifest.json at s3://bucket/none: not prepared"),
        ("s3://none/none", None, "no manifest.json at s3://none/none: not prepared"),
        ("s3://bucket/empty", None, "s3://bucket/empty: manifest.json is not valid JSON"),
        (
            f"s3://bucket/{PREFIX}",
            ("shard-00002", "403 Forbidden", "AccessDenied", "Access Denied"),
            "shard-00002.safetensors cannot be read (Access Denied); credentials come from AWS_PROFILE",
        ),
        (
            f"s3://bucket/{PREFIX}",
            ("manifest", "403 Forbidden", "SignatureDoesNotMatch", "Check your key"),
            "manifest.json cannot be read (Check your key); credentials come from AWS_PROFILE",
        ),
        (
            f"s3://bucket/{PREFIX}",
            ("manifest", "400 Bad Request", "ExpiredToken", "The provided token has expired"),
            "manifest.json cannot be read (The provided token has expired); credentials come from AWS_PROFILE",
        ),
    ],
)
def test_s3_that_refuses(
    s3: Faults, tmp_path: Path, url: str, fault: tuple[str, str, str, str] | None, message: str
) -> None:
    if fault:
        s3.next(*fault)
    assert message in refused(url, tmp_path)
    assert s3.asked <= 1 or fault is None


def test_s3_without_credentials(s3: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "(Unable to locate credentials); credentials come from" in refused(f"s3://bucket/{PREFIX}", tmp_path)


def test_private_s3_bucket_read_anonymously_by_the_configuration_of_fsspec(
    s3: Faults, s3_server: tuple[str, Faults], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec.config

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True, "endpoint_url": s3_server[0]})
    assert "manifest.json cannot be read (Forbidden); credentials come from" in refused(
        f"s3://bucket/{PREFIX}", tmp_path
    )


def test_s3_object_that_changed_after_the_manifest(s3: Faults, tmp_path: Path, folder: Path) -> None:
    import boto3

    dataset = opened(f"s3://bucket/{PREFIX}", tmp_path)
    key = f"{PREFIX}/shard-00001.safetensors"
    content = (folder / "shard-00001.safetensors").read_bytes()
    client = boto3.client("s3", region_name="us-east-1")
    client.put_object(Bucket="bucket", Key=key, Body=content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.raises(ValueError, match=r"00001\.safetensors cannot be read \(its sha256 is not the manifest's"):
            dataset.read(np.array([10]))
    finally:
        client.put_object(Bucket="bucket", Key=key, Body=content)


def test_gs_gives_what_the_folder_holds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    gcsfs = pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="gcp-storage-emulator is not installed")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        url = "http://{}:{}".format(*server._api._httpd.server_address[:2])
        for path in folder.iterdir():
            name = quote(f"{PREFIX}/{path.name}", safe="")
            to = f"{url}/upload/storage/v1/b/bucket/o?uploadType=media&name={name}"
            urllib.request.urlopen(urllib.request.Request(to, data=path.read_bytes(), method="POST")).close()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        gcsfs.GCSFileSystem.clear_instance_cache()
        capfd.readouterr()
        same_as(folder, opened(f"gs://bucket/{PREFIX}", tmp_path))
        assert "no manifest.json at gs://bucket/none: not prepared" in refused("gs://bucket/none", tmp_path)
        assert "bucket type" not in capfd.readouterr().err  # what gcsfs writes for each request
    finally:
        with contextlib.suppress(Exception):
            server.stop()
