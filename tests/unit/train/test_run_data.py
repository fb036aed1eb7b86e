"""Data at a URL in a run: what is shuffled together, that a run keeps it, and that it resumes exactly."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selftrans.config import RunConfig
from selftrans.data.buckets import open_data
from selftrans.data.dataset import Dataset
from selftrans.data.streaming.shard_cache import CacheOptions
from selftrans.train.batches import Stream
from selftrans.train.run import train
from selftrans.train.run_data import describe_data, with_window
from tests.support import ratios, toy
from tests.support.served import ROWS, folder_of

SIZE = ROWS * (4 * 64 * 2 + 8) + 4096  #: bytes of a shard


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("data") / "a", 8)


def config(**dotted: Any) -> RunConfig:
    small = {"model.width": 16, "model.depth": 2, "stage1.block": 1, "train.batch_size": 4, "method": "vanilla"}
    quiet = {"train.preview_every": 0, "log.every": 1, "log.tensorboard": False, "train.steps": 6}
    return toy.toy(small | quiet | {"data.builtin": None} | dotted)


def opened(folder: Path, cache: Path, shards: float) -> Dataset:
    return open_data(folder.as_uri(), cache=CacheOptions(str(cache), shards * SIZE / 1e9))


def test_window_is_decided_by_the_cache(folder: Path, tmp_path: Path) -> None:
    local, new = Dataset.open(folder), config()
    assert with_window(new, local, None).data.window is None and describe_data(new, local) is None
    large, small = opened(folder, tmp_path / "a", 8.1), opened(folder, tmp_path / "b", 6.5)
    assert with_window(new, large, None).data.window is None
    assert "8 shards, 74.4 kB" in (said := describe_data(new, large) or "") and "shuffled over all rows" in said
    settled = with_window(new, small, None)
    assert settled.data.window == 2
    assert "within windows of 2 shards, each with 25% of the classes on average" in (
        describe_data(settled, small) or ""
    )
    assert with_window(new, large, settled).data.window == 2  # as it began, with whatever cache
    assert with_window(config(**{"data.window": 1}), small, None).data.window == 1


@pytest.mark.parametrize(
    ("cache", "window", "resumed", "message"),
    [
        (
            6.5,
            None,
            True,
            "shuffles all rows of its data, which need 74.4 kB in the cache, not 60.4 kB; raise --data.cache-gb",
        ),
        (6.5, 3, False, "windows of 3 shards need 83.7 kB in the cache"),
        (2.5, None, False, "windows of 1 shard need 27.9 kB in the cache"),
    ],
)
def test_too_small_a_cache_is_refused(
    folder: Path, tmp_path: Path, cache: float, window: int | None, resumed: bool, message: str
) -> None:
    given = config(**{"data.window": window})
    with pytest.raises(ValueError, match=re.escape(message)):
        with_window(given, opened(folder, tmp_path, cache), given if resumed else None)


def test_window_smaller_than_a_batch_and_buckets_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"1 of the shards hold 10 rows, fewer than a batch, 16; raise data.window"):
        with_window(config(**{"data.window": 1, "train.batch_size": 16}), Dataset.open(folder), None)
    with pytest.raises(ValueError, match="these are buckets"):
        with_window(config(**{"data.window": 1}), open_data(ratios.shared()), None)


class Watched(Dataset):
    asked: list[tuple[tuple[int, ...], tuple[int, ...]]]

    def prefetch(self, now: Any, then: Any) -> None:
        self.asked.append((tuple(now), tuple(then)))


def test_stream_reads_windows_and_says_which_shards_come(folder: Path) -> None:
    data = Watched.open(folder)
    assert isinstance(data, Watched)
    data.asked = []
    stream = Stream(data, batch_size=10, accumulate=1, seed=1, window=2)
    batches = stream.from_step(0)
    rows = [next(batches).rows for _ in range(16)]  # two epochs of 80 rows
    for epoch in (rows[:8], rows[8:]):
        assert np.array_equal(np.sort(np.concatenate(epoch)), np.arange(80))
    shards = [set((each // ROWS).tolist()) for each in rows]
    windows = [frozenset(now) for now, _ in data.asked[:8]]
    assert all(shards[i] | shards[i + 1] == windows[i // 2] for i in range(0, 16, 2))
    assert [then for _, then in data.asked[:7]] == [now for now, _ in data.asked[1:8]]
    later = Stream(data, batch_size=10, accumulate=1, seed=1, window=2)
    assert np.array_equal(later.indices(11, 0), rows[11]) and np.array_equal(later.all_indices(3), rows[3])
    halves = [
        Stream(data, batch_size=10, accumulate=1, seed=1, window=2, rank=r, world=2).indices(5, 0) for r in (0, 1)
    ]
    assert np.array_equal(np.concatenate(halves), rows[5])


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "vanilla" / "log.jsonl").read_text().splitlines()]


def test_streamed_run_equals_the_local_one_and_resumes_exactly(folder: Path, tmp_path: Path) -> None:
    url = {"data.path": folder.as_uri(), "data.cache_dir": str(tmp_path / "cache")}
    small = url | {"data.cache_gb": 6.5 * SIZE / 1e9}
    train(config(**{"data.path": str(folder), "data.window": 2}), tmp_path / "local", quiet=True)
    train(config(**small), tmp_path / "streamed", quiet=True)
    train(config(**small, **{"train.steps": 3}), tmp_path / "resumed", quiet=True)
    train(config(**url), tmp_path / "resumed", quiet=True)  # with a cache that would hold all
    assert losses(tmp_path / "local") == losses(tmp_path / "streamed") == losses(tmp_path / "resumed")
    assert json.loads((tmp_path / "resumed" / "config.json").read_text())["data"]["window"] == 2
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors")) <= 6.5 * SIZE
    with pytest.raises(ValueError, match=r"started with other settings: data.window was 2, is 1"):
        train(config(**url, **{"data.window": 1}), tmp_path / "resumed", quiet=True)


def test_fetched_whole_set_is_shuffled_as_the_folder_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = {"data.path": folder.as_uri(), "data.cache_dir": str(tmp_path / "cache"), "train.steps": 3}
    train(config(**url), tmp_path / "streamed")
    assert re.search(r"data: 8 shards, 74.4 kB, of file://.*shuffled over all rows", capsys.readouterr().out)
    train(config(**{"data.path": str(folder), "train.steps": 3}), tmp_path / "local", quiet=True)
    assert losses(tmp_path / "local") == losses(tmp_path / "streamed")
    secret = {"data.path": "https://me:hunter2@host/x"}
    with pytest.raises(ValueError, match="refused") as error:
        train(config(**secret), tmp_path / "secret", quiet=True)
    assert "hunter2" not in str(error.value) and not (tmp_path / "secret").exists()
