"""Files at a URL: secrets never shown, retries with an end, stores with and without ranges."""

from __future__ import annotations

import errno
import io
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from selftrans.data.streaming import remote
from selftrans.data.streaming.fsspec_store import FsspecStore
from selftrans.data.streaming.remote import HttpStore, checked, cleaned, is_url, retried, store_of
from tests.support.served import serving


def test_what_is_a_url() -> None:
    assert is_url("s3://bucket/prefix") and is_url("https://host/a") and is_url("memory://a")
    assert not any(map(is_url, ("data/a", "/data/a", "C:/data", "a:b", Path("s3:/bucket"), "")))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/a b", "s3://bucket/a b"),
        ("https://me:pass@host:8080/x", "https://host:8080/x"),
        ("https://me:p@ss@host/x", "https://host/x"),
        ("https://me:p/ss@host/x", "https://…"),
        ("https://token@host/x", "https://host/x"),
        ("403, url='https://host/x?X-Amz-Signature=abc&b=1#frag' end", "403, url='https://host/x?…' end"),
        ("s3://b/x?versionId=1", "s3://b/x?…"),
        ("token=abc secret: def, other=1", "token=… secret: … other=1"),
        ("aws_secret_access_key=abc", "aws_secret_access_key=…"),
        ("Authorization: Bearer abc", "Authorization: …"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
        ("zip://a/b::s3://k:s@b/x.zip", "zip://a/b::s3://b/x.zip"),
        ("zip://a::s3://k:s@b", "zip://a::s3://b"),
        ("s3://b,s3://k:s@c/x", "s3://b,s3://c/x"),
        ("s3://me:pa://s@host/x", "s3://…pa://host/x"),
    ],
)
def test_secrets_are_left_out(text: str, shown: str) -> None:
    assert cleaned(text) == shown and cleaned(shown) == shown


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("https://me:hunter2@host/x", "user or password"),
        ("https://host/x?token=hunter2", "query"),
        ("https://host/x;token=hunter2", "query"),
        ("https://host/x#hunter2", r"fragment \(#\)"),
        ("s3://hunter2@b/x#hunter2", "user or password"),
        ("s3://me:8#hunter2@b/x", "user or password"),
        ("zip://a/b::s3://k:hunter2@b/x.zip", "user or password"),
        ("s3://b/x,s3://k:hunter2@c", "user or password"),
        ("zip://a::https://b/x.zip?token=hunter2", "query"),
    ],
)
def test_urls_with_credentials_are_refused_without_repeating_them(url: str, part: str) -> None:
    with pytest.raises(ValueError, match=f"a URL with a {part} is refused") as error:
        checked(url)
    assert "hunter2" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["file:///data/run#1", "s3://bucket/class_token:8/x", "zip://a::s3://b/x.zip", "http://[::1]:80/x"]
)
def test_urls_without_secrets_pass(url: str) -> None:
    assert checked(url) == url


@pytest.mark.parametrize("url", ["s3://", "http:///", "s3://a/../b", "s3://a/\x1b[31m"])
def test_urls_that_name_no_folder_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="names no folder"):
        checked(url)


def test_final_slash_and_case_of_the_protocol_do_not_matter() -> None:
    assert checked("S3://Bucket/Data/") == "s3://Bucket/Data"


def test_unknown_protocol_and_missing_package_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"nothing://a cannot be read .*prepare") as error:
        store_of("nothing://a")
    assert "\n" not in str(error.value)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"s3:// needs a package that is not installed: `pip install .*\[s3\]'`$"):
        store_of("s3://bucket/a")


