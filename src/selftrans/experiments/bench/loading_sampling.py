"""Speed of loading latents, and of sampling with guidance on an interval. Shape legend: N batch, (C, H, W) latent."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selftrans.config import SampleConfig
from selftrans.data import resumable
from selftrans.data.dataset import Dataset
from selftrans.data.manifest import VERSION, Manifest, Shard, conditions_of
from selftrans.data.on_device import OnDevice
from selftrans.data.shard_file import write_shard
from selftrans.encoders.identity import identity
from selftrans.encoders.latent_space import LatentSpace
from selftrans.experiments.bench.machine import Clock
from selftrans.experiments.bench.rounds import in_turn
from selftrans.messages import shape_text
from selftrans.models.compiling import compile_model
from selftrans.sampling.images import Sampler, cast_products
from selftrans.storage import sha256_file
from selftrans.train.batches import Stream, to_batch

INTERVAL = (0.0, 0.65)  #: guidance interval of the paper's main result


def random_dataset(folder: Path, shape: tuple[int, int, int], count: int, classes: int = 1000) -> Dataset:
    """A dataset of random float16 moments (mean and std) of latents (C, H, W), in the format of `prepare` with a VAE."""
    draw, (channels, height, width) = np.random.default_rng(0), shape
    few = draw.standard_normal((256, 1, 2 * channels, height, width), dtype=np.float32).astype(np.float16)
    few[:, :, channels:] = np.abs(few[:, :, channels:])  # standard deviations
    names = tuple(f"class {k}" for k in range(classes))
    plan = Manifest(
        version=VERSION,
        count=count,
        copies=1,
        shape=shape,
        latent_space=LatentSpace(0.0, 0.18215, stochastic=True),
        dtype="float16",
        autoencoder="pixel",
        resolution=8 * height,
        image_channels=3,
        conditions=conditions_of(names),
        classes=names,
        source="random numbers",
        options={},
        shards=(),
        features=None,
    )
    shard = Shard(0, count, "", ())
    with write_shard(folder / shard.file, plan.layout, count) as rows:
        for start in range(0, count, len(few)):
            moments = few[: count - start]
            rows.write({"moments": moments, "labels": draw.integers(classes, size=len(moments))})
    resumable.finish(folder, plan, [replace(shard, sha256=sha256_file(folder / shard.file))])
    return Dataset.open(folder)


def loading(dataset: Dataset, clock: Clock, *, batches: int) -> dict[str, Any]:
    """Latents per second, from storage to sampled latents on the device: memory-mapped, and with the data on the device."""
    ways = {"memory_mapped": dataset, "on_device": OnDevice(dataset, clock.device)}

    def reading(source: Dataset) -> Callable[[], None]:
        stream = Stream(source, batch_size=256, accumulate=1, seed=0).from_step(0, pin=clock.device.type == "cuda")

        def read() -> None:
            for drawn in itertools.islice(stream, batches):
                to_batch(drawn, dataset, clock.device)

        return read

    # the round that is not counted reads the files into memory
    times = in_turn({name: reading(source) for name, source in ways.items()}, clock, rounds=5)
    rates = {f"{name}_latents_per_s": 256 * batches / statistics.median(each) for name, each in times.items()}
    return {"batch": 256, "latent": shape_text(dataset.manifest.shape), "rounds": 5} | rates


def sampling(model: Any, clock: Clock, *, precision: Any, images: int, rounds: int, steps: int = 20) -> dict[str, Any]:
    """Images per second of Euler's method with guidance scale 1.9, on [0, 1] and on INTERVAL, without decoding."""

    def once(interval: tuple[float, float]) -> None:
        config = SampleConfig(
            num=images,
            batch_size=images,
            steps=steps,
            sampler="euler",
            guidance_scale=1.9,
            guidance_interval=interval,
            precision=precision,
        )
        for _ in Sampler(model, identity("pixel"), config, device=clock.device).sample():
            pass

    ways = {"full": partial(once, (0.0, 1.0)), "interval": partial(once, INTERVAL)}
    times = in_turn(ways, clock, rounds)
    ratio = statistics.median(part / full for part, full in zip(times["interval"], times["full"], strict=True))
    return {
        "batch": images,
        "steps": steps,
        "rounds": rounds,
        "interval": list(INTERVAL),
        **{f"{name}_images_per_s": images / statistics.median(each) for name, each in times.items()},
        "interval_over_full": ratio,
        "passes_interval_over_full": passes(steps),
    }


def passes(steps: int) -> float:
    """Number of model passes per image with guidance on INTERVAL, divided by that with guidance everywhere."""
    times = [1 - i / steps for i in range(steps)]
    return sum(2 if INTERVAL[0] <= t <= INTERVAL[1] + 1e-9 else 1 for t in times) / (2 * steps)


def prepare_sampling(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Cast and compile the model as `sample` does: weights of products in `dtype`, blocks compiled on a GPU."""
    cast_products(model, dtype)
    if device.type == "cuda":
        compile_model(model)
