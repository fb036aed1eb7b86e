"""Parts of `gpu_parts.py` about what surrounds the training step: reading data, attention alone, the shares of the time of
`selftrans compare`, and a classifier, its features, a VAE."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attention_backends
import numpy as np
import shard_reads
import torch
from PIL import Image

from selftrans.data.decoded import decode_images
from selftrans.data.prepare import prepare
from selftrans.device import default_device
from selftrans.encoders.autoencoder import Autoencoder, from_uint8, load_autoencoder
from selftrans.evaluate.classifier import train_classifier
from selftrans.evaluate.extractors import ClassifierExtractor
from selftrans.evaluate.statistics import Statistics
from selftrans.experiments.bench import loading_sampling
from selftrans.experiments.bench.machine import Clock
from selftrans.experiments.comparison.compare import compare_methods
from selftrans.models.sit import SiTConfig
from selftrans.recipes import recipe

METHODS = ("vanilla", "self_transcendence")  #: that are compared
AIM = 0.85  #: share of the time of `compare` in training steps


def loading(job: Any) -> None:
    """Latents per second: from a warm cache of data at a URL, from a local folder, and on the way to the device."""
    count, rounds = (512, 2) if job.toy else (16_384, 15)

    def read() -> dict[str, float]:
        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            data = loading_sampling.random_dataset(Path(folder) / "data", (4, 32, 32), count)
            torch.set_num_threads(1)
            try:
                found = shard_reads.compare(data, Path(folder), 256, rounds, streamed=True)
            finally:
                torch.set_num_threads(threads)
            moved = loading_sampling.loading(data, Clock(default_device()), batches=2 if job.toy else 40)
        return {key: float(value) for key, value in (found | moved).items() if key.endswith("_per_s")}

    job.attempt("reading", read)


def attention(job: Any) -> None:
    """Milliseconds of attention forward and backward, by backend, with the heads of each model."""
    batch, repeats, rounds = (2, 1, 1) if job.toy else (256, 20, 5)
    for name in list(attention_backends.TOKENS)[: 1 if job.toy else None]:

        def once(name: str = name) -> dict[str, float]:
            found = attention_backends.measured(name, default_device(), batch, repeats, rounds)
            return {f"{name}, {key}, ms": ms for key, ms in found.items() if ms is not None}

        job.attempt(name, once, needs=2.0)


def compare(job: Any) -> None:
    """The shares of the time of a short `selftrans compare cifar10`, and from them those of a comparison of full length.

    What a comparison does besides its steps does not depend on their number: it starts, builds and compiles models, measures
    each run five times, and writes as many checkpoints.
    """
    config, images = recipe("cifar10"), 16 if job.toy else 1000
    full, short = config.train.steps, 10 if job.toy else 200
    over: dict[str, Any] = {"train.steps": short, "log.every": 2 if job.toy else 20, "log.tensorboard": False}
    if job.toy:
        over |= {"train.batch_size": 8, "sample.steps": 2}
        config = dataclasses.replace(config, model=SiTConfig(width=32, depth=3, heads=2, patch=8))
    else:
        over["train.precision"] = over["sample.precision"] = "bf16"

    def once() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            data = pictures(Path(folder), 80 if job.toy else 8192)
            began = time.perf_counter()
            settings = config.override(over | {"data.path": str(data)})
            found = compare_methods(settings, Path(folder) / "out", METHODS, images=images, workers=1)
            whole = time.perf_counter() - began
            return shares(found["time"], whole, clean_steps(Path(folder) / "out"), short, full)

    job.attempt("compare", once)


def pictures(folder: Path, count: int) -> Path:
    """Prepared random pictures of CIFAR-10's size, in ten classes."""
    drawn = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    with zipfile.ZipFile(folder / "pictures.zip", "w") as packed:
        for number, each in enumerate(drawn):
            written = io.BytesIO()
            Image.fromarray(each).save(written, "png", compress_level=0)
            packed.writestr(f"{number % 10}/{number}.png", written.getvalue())
    prepare(folder / "pictures.zip", folder / "data", progress=False)
    return folder / "data"


