"""The data of a run: opened, checked against the settings, and ready for the first step.

For data at a URL also the cache, and the number of shards that are shuffled together.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from selftrans.config import Data, RunConfig
from selftrans.data.buckets import open_data
from selftrans.data.dataset import Dataset
from selftrans.data.manifest import Manifest
from selftrans.data.on_device import OnDevice
from selftrans.data.prepare import prepare_builtin
from selftrans.data.streaming.shard_cache import CacheOptions
from selftrans.data.streaming.streamed import Streamed
from selftrans.data.windows import SHARE_OF_CACHE, classes_in_a_window, window_that_fits
from selftrans.encoders.identity import scales_differ
from selftrans.messages import gigabytes, plural, printable


@dataclass
class Transfer:
    """What a run fetches of data at a URL, on each machine."""

    shards: int  #: of the data
    bytes: int  #: of these shards, with stored features if the run reads them
    cached: int  #: bytes of these shards that the cache holds already
    cache: int  #: bytes that the cache holds at most
    window: int | None  #: shards that are read at a time; None: all are fetched before the first step


def cache_of(data: Data) -> CacheOptions:
    """Where the data of these settings are cached."""
    return CacheOptions(data.cache_dir, data.cache_gb)


def data_of(data: Data) -> Dataset:
    """The prepared data that these settings name. ValueError as `open_data`."""
    return open_data(str(data.path), text_encoder=data.text_encoder, cache=cache_of(data))


def data_of_run(config: RunConfig, out: Path, accelerator: Accelerator | None = None) -> Dataset:
    """The data of the run; built-in data are prepared here. ValueError when they are not what the config expects.

    accelerator: of the processes that share `out`, the first of which prepares the data; None: this process is alone.
    """
    main = accelerator is None or accelerator.is_main_process
    path = config.data.path
    if path is None:
        if config.data.builtin is None:
            raise ValueError(f"recipe {config.recipe} needs --data DIR, a directory made by `selftrans prepare`")
        path = str(out / "data")
        if main:
            prepare_builtin(config.data.builtin, path)
        if accelerator is not None:
            accelerator.wait_for_everyone()
    shards = open_data(
        path,
        verify=config.data.verify and main,
        text_encoder=config.data.text_encoder,
        cache=cache_of(config.data),
    )
    _check_expected(config.data, path, shards.manifest)
    small = sum(size < config.train.batch_size for size in shards.parts)
    if small and len(shards.parts) > 1 and main:
        warnings.warn(
            f"{small} of the {plural(len(shards.parts), 'bucket')} of {path} {'has' if small == 1 else 'have'} fewer "
            f"pictures than the batch, {config.train.batch_size}: a batch of those has some of them more than once",
            stacklevel=3,
        )
    return shards


def _check_expected(expected: Data, path: str, manifest: Manifest) -> None:
    """ValueError where the settings expect another shape, number of classes or autoencoder than the data have."""
    if expected.shape is not None and tuple(expected.shape) != tuple(manifest.shape):
        raise ValueError(f"{path} holds latents {manifest.shape}, but data.shape expects {expected.shape}")
    if expected.classes is not None and expected.classes != manifest.num_classes:
        raise ValueError(
            f"{path} has {plural(manifest.num_classes, 'class')}, but data.classes expects {expected.classes}"
        )
    own = expected.autoencoder
    if own is not None and scales_differ(own, manifest.autoencoder, tolerance=0):
        raise ValueError(
            f"{path} holds latents by {manifest.autoencoder}, which data.autoencoder {own} would decode to other pixels; leave "
            "data.autoencoder out"
        )


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
    """The window of streamed data, in shards; None: all rows, where the cache can hold all shards."""
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


def ready_data(config: RunConfig, shards: Dataset, accelerator: Accelerator, *, quiet: bool = False) -> Dataset:
    """The data ready for training: fetched, unless they are read in windows, and on the device with data.on_device.

    Raises ValueError where they cannot be fetched, and for buckets on the device.
    """
    if (line := describe_data(config, shards)) and not quiet:
        accelerator.print(line)
    if config.data.on_device and len(shards.parts) > 1:
        raise ValueError(f"{shards.path} holds buckets of several sizes; leave data.on_device off")
    if config.data.window is None:
        shards.fetch(progress=not quiet)
    shards.ready(accelerator.device)
    return OnDevice(shards, accelerator.device) if config.data.on_device else shards


def describe_data(config: RunConfig, shards: Dataset) -> str | None:
    """One line about the shards that are fetched and how their rows are shuffled; None for data on this machine."""
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


def transfer_of(config: RunConfig, shards: Dataset) -> Transfer | None:
    """What a run of these settings has to fetch; None for data on this machine. Features count if they are open."""
    readers = [part.reader for part in shards.of_one_shape if isinstance(part, Streamed)]
    if not readers:
        return None
    return Transfer(
        shards=sum(len(reader.filled) for reader in readers),
        bytes=(total := sum(reader.size(k) for reader in readers for k in reader.filled)),
        cached=total - sum(reader.missing(k) for reader in readers for k in reader.filled),
        cache=readers[0].cache.limit,
        window=config.data.window,
    )


def transfer_text(found: Transfer) -> str:
    """Part of a line about what a run has to fetch; `found` was taken after the steps of a dry run."""
    text = f"{plural(found.shards, 'shard')}, {gigabytes(found.bytes)}"
    if found.cached == found.bytes:
        return f"{text}, all of them in the cache: the run fetches none"
    text += f", of which the cache holds {gigabytes(found.cached)}; the dry run reads one shard"
    if found.bytes > found.cache:
        return f"{text}: the run fetches up to {gigabytes(found.bytes)} in every epoch, while it trains"
    left = gigabytes(found.bytes - found.cached)
    return f"{text}: the run fetches {left} {'before its first step' if found.window is None else 'while it trains'}"
