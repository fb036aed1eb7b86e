"""The measurements of `gpu_parts.py`: correctness, training steps, time to the first step, sampling, what surrounds the step.

On a GPU in bfloat16 and compiled; "toy" takes tiny models in float32. Times of a part include compilation. A part is a function
of a `Job`, to which it adds what it finds, piece by piece.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_variants
import numpy as np
import torch

from selftrans.config import Log, RunConfig, SampleConfig, Train
from selftrans.data.decoded import decode_images
from selftrans.device import default_device
from selftrans.encoders.autoencoder import Autoencoder, from_uint8, load_autoencoder
from selftrans.encoders.identity import identity
from selftrans.evaluate.classifier import train_classifier
from selftrans.evaluate.extractors import ClassifierExtractor
from selftrans.evaluate.statistics import Statistics
from selftrans.experiments.bench import loading_sampling
from selftrans.experiments.bench.loading_sampling import prepare_sampling, random_dataset
from selftrans.experiments.bench.machine import Clock, describe
from selftrans.experiments.bench.rounds import randomise
from selftrans.graphs import Recorded
from selftrans.messages import first_line
from selftrans.models.sit import SiTConfig
from selftrans.sampling.images import Sampler, cast_products
from selftrans.train.dry_run import dry_run
from selftrans.train.run import train
from selftrans.types import Conditions

MODELS, TOY = gpu_variants.MODELS, gpu_variants.TOY
ROWS = ("vanilla", "stage2")
CAPTURED = ("captured_vanilla", "captured_stage2")  #: of all but the largest model
SECONDS = 10.0  #: of rounds of steps
SAMPLING = 25.0  #: seconds that must be left to sample with a model whose steps were measured
#: steps of the two stages of a training that is compared: a captured one begins with three launched steps
LENGTHS = (6, 8)
CAPTURES = 4  #: graphs that such a training records: two for each stage
SAMPLED = ("eager", "captured", "compiled", "captured_compiled")  #: ways to sample
#: the same computation twice: what its kernels' order of sums alone does
AGAIN = ("compiled bf16 again", "compiled bf16")
#: pairs of variants -> largest relative difference of their losses that counts as rounding
CLOSE = {
    ("eager bf16", "eager fp32"): 3e-2,
    ("compiled bf16", "eager bf16"): 3e-2,
    ("captured bf16", "compiled bf16"): 1e-5,  # or what the same computation differs by, run twice
    ("captured fp32", "eager fp32"): 1e-5,
    ("compiled fp32", "eager fp32"): 1e-3,
    ("compiled fp16", "eager fp32"): 3e-2,
}


def machine(toy: bool) -> dict[str, Any]:
    return describe(default_device(), "fp32" if toy else "bf16")


def no_gpu() -> str | None:
    """Why torch cannot use a GPU here, or None."""
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return None


# ---- correctness


def variants(gpu: bool) -> dict[str, dict[str, Any]]:
    """Name -> settings of the same training, computed in different ways; what matters most first, fp16 last."""

    def way(precision: str, compiled: bool = False, capture: str = "off") -> dict[str, Any]:
        return {"train.precision": precision, "train.compile": compiled, "train.capture": capture}

    if not gpu:
        return {"eager fp32": way("fp32"), "captured fp32": way("fp32", capture="on"), "eager bf16": way("bf16")}
    return {
        "eager bf16": way("bf16"),
        "compiled bf16": way("bf16", True),
        "captured bf16": way("bf16", True, capture="on"),
        AGAIN[0]: way("bf16", True),
        "eager fp32": way("fp32"),
        "compiled fp32": way("fp32", True),
        "compiled fp16": way("fp16", True),
    }


def correctness(job: Any) -> None:
    """Losses of two stages of a few steps, by every variant, and their largest relative differences."""
    gpu, toy = torch.cuda.is_available(), job.toy
    model, side = TOY if toy else SiTConfig(width=384, depth=4, heads=6, patch=2), 8 if toy else 32
    small = Train(steps=LENGTHS[1], batch_size=8 if toy else 64, preview_every=0, checkpoint_every=100, lr=1e-3)
    job.found |= {"losses": {}, "graphs": {}}
    with tempfile.TemporaryDirectory() as folder:
        random_dataset(Path(folder) / "data", (4, side, side), 256, classes=10)
        config = RunConfig("bench", model=model, train=small, log=Log(every=1, tensorboard=False))
        config = config.override({"data.path": str(Path(folder) / "data"), "stage1.steps": LENGTHS[0]})
        for name, settings in variants(gpu).items():
            if job.left < 0.2 * job.limit:
                break

            def once(name: str = name, settings: dict[str, Any] = settings) -> dict[str, Any]:
                found, graphs = trained(config.override(settings), Path(folder) / name.replace(" ", "-"))
                losses = job.found["losses"] | {name: found}
                every = checks(losses)
                if settings["train.capture"] == "on":
                    job.found["graphs"][name] = graphs
                    if gpu and graphs < CAPTURES:
                        raise RuntimeError(f"{graphs} graphs were recorded instead of {CAPTURES}")
                passed = all(check.get("passed", True) for check in every.values())
                return {"losses": losses, "checks": every, "passed": passed}

            job.attempt(name, once)


def trained(config: RunConfig, run: Path) -> tuple[list[float | None], int]:
    """Loss of every step of both stages (None: its update was skipped), and the number of graphs that were recorded."""
    with mock.patch.object(Recorded, "capture", autospec=True, side_effect=Recorded.capture) as recorded:
        train(config, run, quiet=True)
    lines = [line for path in sorted(run.glob("*/log.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line).get("loss") for line in lines], recorded.call_count


def difference(ones: list[float | None], others: list[float | None]) -> tuple[float | None, int]:
    """Largest relative difference of two lists of losses where both have one (None: nowhere), and at how many steps."""
    pairs = [(a, b) for a, b in zip(ones, others, strict=False) if a is not None and b is not None]
    return max((abs(a - b) / abs(b) for a, b in pairs), default=None), len(pairs)


def checks(losses: Mapping[str, list[float | None]]) -> dict[str, Any]:
    """Pair of variants -> their difference, at how many steps, and whether it is one of rounding."""
    found: dict[str, Any] = {}
    least = 0.0
    if all(name in losses for name in AGAIN):
        worst, steps = difference(*(losses[name] for name in AGAIN))
        found[" / ".join(AGAIN)] = {"difference": worst, "steps": steps}
        least = 4 * (worst or 0.0)
    for (one, other), most in CLOSE.items():
        if one in losses and other in losses:
            worst, steps = difference(losses[one], losses[other])
            most = max(most, least) if one == "captured bf16" else most
            passed = worst is not None and math.isfinite(worst) and worst <= most
            found[f"{one} / {other}"] = {"difference": worst, "steps": steps, "allowed": most, "passed": passed}
    return found


# ---- training steps of a model


def speed(job: Any) -> None:
    """Training steps of one model as a fraction of the measured peak, with its memory, first step and sampling.

    Launched steps are measured and written before any is captured: a capture that fails ends what this process can
    do, and the memory of all rows together need not be there. Ratios of captured and launched rows are of their medians.
    """
    name, tokens, batch = ("toy", 16, 4) if job.toy else MODELS[job.part]
    model = TOY if job.toy else SiTConfig(name=name)
    given: dict[str, Any] = {"batch_size": batch, "tokens": tokens, "quick": job.toy}
    given["seconds"] = 0.0 if job.toy else SECONDS

    def measured(kind: str, rows: tuple[str, ...], share: float) -> dict[str, Any]:
        one = gpu_variants.measured(job, kind, name, model, rows, limit=share * job.left, **given)
        before = job.found.get("models", {}).get(name)
        return {"models": {name: joined(before, one) if before else one}}

    sound = job.attempt("launched steps", lambda: measured("launched", ROWS, 0.6))
    if job.part != "xl2" and job.left > 0:
        sound = job.attempt("captured steps", lambda: measured("captured", CAPTURED, 0.8)) and sound
    if sound and (job.toy or job.left > SAMPLING):
        job.attempt("sampling", lambda: sampled(model, tokens, job.toy))


def joined(launched: Mapping[str, Any], captured: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of both, and the ratios of captured and launched ones."""
    rows = launched["rows"] | captured["rows"]
    ratios = {
        f"{name}_over_{one}": rows[name]["ms"] / rows[one]["ms"] for one, name in zip(ROWS, CAPTURED, strict=True)
    }
    return dict(launched) | {"rows": rows, "ratios": launched["ratios"] | captured["ratios"] | ratios}