def clean_steps(out: Path) -> float:
    """Seconds of all training steps of a comparison at the rate of its later ones, which neither compile nor record."""
    seconds = 0.0
    for log in out.glob("*-seed*/*/log.jsonl"):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        first, last = lines[len(lines) // 2], lines[-1]
        seconds += last["step"] * (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
    return seconds


def shares(spent: Mapping[str, Any], whole: float, steps: float, short: int, full: int) -> dict[str, float]:
    """Seconds of each part of a comparison, and the share of training steps: of `short` steps a run, as it was, of `full`
    steps, and how many make it `AIM`.

    `spent`: `time` in compare.json. `whole`: seconds of the call, with the classifier. `steps`: see `clean_steps`.
    """
    longer = full / short
    found = {f"{name}_s": spent[name] * spent["seconds"] for name in ("steps", "training", "measuring", "other")}
    fixed = spent["seconds"] - steps
    return found | {
        "before_s": whole - spent["seconds"],
        f"share_of_{short}_steps": spent["steps"],
        f"share_of_{full}_steps": longer * steps / (longer * steps + fixed),
        f"steps_for_{AIM:.0%}": short * AIM / (1 - AIM) * fixed / steps,
    }


def around(job: Any) -> None:
    """Pictures per second of what surrounds the step: a classifier, its features, a VAE of Stable Diffusion's size."""
    clock = Clock(default_device())
    job.attempt("classifier", lambda: classified(clock, job.toy))
    job.attempt("VAE", lambda: coded(clock, job.toy))


def classified(clock: Clock, toy: bool) -> dict[str, float]:
    count = 128 if toy else 20_000
    small = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    began = time.perf_counter()
    model = train_classifier(small, np.arange(count) % 10, 10, epochs=1, width=4 if toy else 32, device=clock.device)
    trained_in = time.perf_counter() - began
    extractor = ClassifierExtractor(model, "small", clock.device)
    features = rate(lambda: Statistics.of(small, extractor, keep=False), count, clock)
    return {"classifier_training_per_s": count / trained_in, "features_per_s": features}


def coded(clock: Clock, toy: bool) -> dict[str, float]:
    """A VAE of random weights, in float32 and bfloat16."""
    from diffusers import AutoencoderKL  # an optional package

    found, side, batch = dict[str, float](), 64 if toy else 256, 2 if toy else 64
    widths = (8, 8, 16, 16) if toy else (128, 256, 512, 512)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": widths, "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 8}
    pictures = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    decoded: dict[str, np.ndarray] = {}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoencoderKL(**sizes, **blocks, scaling_factor=0.18215).save_pretrained(folder)
        for name in ("float32", "bfloat16"):
            vae = load_autoencoder(folder, device=clock.device, dtype=getattr(torch, name))
            latents = torch.randn(batch, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
            found[f"decode_{name}_per_s"] = rate(partial(decode_images, vae, latents), batch, clock)
            decoded[name] = decode_images(vae, latents)
            pixels = from_uint8(torch.from_numpy(pictures).to(clock.device))
            found[f"encode_{name}_per_s"] = rate(partial(encoded, vae, pixels), batch, clock)
    levels = np.abs(decoded["float32"].astype(np.float32) - decoded["bfloat16"])
    return found | {"decode_mean_difference_of_levels": float(levels.mean())}


def encoded(vae: Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
    """What `prepare` stores of pixels (N, C, H, W), on the host."""
    return vae.encode(pixels).stack().cpu()


def rate(work: Callable[[], Any], count: int, clock: Clock) -> float:
    """Pictures per second of the second call."""
    for _ in range(2):
        clock.wait()
        began = time.perf_counter()
        work()
        clock.wait()
    return count / (time.perf_counter() - began)
