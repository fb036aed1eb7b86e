"""Single rows of data at a URL are those of the folder, and no shard is fetched for them."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from selftrans.data.buckets import open_data
from selftrans.data.dataset import Dataset
from selftrans.data.manifest import Manifest
from selftrans.data.shard_file import open_tensors
from selftrans.data.streaming.remote import store_of
from selftrans.data.streaming.remote_rows import RandomAccess, RemoteRows, RemoteShard
from selftrans.data.streaming.shard_cache import CacheOptions
from selftrans.sampling.conditioning import CaptionConditioning
from tests.support import captioned
from tests.support.processes import LONGEST
from tests.support.served import serving


@pytest.mark.parametrize(("ranges", "store"), [(True, "tokens"), (False, "ids")])
def test_prompts_do_not_depend_on_the_cache_and_fetch_no_shard(tmp_path: Path, ranges: bool, store: str) -> None:
    folder, found = captioned.prepared(tmp_path, shard_size=3, store=store), []
    with serving(folder, ranges=ranges) as server:
        small = open_data(server.url, cache=CacheOptions(str(tmp_path / "cache"), 1e-6))
        large = open_data(server.url, cache=CacheOptions(str(tmp_path / "large")))
        for data in (Dataset.open(folder), small, large):
            data.ready("cpu")
            conditioning = CaptionConditioning(data.random_access, rows=data.prompt_rows[:6])
            found.append((data.prompts, conditioning.texts(np.arange(8)), conditioning.of(np.arange(8))))
        copied = pickle.loads(pickle.dumps(small.random_access))
        assert type(copied) is RandomAccess and copied.captions(np.arange(2)) == Dataset.open(folder).captions(
            np.arange(2)
        )
        assert not list((tmp_path / "cache").glob("*.safetensors"))
        again = open_data(server.url, cache=CacheOptions(str(tmp_path / "cache"), 1e-6)).random_access
        (folder / "shard-00000.safetensors").write_bytes(bytes(100))
        with pytest.raises(
            ValueError, match=r"shard-00000.safetensors cannot be used \(its header .*\); copy the folder"
        ):
            again.captions(np.array([0]))
    (prompts, texts, (cond, rows)), *others = found
    for own_prompts, own_texts, (own, own_rows) in others:
        assert own_prompts == prompts and len(prompts) == 8 and own_texts == texts and np.array_equal(own_rows, rows)
        assert all(torch.equal(own[name], tensor) for name, tensor in cond.items())


def test_rows_and_entries_are_those_of_the_file_and_are_read_once() -> None:
    folder = captioned.shared()
    manifest = Manifest.load(folder)
    stored = open_tensors(folder / manifest.shards[0].file, manifest.layout, manifest.count)
    rows, entries = np.array([9, 0, 9]), np.array([0, 2, 1])
    with serving(folder) as server:
        shard = RemoteShard(store_of(server.url), manifest, manifest.shards[0])
        for name, tensor in stored.items():
            assert np.array_equal(RemoteRows(shard, name)[rows], tensor[rows])
        assert np.array_equal(RemoteRows(shard, "text")[rows, entries], stored["text"][rows, entries])
        count = len(server.asked)
        assert count == 1 + 2 * len(stored) + 3, "the header once, each row and each entry once"
        assert np.array_equal(RemoteRows(shard, "text")[rows, entries], stored["text"][rows, entries])
        assert len(server.asked) == count


@pytest.mark.parametrize("ranges", [True, False])
def test_shard_without_ranges_is_asked_for_once_for_all_rows(ranges: bool, tmp_path: Path) -> None:
    folder = captioned.shared()
    local, rows = Dataset.open(folder), np.array([9, 0, 4, 9])
    with serving(folder, ranges=ranges) as server:
        data = open_data(server.url, cache=CacheOptions(str(tmp_path), 1e-6)).random_access
        server.asked.clear()
        assert data.captions(rows) == local.captions(rows)
        assert len(server.asked) == (1 + 3 if ranges else 1 + 1), "the header, and rows"
        assert torch.equal(data.read(rows, ["text"])["text"], local.read(rows, ["text"])["text"])
        assert len(server.asked) == (1 + 6 if ranges else 1 + 2)


def test_rows_are_read_at_the_same_time(tmp_path: Path) -> None:
    folder, barrier = captioned.shared(), threading.Barrier(4, timeout=LONGEST)
    with serving(folder) as server:
        data = open_data(server.url, cache=CacheOptions(str(tmp_path), 1e-6)).random_access
        assert isinstance(data, RandomAccess) and data.captions(np.array([0]))
        store = data._shards[0].store
        whole = store.parts

        def parts(name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
            barrier.wait()
            return whole(name, spans)

        store.parts = parts  # type: ignore[method-assign]
        assert data.captions(np.arange(1, 5)) == Dataset.open(folder).captions(np.arange(1, 5))


@pytest.mark.parametrize(("new", "asked"), [(1, [2]), (7, [2, 2, 4]), (8, [2, 2, 4, 2])])
def test_prompts_are_the_first_different_captions_of_a_fixed_order(
    new: int, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ten rows, where only row `new` of the order has another caption: no more rows are read than needed, and all if so."""
    data, counted = Dataset.open(captioned.shared()), list[int]()
    order = np.random.default_rng(0).permutation(len(data))[:10]
    monkeypatch.setattr("selftrans.data.dataset.PROMPTS", 2)
    monkeypatch.setattr(Dataset, "some_rows", lambda self, most: order)

    def captions(self: Dataset, rows: np.ndarray) -> list[list[str]]:
        counted.append(len(rows))
        return [["another" if row == order[new] else "same"] for row in rows]

    monkeypatch.setattr(Dataset, "captions", captions)
    assert data.prompts == ("same", "another") and counted == asked
    assert data.prompt_rows.tolist() == [order[0], order[new]]