def sampled(model: SiTConfig, tokens: int, toy: bool) -> dict[str, Any]:
    """Guided sampling without decoding, as `selftrans bench` measures it."""
    clock, (precision, dtype) = Clock(default_device()), ("fp32", torch.float32) if toy else ("bf16", torch.bfloat16)
    side = math.isqrt(tokens) * model.sizes()["patch"]
    built = RunConfig("bench", model=model).build_model((4, side, side), Conditions("labels", 1000)).to(clock.device)
    randomise(built)
    prepare_sampling(built, clock.device, dtype)
    found = loading_sampling.sampling(built, clock, precision=precision, images=1 if toy else 64, rounds=2)
    return {"sampling": found, "sampled_per_s": found["full_images_per_s"]}


def first_step(job: Any) -> None:
    """Seconds from a new process to its first step done, with an empty cache of compiled code and again with a full one."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}

        def once(name: str) -> dict[str, float]:
            started, words = time.perf_counter(), [sys.executable, __file__, *(["--toy"] if job.toy else [])]
            done = subprocess.run(
                words, env=environment, capture_output=True, text=True, timeout=max(1.0, job.left - 2)
            )
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
            whole = round(time.perf_counter() - started, 2)
            return {f"{name}_process_s": whole, f"{name}_s": float(done.stdout.strip().splitlines()[-1])}

        if job.attempt("cold", lambda: once("cold")):
            job.attempt("warm", lambda: once("warm"))


def one_step(toy: bool) -> None:
    """In a new process: print the seconds from the call to the end of one step."""
    with tempfile.TemporaryDirectory() as folder:
        side = 8 if toy else 32
        random_dataset(Path(folder) / "data", (4, side, side), 512)
        # launched: a captured step is reached only after others
        small = Train(10, 4 if toy else 256, precision="fp32" if toy else "bf16", preview_every=0, capture="off")
        model = TOY if toy else SiTConfig(name="SiT-B/2")
        config = RunConfig("bench", method="vanilla", model=model, train=small, log=Log(tensorboard=False))
        started = time.perf_counter()
        dry_run(config.override({"data.path": str(Path(folder) / "data")}), Path(folder) / "run", steps=1)
        print(round(time.perf_counter() - started, 2))


def sampling(job: Any) -> None:
    """Images per second of guided sampling: eager and compiled, launched and captured, in large batches and in small ones.

    The levels of captured images are compared with those of the same computation that is launched.
    """
    images: dict[str, np.ndarray] = {}
    for name in SAMPLED:
        job.attempt(name, lambda name=name: sampled_images(job.toy, name, images))
    for one, other in (("compiled", "eager"), ("captured", "eager"), ("captured_compiled", "compiled")):
        if one in images and other in images:
            a, b = (images[name].astype(np.float32) for name in (one, other))
            job.found[f"{one}_mean_difference_of_levels"] = float(np.abs(a - b).mean())


def sampled_images(toy: bool, name: str, images: dict[str, np.ndarray]) -> dict[str, float]:
    """Rates of one of `SAMPLED`, whose images are added; twice for each batch size, as the first compiles or records."""
    clock, found = Clock(default_device()), dict[str, float]()
    shape, dtype = ((4, 8, 8), torch.float32) if toy else ((4, 32, 32), torch.bfloat16)
    torch.manual_seed(0)
    config = RunConfig("bench", model=TOY if toy else SiTConfig(name="SiT-S/2"))
    model = config.build_model(shape, Conditions("labels", 1000)).to(clock.device)
    randomise(model)
    if "compiled" in name:
        prepare_sampling(model, clock.device, dtype)
    cast_products(model, dtype)
    for batch, num in ((4, 6), (2, 3)) if toy else ((256, 500), (16, 40)):  # the last batch is smaller
        settings = SampleConfig(
            num=num,
            batch_size=batch,
            steps=2 if toy else 50,
            sampler="euler",
            guidance_scale=1.9,
            precision="fp32" if toy else "bf16",
            capture="on" if "captured" in name else "off",
        )
        sampler = Sampler(model, identity("pixel"), settings, device=clock.device)
        sampler._compiled = "compiled" in name  # the last batch is filled
        with mock.patch.object(Recorded, "capture", autospec=True, side_effect=Recorded.capture) as recorded:
            for again in ("first", "then"):
                clock.wait()
                began = time.perf_counter()
                made = np.concatenate([each.images for each in sampler.sample()])
                found[f"{name}_of_{batch}_{again}_per_s"] = num / (time.perf_counter() - began)
        images.setdefault(name, made)
        if settings.capture == "on" and clock.device.type == "cuda" and recorded.call_count != 1:
            raise RuntimeError(f"{recorded.call_count} graphs were recorded instead of one")
    return found


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


#: part -> what measures it
PARTS: dict[str, Callable[[Any], None]] = {
    "correctness": correctness,
    **dict.fromkeys(MODELS, speed),
    "memory": gpu_variants.memory,
    "variants": gpu_variants.variants,
    "first_step": first_step,
    "sampling": sampling,
    "around": around,
    "tuned": gpu_variants.tuned,
}

if __name__ == "__main__":
    one_step("--toy" in sys.argv)
