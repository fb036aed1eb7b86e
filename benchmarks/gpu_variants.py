"""Three parts of `gpu_parts.py`: other choices for the same training step, those that inductor tunes by timing its kernels, and
SiT-XL/2 at batch 256 in 80 GB.

Every variant is a captured step of vanilla training, built and measured as the rows of `selftrans bench`, one after the other
in one process. A variant that fails says so, and the next one is measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch

from selftrans.experiments.bench import bench
from selftrans.models import fused_bias, fused_norm
from selftrans.models.sit import SiTConfig

#: part -> model, tokens, batch on a GPU
MODELS = {
    "s4": ("SiT-S/4", 64, 256),
    "s2": ("SiT-S/2", 256, 256),
    "b2": ("SiT-B/2", 256, 256),
    "xl2": ("SiT-XL/2", 256, 64),
}
TOY = SiTConfig(width=32, depth=3, heads=2, patch=2)
GIGABYTES = 80.0  #: of the part `memory`: what a GPU of this size has
RECOMPUTED = 12  #: blocks of XL/2, as docs/step.md has it on paper


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """Attention by torch's flash kernel where it takes the sizes; no compiled code that was kept, which has cuDNN's within."""
    from torch._functorch import config

    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with config.patch(enable_autograd_cache=False):
            yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def inductor(**settings: Any) -> contextlib.AbstractContextManager[Any]:
    """With these settings of inductor; "__" stands for a dot. AttributeError for one that this torch does not have."""
    from torch._inductor import config

    return config.patch({name.replace("__", "."): value for name, value in settings.items()})


Choice = tuple[Callable[[], contextlib.AbstractContextManager[Any]], dict[str, Any]]
PRODUCTS = {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON"}
#: name -> what is different while it is measured, and settings of the run
VARIANTS: dict[str, Choice] = {
    "as it is": (contextlib.nullcontext, {}),
    "norms by inductor": (lambda: mock.patch.object(fused_norm, "FUSED_NORMS", False), {}),
    "biases in the kernels": (lambda: mock.patch.object(fused_bias, "FUSED_BIASES", True), {}),
    "without cuDNN": (without_cudnn, {}),
    "kernels joined": (lambda: inductor(combo_kernels=True), {}),
    "fewer partial sums": (lambda: inductor(triton__mix_order_reduction_split_size=1024), {}),
    "fp8": (contextlib.nullcontext, {"train.fp8": "rowwise"}),
}
#: as `VARIANTS`; some twenty Triton kernels for each product of a block are compiled and timed, with GELU in their epilogue and
#: against cuBLAS without, or several versions of each other kernel
TUNED: dict[str, Choice] = {
    "as it is": VARIANTS["as it is"],
    "products tuned": (lambda: inductor(**PRODUCTS), {}),
    "products tuned, TMA": (lambda: inductor(**PRODUCTS, triton__enable_persistent_tma_matmul=True), {}),
    "other kernels tuned": (lambda: inductor(coordinate_descent_tuning=True), {}),
}


def measured(job: Any, folder: str, name: str, model: SiTConfig, rows: tuple[str, ...], **given: Any) -> dict[str, Any]:
    """What `bench` measures of a model, without sampling. MemoryError where it does not fit."""
    out = job.out / f"bench-{job.part}-{folder.replace('/', '-').replace(' ', '-')}"
    found = bench({name: model}, out, rows=rows, steps_only=True, **given)["models"][name]
    if "failed" in found:
        raise MemoryError(found["failed"])
    return dict(found)


def variants(job: Any) -> None:
    """Milliseconds a step of each variant and model; the largest model first, where most time is spent."""
    for part in ("b2",) if job.toy else ("b2", "s2", "s4"):
        compared(job, part, VARIANTS)


def tuned(job: Any) -> None:
    """The same of SiT-B/2 with kernels that inductor has timed; their first step takes minutes."""
    compared(job, "b2", TUNED)


def compared(job: Any, part: str, choices: Mapping[str, Choice]) -> None:
    """Milliseconds of a step, and seconds of the first one, of the model of a part with each of these choices."""
    model, tokens, batch = ("toy", 16, 4) if job.toy else MODELS[part]
    for name, choice in choices.items():
        if job.left < 15 or (job.toy and choice[1]):  # eight bits need bf16
            continue
        job.attempt(f"{model}, {name}", partial(variant, job, model, tokens, batch, name, choice))


def variant(job: Any, model: str, tokens: int, batch: int, name: str, choice: Choice) -> dict[str, float]:
    """One variant of one model."""
    changed, over = choice
    config = TOY if job.toy else SiTConfig(name=model)
    given = {"batch_size": batch, "tokens": tokens, "seconds": 0.0 if job.toy else 3.0, "limit": job.left}
    given |= {"quick": job.toy, "overrides": over}
    with changed():
        found = measured(job, f"{model} {name}", model, config, ("captured_vanilla",), **given)
    row = found["rows"]["captured_vanilla"]
    return {f"{model}, {name}, ms": row["ms"], f"{model}, {name}, first step s": row["first_step_s"]}


def memory(job: Any) -> None:
    """Peak and rate of SiT-XL/2 at batch 256 with some blocks recomputed, in 80 GB; of the whole of a smaller GPU."""
    config, batch, tokens = (TOY, 4, 16) if job.toy else (SiTConfig(name="SiT-XL/2"), 256, 256)
    over = {"train.recompute": 1 if job.toy else RECOMPUTED}
    if not job.toy:
        whole = torch.cuda.get_device_properties(0).total_memory / 1e9
        job.found["limit_gb"] = min(GIGABYTES, whole)
        torch.cuda.set_per_process_memory_fraction(min(1.0, GIGABYTES / whole))

    def once(rows: tuple[str, ...]) -> dict[str, Any]:
        given = {"batch_size": batch, "tokens": tokens, "seconds": 0.0, "limit": job.left, "quick": job.toy}
        found = measured(job, rows[0], "toy" if job.toy else "SiT-XL/2", config, rows, overrides=over, **given)
        return {"models": job.found.get("models", {}) | {f"{rows[0]}, {over['train.recompute']} recomputed": found}}

    job.attempt("vanilla", lambda: once(("vanilla",)))
    if job.left > 20 or job.toy:
        job.attempt("stage 2", lambda: once(("stage2",)))
