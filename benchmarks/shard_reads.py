"""Random reads of prepared data: safetensors shards against plain memory-mapped files, interleaved in one process.

    python benchmarks/shard_reads.py [--rows 24000] [--batch-size 256] [--rounds 31] [--streamed] [--out DIR]

The plain reader keeps the same float16 moments in one numpy file per shard, gathers the rows of a batch and checks that
they are finite, as `Dataset.read` does. `--streamed` also reads them from a URL through a warm cache. Prints the medians in
milliseconds and the median of the ratio within a round, and writes them to DIR/shard_reads.json. One thread; the files are in
the page cache, so that the formats differ and not the disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selftrans.data.buckets import open_data
from selftrans.data.dataset import Dataset
from selftrans.data.streaming.shard_cache import CacheOptions
from selftrans.experiments.bench.loading_sampling import random_dataset
from selftrans.experiments.bench.machine import Clock, describe
from selftrans.experiments.bench.rounds import in_turn
from selftrans.storage import write_json

SHAPES = {"3x32x32": (3, 32, 32), "4x32x32": (4, 32, 32)}  #: of a latent; moments have twice the channels
BATCHES = 40  #: read in one round


def plain_reader(dataset: Dataset, folder: Path) -> Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor]]:
    """The same rows from one raw float16 file per shard, with labels in memory."""
    files, labels, start = [], [], 0
    for number, shard in enumerate(dataset.manifest.shards):
        tensors = dataset.read(np.arange(start, start + shard.count))
        moments = tensors["moments"].numpy()
        moments.tofile(folder / f"{number}.bin")
        files.append(np.memmap(folder / f"{number}.bin", dtype="<f2", mode="r", shape=moments.shape))
        labels.append(tensors["labels"].numpy())
        start += shard.count
    ends, every = np.cumsum([len(file) for file in files]), np.concatenate(labels)

    def read(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        if rows.min() < 0 or rows.max() >= len(every):
            raise ValueError("a row is outside the data")
        which = np.searchsorted(ends, rows, side="right")
        out = torch.empty((len(rows), *files[0].shape[1:]), dtype=torch.float16)
        view = out.numpy()
        for shard in np.unique(which):
            at = np.flatnonzero(which == shard)
            view[at] = files[shard][rows[at] - (ends[shard] - len(files[shard]))]
        if (view.view(np.uint16) & 0x7FFF).max(initial=0) >= 0x7C00:  # float16: NaN or infinite
            raise ValueError("a value is not finite")
        return out, torch.from_numpy(every[rows])

    return read


def compare(dataset: Dataset, folder: Path, batch_size: int, rounds: int, streamed: bool = False) -> dict[str, Any]:
    """Milliseconds of a batch from each reader, and how fast ours is as a multiple of the plain one."""
    plain = plain_reader(dataset, folder)
    readers: dict[str, Callable[[np.ndarray], Any]] = {"plain": plain, "safetensors": dataset.read}
    if streamed:
        remote = open_data(dataset.path.resolve().as_uri(), cache=CacheOptions(str(folder / "cache")))
        remote.fetch(progress=False)
        readers["streamed"] = remote.read
    rows = np.arange(0, len(dataset), 7)
    assert torch.equal(plain(rows)[0], dataset.read(rows)["moments"])
    draws = np.random.default_rng(0).integers(0, len(dataset), (rounds + 1, BATCHES, batch_size))

    def reading(read: Callable[[np.ndarray], Any]) -> Callable[[], None]:
        left = iter(draws)  # every reader reads the same rows in a round

        def once() -> None:
            for batch in next(left):
                read(batch)

        return once

    times = in_turn({name: reading(read) for name, read in readers.items()}, Clock(torch.device("cpu")), rounds)
    ratios = [a / b for a, b in zip(times["plain"], times["safetensors"], strict=True)]
    seconds = {name: statistics.median(values) / BATCHES for name, values in times.items()}
    return {f"{name}_ms": round(1e3 * each, 4) for name, each in seconds.items()} | {
        **{f"{name}_latents_per_s": round(batch_size / each) for name, each in seconds.items()},
        "speed_ratio": round(statistics.median(ratios), 4),
        "speed_ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=24_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--streamed", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "machine": describe(torch.device("cpu"), "fp32"),
        "batch_size": given.batch_size,
        "rounds": given.rounds,
    }
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            dataset = random_dataset(Path(folder) / "data", shape, given.rows)
            found = report[name] = compare(dataset, Path(folder), given.batch_size, given.rounds, given.streamed)
        print(
            f"{name}: plain {found['plain_ms']} ms, safetensors {found['safetensors_ms']} ms, speed x{found['speed_ratio']}"
            + (f", streamed {found['streamed_latents_per_s']:,} latents/s" if given.streamed else "")
        )
    if given.out:
        write_json(given.out / "shard_reads.json", report)


if __name__ == "__main__":
    main()
