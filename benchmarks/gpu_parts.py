"""The parts of `gpu_lease.sh`: each measures one thing and writes OUT/PART.json; `table` puts what is there together.

    python benchmarks/gpu_parts.py PART --out DIR [--limit SECONDS] [--toy]

Parts: correctness, s4, s2, b2, xl2, first_step, sampling, around (what surrounds the training step: decoding, encoding, a
classifier, features), table. On a GPU in bfloat16 and compiled; `--toy`, for a machine without one, takes tiny models in
float32 and shows only that the parts run. Times of a part include compilation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selftrans.config import Log, RunConfig, SampleConfig, Train
from selftrans.data.decoded import decode_images
from selftrans.device import default_device
from selftrans.encoders.autoencoder import DiffusersAutoencoder, from_uint8
from selftrans.encoders.identity import PixelAutoencoder
from selftrans.evaluate.classifier import train_classifier
from selftrans.evaluate.extractors import ClassifierExtractor
from selftrans.evaluate.statistics import Statistics
from selftrans.experiments.bench import bench
from selftrans.experiments.bench.loading_sampling import prepare_sampling, random_dataset
from selftrans.experiments.bench.machine import Clock, describe
from selftrans.experiments.bench.rounds import randomise
from selftrans.models.sit import SiTConfig
from selftrans.sampling.images import Sampler
from selftrans.storage import write_json
from selftrans.train.dry_run import dry_run
from selftrans.train.run import train
from selftrans.types import Conditions

#: part -> model, tokens, batch on a GPU
MODELS = {
    "s4": ("SiT-S/4", 64, 256),
    "s2": ("SiT-S/2", 256, 256),
    "b2": ("SiT-B/2", 256, 256),
    "xl2": ("SiT-XL/2", 256, 64),
}
TOY = SiTConfig(width=32, depth=3, heads=2, patch=2)
ROWS = ("vanilla", "stage2")
CAPTURED = ("captured_vanilla", "captured_stage2")  #: measured too, of all but the largest model
#: pairs of variants -> largest relative difference of their losses that counts as rounding
CLOSE = {
    ("compiled fp32", "eager fp32"): 1e-3,
    ("eager bf16", "eager fp32"): 3e-2,
    ("compiled bf16", "eager bf16"): 3e-2,
    ("compiled fp16", "eager fp32"): 3e-2,
    ("captured bf16", "compiled bf16"): 1e-5,
    ("captured fp32", "eager fp32"): 1e-5,
}
Part = Callable[[Path, bool, float], dict[str, Any]]


def captures() -> bool:
    """Whether this version can capture the whole step."""
    return any(each.name == "capture" for each in dataclasses.fields(Train))


def variants(gpu: bool) -> dict[str, dict[str, Any]]:
    """Name -> settings of the same training, computed in different ways."""
    found: dict[str, dict[str, Any]] = {
        "eager fp32": {"train.precision": "fp32", "train.compile": False},
        "eager bf16": {"train.precision": "bf16", "train.compile": False},
    }
    if gpu:
        found["compiled fp32"] = {"train.precision": "fp32", "train.compile": True}
        found["compiled bf16"] = {"train.precision": "bf16", "train.compile": True}
        found["compiled fp16"] = {"train.precision": "fp16", "train.compile": True}
    if captures():
        kind = "bf16" if gpu else "fp32"
        found[f"captured {kind}"] = {"train.precision": kind, "train.compile": gpu, "train.capture": "on"}
    return found


def correctness(out: Path, toy: bool, limit: float) -> dict[str, Any]:
    """Losses of two stages of a few steps, by every variant, and their largest relative differences."""
    gpu, ends = torch.cuda.is_available(), time.monotonic() + limit
    model = TOY if toy else SiTConfig(width=384, depth=4, heads=6, patch=2)
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        side = 8 if toy else 32
        random_dataset(Path(folder) / "data", (4, side, side), 256, classes=10)
        for name, settings in variants(gpu).items():
            if time.monotonic() > ends:
                break
            small = Train(steps=6, batch_size=8 if toy else 64, preview_every=0, checkpoint_every=100, lr=1e-3)
            config = RunConfig("bench", model=model, train=small, log=Log(every=1, tensorboard=False))
            config = config.override({"data.path": str(Path(folder) / "data"), "stage1.steps": 3} | settings)
            run = Path(folder) / name.replace(" ", "-")
            train(config, run, quiet=True, bar=Quiet)
            lines = [line for path in sorted(run.glob("*/log.jsonl")) for line in path.read_text().splitlines()]
            losses[name] = [json.loads(line)["loss"] for line in lines]
    checks = {}
    for (one, other), most in CLOSE.items():
        if one in losses and other in losses:
            pairs = zip(losses[one], losses[other], strict=True)
            worst = max(abs(a - b) / abs(b) for a, b in pairs)
            checks[f"{one} / {other}"] = {"difference": worst, "allowed": most, "passed": worst <= most}
    return {"losses": losses, "checks": checks, "passed": all(check["passed"] for check in checks.values())}


class Quiet:
    """A progress bar that shows nothing."""

    def __init__(self, **_: Any) -> None: ...
    def update(self, *_: Any) -> None: ...
    def set_postfix(self, *_: Any, **__: Any) -> None: ...
    def close(self) -> None: ...


def speed(part: str) -> Part:
    """Training steps of one model as a fraction of the measured peak, with its memory, first step and sampling."""

    def measure(out: Path, toy: bool, limit: float) -> dict[str, Any]:
        name, tokens, batch = ("toy", 16, 4) if toy else MODELS[part]
        model = TOY if toy else SiTConfig(name=name)
        rows = ROWS if part == "xl2" or not captures() else ROWS + CAPTURED
        given = {"seconds": 0.0 if toy else 15.0, "quick": toy, "rows": rows, "limit": 0.75 * limit}
        return bench({name: model}, out / f"bench-{part}", batch_size=batch, tokens=tokens, **given)

    return measure


def first_step(out: Path, toy: bool, limit: float) -> dict[str, Any]:
    """Seconds from a new process to its first step done, with an empty cache of compiled code and again with a full one."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        for name in ("cold", "warm"):
            words = [sys.executable, __file__, "_one_step", "--out", str(out), *(["--toy"] if toy else [])]
            started = time.perf_counter()
            done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=limit)
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
            found[f"{name}_process_s"] = round(time.perf_counter() - started, 2)
            found[f"{name}_s"] = float(done.stdout.strip().splitlines()[-1])
    return found


