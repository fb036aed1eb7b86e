"""Prepared data at a URL read the same as on this machine; fetched whole, checked, kept within the bound of the cache."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save

from selftrans.data.buckets import is_prepared, open_data
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import data_latents
from selftrans.data.manifest import FeatureFile, Features, Manifest
from selftrans.data.manifest_text import COUNT
from selftrans.data.on_device import OnDevice
from selftrans.data.shard_file import write_shard
from selftrans.data.streaming import remote
from selftrans.data.streaming.shard_cache import CacheOptions
from selftrans.data.streaming.streamed import Streamed
from selftrans.storage import sha256_file
from tests.support import captioned, ratios
from tests.support.damage import flip
from tests.support.processes import LONGEST
from tests.support.served import ROWS, folder_of, serving

SHARDS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("data") / "a", SHARDS)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)


def opened(url: str, cache: Path, shards: float = 100) -> Streamed:
    """The data with a cache of so many shards (each of 9.3 kB)."""
    size = ROWS * (4 * 64 * 2 + 8) + 4096
    dataset = open_data(url, cache=CacheOptions(str(cache), shards * size / 1e9))
    assert isinstance(dataset, Streamed)
    return dataset


def fetched(asked: list[str]) -> list[str]:
    return [name for name in asked if name.startswith("shard") and "bytes" not in name]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONGEST
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("ranges", [True, False])
def test_streamed_data_are_those_of_the_folder(folder: Path, tmp_path: Path, ranges: bool) -> None:
    local = Dataset.open(folder)
    with serving(folder, ranges=ranges) as server:
        dataset = opened(server.url, tmp_path)
        assert not fetched(server.asked) or not ranges
        assert np.array_equal(dataset.labels, local.labels) and dataset.manifest == local.manifest
        assert dataset.origin == server.url and dataset.names == local.names and is_prepared(server.url)
        rows = np.array([59, 0, 31, 30, 0])
        for name, tensor in dataset.read(rows).items():
            assert torch.equal(tensor, local.read(rows)[name])
        rebuild, arguments, _ = dataset.__reduce__()
        assert torch.equal(rebuild(*arguments).read(rows)["moments"], local.read(rows)["moments"])
        assert np.array_equal(dataset.some_rows(7), local.some_rows(7))
        count = len(server.asked)
        again = opened(server.url, tmp_path)
        again.read(rows)
        assert server.asked[count:] == ["manifest.json bytes=0-268435456"]  # all else is in the cache


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_file_systems_of_fsspec(folder: Path, tmp_path: Path, protocol: str) -> None:
    url = folder.as_uri()
    if protocol == "memory":
        import fsspec

        url = "memory://bucket/prefix"
        fsspec.filesystem("memory").put(f"{folder}/", "/bucket/prefix/", recursive=True)
    rows = np.arange(60)
    assert torch.equal(opened(url, tmp_path).read(rows)["moments"], Dataset.open(folder).read(rows)["moments"])


def test_cache_stays_within_its_bound_and_in_order(folder: Path, tmp_path: Path) -> None:
    local = Dataset.open(folder)
    with serving(folder) as server:
        dataset = opened(server.url, tmp_path, shards=3.5)
        most = 0
        for start in range(0, 60, 5):
            rows = np.arange(start, start + 5)
            assert torch.equal(dataset.read(rows)["moments"], local.read(rows)["moments"])
            most = max(most, sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")))
        assert most <= dataset.reader.cache.limit
        until(lambda: dataset.reader._workers == 0)
        assert sorted(set(fetched(server.asked))) == [f"shard-{k:05d}.safetensors" for k in range(SHARDS)]
        with pytest.raises(ValueError, match="outside"):
            dataset.read(np.array([60]))


def test_rows_for_measurements_do_not_depend_on_the_cache(folder: Path, tmp_path: Path) -> None:
    local, dataset = Dataset.open(folder), opened(folder.as_uri(), tmp_path, shards=1.5)
    for found, expected in zip(data_latents(dataset, 40), data_latents(local, 40), strict=True):
        assert torch.equal(found, expected)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


@pytest.mark.parametrize(("stale", "what"), [("labels", "labels"), (COUNT, "numbers of captions")])
def test_index_of_other_shards_is_refused_once(tmp_path: Path, stale: str, what: str) -> None:
    url, local = captioned.shared().as_uri(), Dataset.open(captioned.shared())
    opened(url, tmp_path)
    (index,) = tmp_path.glob("sets/*/index-*.safetensors")
    index.rename(index.with_name("index-of-an-earlier-manifest.safetensors"))
    opened(url, tmp_path)
    (index,) = tmp_path.glob("sets/*/index-*.safetensors")
    kept = load_file(index)
    kept[stale][1] += 1
    index.write_bytes(save(kept))
    with pytest.raises(ValueError, match=f"shard-00000.safetensors has other {what} than .*; repeat the command$"):
        opened(url, tmp_path).read(np.arange(2))
    repeated = opened(url, tmp_path)
    assert torch.equal(repeated.read(np.arange(2))["moments"], local.read(np.arange(2))["moments"])
    assert np.array_equal(repeated.labels, local.labels) and np.array_equal(repeated.counts, local.counts)


def test_stored_features_of_data_on_the_device_are_fetched(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", 2)
    manifest = Manifest.load(folder)
    values = np.random.default_rng(0).standard_normal((2, ROWS, 1, 4, 3)).astype(np.float16)
    plan, files = Features("encoder", "0" * 64, "float32", 2, 3, "1" * 64, ()), []
    for k in range(2):
        path = folder / FeatureFile(k, "").name
        with write_shard(path, plan.layout(manifest), ROWS) as rows:
            rows.write({"features": values[k]})
        files.append(FeatureFile(k, sha256_file(path)))
    options = manifest.options | {"fingerprint": plan.fingerprint}
    described = replace(manifest, options=options, features=replace(plan, files=tuple(files)))
    (folder / "manifest.json").write_text(described.to_json())
    dataset, held = opened(folder.as_uri(), tmp_path / "cache"), (tmp_path / "cache").glob
    dataset.fetch(progress=False)
    on_device = OnDevice(dataset, "cpu")
    assert len(list(held("*.safetensors"))) == 2, "features are fetched if they are read"
    assert on_device.origin == folder.as_uri() and on_device.open_features().width == 3
    assert len(list(held("*.safetensors"))) == 4, "before the first step, as the shards are"
    read = on_device.read(np.array([13, 2]))
    assert np.array_equal(read["features"].numpy(), values[[1, 0], [3, 2]])
    one = opened(folder.as_uri(), tmp_path / "other").dry_run_data()
    assert OnDevice(one, "cpu").open_features().width == 3 and np.array_equal(
        one.read(np.array([13, 2]), ["features"])["features"].numpy(), values[[0, 0], [3, 2]]
    )
    assert len(list((tmp_path / "other").glob("*.safetensors"))) == 2, "one shard and its features"


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), RuntimeError("of a store")])
def test_thread_that_fetches_ahead_ends_in_order_after_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    dataset = opened(folder.as_uri(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(dataset.reader.cache, "obtain", Mock(side_effect=error))
        dataset.prefetch((0, 1), ())
        until(lambda: dataset.reader._workers == 0)
    dataset.prefetch((0, 1), ())
    until(lambda: len(list(tmp_path.glob("*.safetensors"))) == 2)


def test_expected_shards_are_fetched_ahead_and_others_released(folder: Path, tmp_path: Path) -> None:
    with serving(folder) as server:
        dataset = opened(server.url, tmp_path, shards=4)
        dataset.prefetch((4, 1), (3,))
        names = [dataset.manifest.shards[k].sha256 for k in (4, 1, 3)]
        until(lambda: all((tmp_path / f"{name}.safetensors").is_file() for name in names))
        count = len(server.asked)
        dataset.read(np.array([40, 15, 39]))
        assert len(server.asked) == count
        dataset.prefetch((3,), (0, 2, 5))
        until(lambda: len(list(tmp_path.glob("*.safetensors"))) == 4 and dataset.reader._workers == 0)
        kept = {path.stem for path in tmp_path.glob("*.safetensors")}
        assert kept == {dataset.manifest.shards[k].sha256 for k in (3, 0, 2, 5)}


def test_fetch_brings_all_shards(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(folder) as server:
        dataset = opened(server.url, tmp_path)
        dataset.fetch()
        assert len(list(tmp_path.glob("*.safetensors"))) == SHARDS and sorted(fetched(server.asked)) == sorted(
            f"shard-{k:05d}.safetensors" for k in range(SHARDS)
        )
        assert "fetching data" in capsys.readouterr().err
    assert len(dataset.read(np.arange(60))["labels"]) == 60  # the server is gone


def test_damaged_file_at_the_url_is_refused(folder: Path, tmp_path: Path) -> None:
    with serving(folder_of(tmp_path / "a", 2)) as server:
        dataset = opened(server.url, tmp_path / "cache")
        flip(tmp_path / "a" / "shard-00001.safetensors")
        dataset.read(np.arange(10))
        until(lambda: dataset.reader._workers == 0)
        server.asked.clear()
        with pytest.raises(
            ValueError,
            match=r"shard-00001.safetensors cannot be read \(its sha256 is not .*twice\); copy the folder there again$",
        ):
            dataset.read(np.array([10]))
        assert len(server.asked) == 2 and len(list((tmp_path / "cache").glob("*.safetensors"))) == 1


def test_damaged_or_cut_file_in_the_cache_is_fetched_again(folder: Path, tmp_path: Path) -> None:
    url, local = folder.as_uri(), Dataset.open(folder)
    opened(url, tmp_path).read(np.arange(60))
    paths = [tmp_path / f"{shard.sha256}.safetensors" for shard in local.manifest.shards]
    paths[0].write_bytes(paths[0].read_bytes()[:5000])
    assert torch.equal(opened(url, tmp_path).read(np.arange(60))["moments"], local.read(np.arange(60))["moments"])
    flip(paths[1])  # in a number: found by sha256 only
    open_data(url, cache=CacheOptions(str(tmp_path)), verify=True)
    assert not paths[1].exists() and paths[2].exists()


def test_transfer_that_breaks_off_is_repeated(folder: Path, tmp_path: Path) -> None:
    with serving(folder) as server:
        dataset = opened(server.url, tmp_path)
        server.cut = server.failures = 1
        moments = dataset.read(np.array([3]))["moments"]
    assert torch.equal(moments, Dataset.open(folder).read(np.array([3]))["moments"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json at http://.*/a: not prepared"),
        (lambda f: (f / "manifest.json").write_text("{"), "a: manifest.json is not valid JSON"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff"), "a/manifest.json is not text"),
        (
            lambda f: (f / "shard-00001.safetensors").unlink(),
            "shard-00001.safetensors cannot be read \\(it does not exist\\)",
        ),
        (
            lambda f: (f / "shard-00001.safetensors").write_bytes(bytes(100)),
            "shard-00001.*cannot be used \\(its header",
        ),
        (lambda f: (f / "buckets.json").write_text("{}"), None),
    ],
)
def test_wrong_data_at_a_url_are_one_line(
    tmp_path: Path, change: Callable[[Path], object], message: str | None
) -> None:
    change(folder_of(tmp_path / "a", 2))
    with serving(tmp_path / "a") as server:
        if message is None:
            assert len(opened(server.url, tmp_path / "cache")) == 20
            return
        with pytest.raises(ValueError, match=message) as error:
            opened(server.url, tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_label_outside_the_classes_is_refused_when_opened(tmp_path: Path) -> None:
    folder_of(tmp_path / "a", 2)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    manifest["classes"], manifest["conditions"]["num_classes"] = ["one"], 1
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="label 1 at row 0"):
        opened((tmp_path / "a").as_uri(), tmp_path / "cache")


def test_captions_and_buckets(tmp_path: Path) -> None:
    rows = np.array([3, 0, 9])
    local = Dataset.open(captioned.shared())
    dataset = opened(captioned.shared().as_uri(), tmp_path)
    assert dataset.captions(rows) == local.captions(rows) and dataset.prompts == local.prompts
    for name, tensor in dataset.read(rows, which=local.counts[rows] - 1).items():  # type: ignore[index]
        assert torch.equal(tensor, local.read(rows, which=local.counts[rows] - 1)[name])  # type: ignore[index]
    assert torch.equal(dataset.null()["text"], local.null()["text"])  # type: ignore[index]
    buckets, url = open_data(ratios.shared()), ratios.shared().as_uri()
    streamed = open_data(url, cache=CacheOptions(str(tmp_path)))
    assert streamed.parts == buckets.parts and streamed.origin == url
    assert torch.equal(streamed.read(np.arange(2))["moments"], buckets.read(np.arange(2))["moments"])
    whole = open_data(url, cache=CacheOptions(str(tmp_path / "c")))
    copied = pickle.loads(pickle.dumps(whole))
    assert [bucket.reader.cache.folder for bucket in copied.buckets] == 3 * [tmp_path / "c"]  # type: ignore[attr-defined]
    one = whole.dry_run_data()
    assert one.parts == buckets.parts and one.shapes == buckets.shapes and one.origin == url
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 3, "the shard of each bucket"
    assert torch.equal(one.read(np.arange(8, 10))["moments"], buckets.read(np.arange(8, 10))["moments"])
    with pytest.raises(ValueError, match="buckets, which are streamed only if all of them"):
        open_data(url, cache=CacheOptions(str(tmp_path / "b"), 1e-6))
