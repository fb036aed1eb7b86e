"""Measurements of `gpu_parts.py`: correctness, training steps, time to the first step, sampling, tests; and the list of parts.

On a GPU in bfloat16 and compiled; "toy" takes tiny models in float32. Times of a part include compilation. A part is a function
of a `Job`, to which it adds what it finds, piece by piece.
"""

from __future__ import annotations

import importlib.metadata
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

import gpu_around
import gpu_variants
import numpy as np
import torch

from selftrans.config import Log, RunConfig, SampleConfig, Train
from selftrans.device import default_device
from selftrans.encoders.identity import identity
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
CAPTURED = ("captured_vanilla", "captured_stage2")
SECONDS = {"launched": 3.0, "captured": 8.0}  #: of rounds of steps
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
    """The machine, with the share of the GPU's memory that is free: all but a little, unless others use it, too."""
    found = describe(default_device(), "fp32" if toy else "bf16")
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (1, 1)
    return found | {"free_memory": round(free / total, 3), "triton": _version("triton")}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
    """Training steps of one model as a fraction of the measured peak, with its memory and first step.

    Launched steps are measured and written before any is captured: a capture that fails ends what this process can
    do, and the memory of all rows together need not be there. Ratios of captured and launched rows are of their medians.
    """
    name, tokens, batch = ("toy", 16, 4) if job.toy else MODELS[job.part]
    model = TOY if job.toy else SiTConfig(name=name)
    given: dict[str, Any] = {"batch_size": batch, "tokens": tokens, "quick": job.toy}

    def measured(kind: str, rows: tuple[str, ...], share: float) -> dict[str, Any]:
        seconds = 0.0 if job.toy else SECONDS[kind]
        one = gpu_variants.measured(job, kind, name, model, rows, limit=share * job.left, seconds=seconds, **given)
        before = job.found.get("models", {}).get(name)
        return {"models": {name: joined(before, one) if before else one}}

    job.attempt("launched steps", lambda: measured("launched", ROWS, 0.6))
    job.attempt("captured steps", lambda: measured("captured", CAPTURED, 0.8), needs=gpu_variants.NEEDED)


def joined(launched: Mapping[str, Any], captured: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of both, and the ratios of captured and launched ones."""
    rows = launched["rows"] | captured["rows"]
    ratios = {
        f"{name}_over_{one}": rows[name]["ms"] / rows[one]["ms"] for one, name in zip(ROWS, CAPTURED, strict=True)
    }
    return dict(launched) | {"rows": rows, "ratios": launched["ratios"] | captured["ratios"] | ratios}


def first_step(job: Any) -> None:
    """Seconds of a first step, with an empty cache of compiled code and again with a full one.

    Of the step alone, with the construction of the model, and from the start of the process on.
    """
    with tempfile.TemporaryDirectory() as cache:
        # Triton's own: of kernels that inductor does not write
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": str(Path(cache, "triton"))}

        def once(name: str) -> dict[str, float]:
            started, words = time.perf_counter(), [sys.executable, __file__, *(["--toy"] if job.toy else [])]
            done = subprocess.run(
                words, env=environment, capture_output=True, text=True, timeout=max(1.0, job.left - 2)
            )
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
            whole = round(time.perf_counter() - started, 2)
            step, built = map(float, done.stdout.split()[-2:])
            return {f"{name}_step_s": step, f"{name}_with_model_s": built, f"{name}_process_s": whole}

        if job.attempt("cold", lambda: once("cold")):
            job.attempt("warm", lambda: once("warm"))


def one_step(toy: bool) -> None:
    """In a new process: print the seconds of one step, and those from the call to its end."""
    with tempfile.TemporaryDirectory() as folder:
        side = 8 if toy else 32
        random_dataset(Path(folder) / "data", (4, side, side), 512)
        # launched: a captured step is reached only after others
        small = Train(10, 4 if toy else 256, precision="fp32" if toy else "bf16", preview_every=0, capture="off")
        model = TOY if toy else SiTConfig(name="SiT-B/2")
        config = RunConfig("bench", method="vanilla", model=model, train=small, log=Log(tensorboard=False))
        started = time.perf_counter()
        found = dry_run(config.override({"data.path": str(Path(folder) / "data")}), Path(folder) / "run", steps=1)
        print(round(found.stages[0].seconds_per_step, 2), round(time.perf_counter() - started, 2))


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


TESTS = (
    "tests/unit/models/test_fused_norm.py",
    "tests/unit/models/test_fused_bias.py",
    "tests/unit/models/test_fused_gelu.py",
    "tests/unit/train/test_captured_step.py",
    "tests/unit/sampling/test_captured_passes.py",
)


def tests(job: Any) -> None:
    """The tests that need a GPU, by pytest."""
    root = Path(__file__).parents[1]

    def run(path: str) -> dict[str, Any]:
        words = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-k", "on_a_gpu or of_a_gpu", path]
        with tempfile.TemporaryDirectory() as folder:
            found = os.pathsep.join([str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")])
            environment = os.environ | {"PYTHONPATH": found, "TMPDIR": folder}
            done = subprocess.run(
                words, cwd=root, env=environment, capture_output=True, text=True, timeout=max(1.0, job.left - 2)
            )
        print(done.stdout, file=sys.stderr)
        said = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
        if done.returncode:
            raise RuntimeError("; ".join([*(each for each in said if each.startswith("FAILED")), *said[-1:]]))
        return {"tests": job.found.get("tests", {}) | {path: said[-1]}}

    for path in TESTS:
        job.attempt(Path(path).stem, partial(run, path), needs=10.0)


#: part -> what measures it
PARTS: dict[str, Callable[[Any], None]] = {
    "correctness": correctness,
    "b2": speed,
    "first_step": first_step,
    "xl2": gpu_variants.xl2,
    "memory": gpu_variants.memory,
    "s2": speed,
    "variants": gpu_variants.variants,
    "loading": gpu_around.loading,
    "attention": gpu_around.attention,
    "compare": gpu_around.compare,
    "route": gpu_variants.route,
    "sampling": sampling,
    "variants_s2": gpu_variants.variants_s2,
    "s4": speed,
    "around": gpu_around.around,
    "tests": tests,
    "tuned": gpu_variants.tuned,
}

if __name__ == "__main__":
    one_step("--toy" in sys.argv)