def one_step(out: Path, toy: bool, limit: float) -> dict[str, Any]:
    """In a new process: print the seconds from the call to the end of one step."""
    with tempfile.TemporaryDirectory() as folder:
        side = 8 if toy else 32
        random_dataset(Path(folder) / "data", (4, side, side), 512)
        small = Train(steps=10, batch_size=4 if toy else 256, precision="fp32" if toy else "bf16", preview_every=0)
        model = TOY if toy else SiTConfig(name="SiT-B/2")
        config = RunConfig("bench", method="vanilla", model=model, train=small, log=Log(tensorboard=False))
        started = time.perf_counter()
        dry_run(config.override({"data.path": str(Path(folder) / "data")}), Path(folder) / "run", steps=1)
        print(round(time.perf_counter() - started, 2))
    return {}


def sampling(out: Path, toy: bool, limit: float) -> dict[str, Any]:
    """Images per second of guided sampling, eager and compiled with batches of one shape."""
    clock, ends, found = Clock(default_device()), time.monotonic() + limit, dict[str, Any]()
    shape, dtype = ((4, 8, 8), torch.float32) if toy else ((4, 32, 32), torch.bfloat16)
    config = RunConfig("bench", model=TOY if toy else SiTConfig(name="SiT-S/2"))
    settings = SampleConfig(
        num=6 if toy else 500,  # the last batch is smaller
        batch_size=4 if toy else 256,
        steps=2 if toy else 50,
        sampler="euler",
        guidance_scale=1.9,
        precision="fp32" if toy else "bf16",
    )
    images = {}
    for name in ("eager", "compiled"):
        if time.monotonic() > ends:
            break
        torch.manual_seed(0)
        model = config.build_model(shape, Conditions("labels", 1000)).to(clock.device)
        randomise(model)
        sampler = Sampler(model, PixelAutoencoder(), settings, device=clock.device)
        if name == "compiled":
            prepare_sampling(model, clock.device, dtype)
            sampler._compiled = True  # the last batch is filled
        for number in range(2):
            clock.wait()
            began = time.perf_counter()
            images[name] = np.concatenate([batch.images for batch in sampler.sample()])
            found[f"{name}_{('first', 'images')[number]}_per_s"] = len(images[name]) / (time.perf_counter() - began)
    if len(images) == 2:
        a, b = (x.astype(np.float32) for x in images.values())
        found["mean_difference_of_levels"] = float(np.abs(a - b).mean())
    return found