@pytest.mark.parametrize("ranges", [True, False])
def test_stores_read_parts_and_whole_files(tmp_path: Path, ranges: bool) -> None:
    content = bytes(range(256)) * 9
    (tmp_path / "a.bin").write_bytes(content)
    (tmp_path / "copy").write_bytes(b"")
    with serving(tmp_path, ranges=ranges) as server:
        for store in (store_of(server.url), store_of(tmp_path.as_uri())):
            assert store.read("a.bin", 3, 700) == content[3:700]
            assert store.read("a.bin", 0, 1 << 20) == content
            store.download("a.bin", tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == content
            with pytest.raises(FileNotFoundError):
                store.read("missing", 0, 1)
    assert isinstance(store_of("http://host/a"), HttpStore) and isinstance(store_of("memory://a"), FsspecStore)


def test_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(4 << 20))
    (tmp_path / "copy").write_bytes(b"")
    with serving(tmp_path) as server:
        server.cut = 1
        with pytest.raises(Exception, match=r"missing|IncompleteRead|reset"):
            store_of(server.url).download("a.bin", tmp_path / "copy")


def test_temporary_errors_are_retried_and_lasting_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    (tmp_path / "a").write_bytes(b"abc")
    with serving(tmp_path) as server:
        store, what = store_of(server.url), f"{server.url}/a?token=hunter2"
        server.failures = 3
        assert retried(lambda: store.read("a", 0, 3), what) == b"abc"
        assert len(waits) == 3 and all(2.5 * a > b > 1.1 * a for a, b in itertools.pairwise(waits))
        server.failures = 99
        with pytest.raises(
            ValueError, match=r"cannot be read \(HTTP Error 503.*5 attempts\); the same command tries again$"
        ) as error:
            retried(lambda: store.read("a", 0, 3), what)
        assert "hunter2" not in str(error.value)
        server.failures, server.status, count = 0, 403, len(server.asked)
        with pytest.raises(ValueError, match=r"cannot be read .*403.*\); http and https are read without credentials$"):
            retried(lambda: store.read("a", 0, 3), what)
        assert len(server.asked) == count + 1
        server.status = 0
        with pytest.raises(
            ValueError, match=r"missing cannot be read \(it does not exist\); copy the folder there again$"
        ):
            retried(lambda: store.read("missing", 0, 3), f"{server.url}/missing")
    with pytest.raises(ValueError, match=r"cannot be read .*refused"):
        retried(lambda: store.read("a", 0, 3), server.url)


@pytest.mark.parametrize("parse", [lambda: json.loads("<html>"), lambda: b"\xff".decode()])
def test_answer_of_a_gateway_is_asked_for_again(parse: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match="5 attempts"):
        retried(parse, "gs://b/a")


@pytest.mark.parametrize(("kind", "code"), [(PermissionError, errno.EACCES), (FileNotFoundError, errno.ENOENT)])
def test_error_of_the_cache_names_its_file(kind: type[OSError], code: int) -> None:
    for path in ("/cache/a", Path("/cache/a")):

        def work(path: str | Path = path) -> None:
            raise kind(code, "not there", path)

        with pytest.raises(
            ValueError, match=r"^/cache/a cannot be used \(not there\) for s3://b/a; .*--data.cache-dir$"
        ):
            retried(work, "s3://b/a")


class Answer(io.BytesIO):
    """A whole file, as a web server without ranges sends it, and the most that was asked for at a time."""

    status, length, most = 200, 0, 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.most = max(self.most, -1 if size is None else size)
        return super().read(size)


def test_start_of_a_file_without_ranges_is_passed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    content, answers = bytes(range(256)) * 40, []

    def opened(*_: object, **__: object) -> Answer:
        answers.append(Answer(content))
        return answers[-1]

    monkeypatch.setattr(remote, "PIECE", 1000)
    monkeypatch.setattr(remote.urllib.request, "urlopen", opened)
    store = HttpStore("http://host/a")
    assert store.ranges and store.read("a", 9000, 9100) == content[9000:9100] and not store.ranges
    assert store.parts("a", [(0, 5), (8000, 8003), (10239, 10250)]) == [content[:5], content[8000:8003], content[-1:]]
    assert len(answers) == 2 and all(0 < answer.most <= 1000 for answer in answers)
