"""Data at a URL in a run: the cache, and how many shards are shuffled together."""

from __future__ import annotations

from selftrans.config import Data, RunConfig
from selftrans.data.dataset import Dataset
from selftrans.data.shard_cache import CacheOptions
from selftrans.data.streamed import Streamed
from selftrans.data.windows import SHARE_OF_CACHE, classes_in_a_window, window_that_fits
from selftrans.storage import plural, printable


def cache_of(data: Data) -> CacheOptions:
    """Where the data of these settings are cached."""
    return CacheOptions(data.cache_dir, data.cache_gb)


def with_window(config: RunConfig, shards: Dataset, before: RunConfig | None) -> RunConfig:
    """The settings with `data.window` decided: as the run began, as given, or for a new run as the cache needs it.

    ValueError where the cache is too small for the window, and for windows of data of several shapes.
    """
    window = config.data.window
    if window is None and before is not None:
        window = before.data.window
    if window is not None and len(shards.parts) > 1:
        raise ValueError("data.window is for data of one shape, these are buckets; leave it out")
    if isinstance(shards, Streamed):
        window = _fitting(window, shards, new=before is None)
    if window is not None:
        counts = [shard.count for shard in shards.manifest.shards if shard.count]
        rows = sum(sorted(counts)[:window])
        if rows < config.train.batch_size <= len(shards):
            raise ValueError(
                f"{window} of the shards hold {plural(rows, 'row')}, fewer than a batch, {config.train.batch_size}; raise "
                "data.window" + (" and data.cache_gb" if isinstance(shards, Streamed) else "")
            )
    return config.override({"data.window": window})


def _fitting(window: int | None, shards: Streamed, *, new: bool) -> int | None:
    """The window of streamed data; None: all rows, where the cache holds them."""
    reader = shards.reader
    limit, total = reader.cache.limit, sum(reader.bytes)
    if reader.fits:
        return window
    most = window_that_fits(reader.bytes, limit)
    if window is None and not new:
        raise ValueError(
            f"the run shuffles all rows of its data, which need {gigabytes(total)} in the cache, not {gigabytes(limit)}; raise "
            "--data.cache-gb"
        )
    if (window or 1) > most:
        needed = SHARE_OF_CACHE * (window or 1) * max(reader.bytes)
        raise ValueError(
            f"windows of {plural(window or 1, 'shard')} need {gigabytes(needed)} in the cache, not {gigabytes(limit)}; raise "
            "--data.cache-gb"
        )
    return window or most


def describe_data(config: RunConfig, shards: Dataset) -> str | None:
    """What is fetched, and how its rows are shuffled, for a reader; None for data on this machine."""
    if not isinstance(shards, Streamed):
        return None
    reader, window, number = shards.reader, config.data.window, len(shards.manifest.shards)
    text = (
        f"data: {plural(number, 'shard')}, {gigabytes(sum(reader.bytes))}, of {printable(shards.origin)}; cache "
        f"{reader.cache.folder}, "
        f"{gigabytes(reader.cache.limit)}"
    )
    if window is None:
        return f"{text}: all of them, shuffled over all rows"
    counts = [shard.count for shard in shards.manifest.shards]
    text += f": rows are shuffled within windows of {plural(window, 'shard')}"
    if shards.manifest.num_classes > 1:
        text += f", each with {classes_in_a_window(shards.labels, counts, window):.0%} of the classes on average"
    return text


def gigabytes(size: float) -> str:
    """`21.0 GB`, `3.2 MB`, `74.8 kB`."""
    unit, scale = ("GB", 1e9) if size >= 1e8 else ("MB", 1e6) if size >= 1e6 else ("kB", 1e3)
    return f"{size / scale:.1f} {unit}"