def around(out: Path, toy: bool, limit: float) -> dict[str, Any]:
    """Pictures per second of what surrounds the step: a VAE of Stable Diffusion's size, a classifier, its features."""
    from diffusers import AutoencoderKL

    clock, found, side, batch = Clock(default_device()), dict[str, Any](), 64 if toy else 256, 2 if toy else 64
    widths = (8, 8, 16, 16) if toy else (128, 256, 512, 512)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": widths, "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 8}
    pictures = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    decoded: dict[str, np.ndarray] = {}
    torch.manual_seed(0)
    network = AutoencoderKL(**sizes, **blocks, scaling_factor=0.18215)
    for name in ("float32", "bfloat16"):
        vae = DiffusersAutoencoder("random", network, device=clock.device, dtype=getattr(torch, name))
        latents = torch.randn(batch, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
        found[f"decode_{name}_per_s"] = rate(lambda vae=vae, z=latents: decode_images(vae, z), batch, clock)
        decoded[name] = decode_images(vae, latents)
        pixels = from_uint8(torch.from_numpy(pictures).to(clock.device))
        found[f"encode_{name}_per_s"] = rate(lambda vae=vae, x=pixels: vae.encode(x).stack().cpu(), batch, clock)
        network = network.float()
    levels = np.abs(decoded["float32"].astype(np.float32) - decoded["bfloat16"])
    found["decode_mean_difference_of_levels"] = float(levels.mean())
    count = 128 if toy else 20_000
    small = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    began = time.perf_counter()
    model = train_classifier(small, np.arange(count) % 10, 10, epochs=1, width=4 if toy else 32, device=clock.device)
    found["classifier_training_per_s"] = count / (time.perf_counter() - began)
    extractor = ClassifierExtractor(model, "small", clock.device)
    found["features_per_s"] = rate(lambda: Statistics.of(small, extractor, keep=False), count, clock)
    return found


def rate(work: Callable[[], Any], count: int, clock: Clock) -> float:
    """Pictures per second of the second call."""
    for _ in range(2):
        clock.wait()
        began = time.perf_counter()
        work()
        clock.wait()
    return count / (time.perf_counter() - began)


def table(out: Path, toy: bool, limit: float) -> dict[str, Any]:
    """Print what was measured, and put it into OUT/gpu_lease.json."""
    found = {name: json.loads(path.read_text()) for name in PARTS if (path := out / f"{name}.json").is_file()}
    write_json(out / "gpu_lease.json", found)
    machine = next((part["machine"] for part in found.values() if "machine" in part), None)
    if machine:
        print(f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}")
    for name in PARTS:
        print(f"{name:<12} {line(name, found[name]) if name in found else 'not measured'}")
    return {}


def line(name: str, part: dict[str, Any]) -> str:
    """One part in a line."""
    if "failed" in part:
        return f"failed: {part['failed']}"
    if name == "correctness":
        checks = [f"{key} {check['difference']:.1e}" for key, check in part["checks"].items()]
        return f"{'passed' if part['passed'] else 'NOT passed'}: {'; '.join(checks)}"
    if name in MODELS:
        model, shown = next(iter(part["models"].values())), []
        if "failed" in model:
            return f"failed: {model['failed']}"
        for key, row in model["rows"].items():
            memory = "" if row["peak_memory_gb"] is None else f", {row['peak_memory_gb']:.1f} GB"
            used = "" if row["utilisation"] is None else f" ({row['utilisation']:.1%} of the peak)"
            shown.append(f"{key} {row['images_per_s']:,.0f}/s{used}{memory}, first step {row['first_step_s']:.1f} s")
        sampled = model.get("sampling")
        return "; ".join(shown) + (f"; sampling {sampled['full_images_per_s']:.3g}/s" if sampled else "")
    return ", ".join(f"{key} {value:,.3g}" for key, value in part.items() if isinstance(value, float))


PARTS: dict[str, Part] = {
    "correctness": correctness,
    **{name: speed(name) for name in MODELS},
    "first_step": first_step,
    "sampling": sampling,
    "around": around,
}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("part", choices=[*PARTS, "table", "_one_step"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=600.0)
    parser.add_argument("--toy", action="store_true")
    given = parser.parse_args(words)
    given.out.mkdir(parents=True, exist_ok=True)
    run = {"table": table, "_one_step": one_step}.get(given.part) or PARTS[given.part]
    if given.part not in PARTS:
        run(given.out, given.toy, given.limit)
        return 0
    started, precision = time.perf_counter(), "fp32" if given.toy else "bf16"
    try:
        found = run(given.out, given.toy, given.limit)
    except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
        found = {"failed": str(error).splitlines()[0]}
    found |= {"machine": describe(default_device(), precision), "part_s": round(time.perf_counter() - started, 1)}
    write_json(given.out / f"{given.part}.json", found)
    print(f"{given.part}: {line(given.part, found)}")
    return int("failed" in found or not found.get("passed", True))


if __name__ == "__main__":
    sys.exit(main())
