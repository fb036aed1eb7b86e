"""Parts of `gpu_parts.py`: other choices for the same training step, those that inductor tunes by timing its kernels, routed
tokens, SiT-XL/2, and SiT-XL/2 at batch 256 in 80 GB.

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
from selftrans.models import fused_bias, fused_gelu, fused_norm
from selftrans.models.sit import SiTConfig

#: part -> model, tokens, batch on a GPU
MODELS = {
    "s4": ("SiT-S/4", 64, 256),
    "s2": ("SiT-S/2", 256, 256),
    "b2": ("SiT-B/2", 256, 256),
    "xl2": ("SiT-XL/2", 256, 256),
}
BATCHES = (256, 128, 64)  #: of XL/2: the largest one that fits without recomputed blocks
#: GB of XL/2: weights, gradients, moments, average, casts, teacher and the products of the peak; activations of a sample
FIXED, SAMPLE = 20.0, 0.36
TOY = SiTConfig(width=32, depth=3, heads=2, patch=2)
GIGABYTES = 80.0  #: of the part `memory`: what a GPU of this size has
RECOMPUTED = (12, 16, 20)  #: blocks of XL/2: as docs/step.md has it on paper, and more where these do not fit
NEEDED = 20.0  #: seconds of a captured step whose code is compiled already, built and measured
ROUTE = 0.5  #: share of the tokens that skip the middle blocks


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


@contextlib.contextmanager
def epilogues(sum_inside: bool = True) -> Iterator[None]:
    """Biases in the kernels, and GELU in the epilogues of products; sum_inside: with the sum for the bias before GELU."""
    changes = (
        (fused_bias, "FUSED_BIASES", True),
        (fused_gelu, "EPILOGUES", True),
        (fused_gelu, "SUM_INSIDE", sum_inside),
    )
    with contextlib.ExitStack() as changed:
        for change in changes:
            changed.enter_context(mock.patch.object(*change))
        yield


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
    "epilogues of cuBLASLt": (epilogues, {}),
    "epilogues without the sum": (lambda: epilogues(sum_inside=False), {}),
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
    """Milliseconds a step of SiT-B/2 with each variant."""
    compared(job, "b2", VARIANTS)


def variants_s2(job: Any) -> None:
    """The same of SiT-S/2."""
    compared(job, "s2", VARIANTS)


def tuned(job: Any) -> None:
    """The same of SiT-B/2 with kernels that inductor has timed; their first step takes minutes."""
    compared(job, "b2", TUNED)


def compared(job: Any, part: str, choices: Mapping[str, Choice]) -> None:
    """Milliseconds of a step, and seconds of the first one, of the model of a part with each of these choices.

    Loss and norm of the gradient of the first steps are those of the same weights, data and noise: they may differ by rounding
    alone. What an earlier call has measured on such a GPU stays; what failed there, or did not end, comes last.
    """
    model, tokens, batch = ("toy", 16, 4) if job.toy else MODELS[part]
    job.found["choices"] = job.earlier(job.found["machine"]).get("choices", {})

    def once(name: str) -> dict[str, Any]:
        changed, over = choices[name]
        config = TOY if job.toy else SiTConfig(name=model)
        given = {"batch_size": batch, "tokens": tokens, "seconds": 0.0 if job.toy else 3.0, "limit": job.left}
        given |= {"quick": job.toy, "overrides": over}
        with changed():
            found = measured(job, f"{model} {name}", model, config, ("captured_vanilla",), **given)
        return {"choices": job.found["choices"] | {name: found["rows"]["captured_vanilla"]}}

    left = [name for name in choices if name not in job.found["choices"]]
    for name in sorted(left, key=lambda name: job.stopped(f"{model}, {name}")):
        if not (job.toy and "train.fp8" in choices[name][1]):  # eight bits need bf16
            job.attempt(f"{model}, {name}", partial(once, name), needs=NEEDED)


def one_by_one(job: Any, title: str, model: str, config: SiTConfig, rows: tuple[str, ...], **given: Any) -> bool:
    """The rows of a model, each built alone, so that the memory of one is enough. Whether all were measured.

    Those that an earlier call has measured on such a GPU stay; what failed there, or did not end, comes last.
    """
    job.found.setdefault("models", job.earlier(job.found["machine"]).get("models", {}))

    def once(row: str) -> dict[str, Any]:
        found = measured(job, f"{title} {row}", model, config, (row,), limit=job.left, quick=job.toy, **given)
        before = job.found["models"].get(title, {"rows": {}})
        return {"models": job.found["models"] | {title: found | {"rows": before["rows"] | found["rows"]}}}

    left = [row for row in rows if row not in job.found["models"].get(title, {"rows": {}})["rows"]]
    left.sort(key=lambda row: job.stopped(f"{title}, {row}"))
    done = [job.attempt(f"{title}, {row}", partial(once, row), needs=NEEDED) for row in left]
    return all(done)


def xl2(job: Any) -> None:
    """Steps of SiT-XL/2 at the largest batch that fits: as many products at a time as the GPU can take."""
    name, config, batch = ("toy", TOY, 4) if job.toy else ("SiT-XL/2", SiTConfig(name="SiT-XL/2"), largest_batch())
    given = {"batch_size": batch, "tokens": 16 if job.toy else 256, "seconds": 0.0 if job.toy else 4.0}
    one_by_one(job, f"{name} batch {batch}", name, config, ("vanilla", "captured_vanilla", "stage2"), **given)


def largest_batch() -> int:
    """Of `BATCHES`."""
    gigabytes = torch.cuda.get_device_properties(0).total_memory / 1e9
    return next((batch for batch in BATCHES if FIXED + SAMPLE * batch < gigabytes), BATCHES[-1])


def route(job: Any) -> None:
    """Captured steps in which half of the tokens skip the middle blocks (`model.route`)."""
    models = {
        f"{name} route {ROUTE}": (name, tokens, batch)
        for name, tokens, batch in ([("toy", 16, 4)] if job.toy else [MODELS["b2"], MODELS["s2"]])
    }
    pieces = [(title, row) for title in models for row in ("captured_vanilla", "captured_stage2")]
    # of both models: an error of the first one may end the use of the GPU
    for title, row in sorted(pieces, key=lambda piece: job.stopped(", ".join(piece))):
        name, tokens, batch = models[title]
        given: dict[str, Any] = {"batch_size": batch, "tokens": tokens, "seconds": 0.0 if job.toy else 4.0}
        given["overrides"] = {"model.route": ROUTE}
        one_by_one(job, title, name, TOY if job.toy else SiTConfig(name=name), (row,), **given)


def memory(job: Any) -> None:
    """Peak and rate of SiT-XL/2 at batch 256 with some blocks recomputed, in 80 GB; of the whole of a smaller GPU."""
    name, config, batch = ("toy", TOY, 4) if job.toy else ("SiT-XL/2", SiTConfig(name="SiT-XL/2"), 256)
    if not job.toy:
        whole = torch.cuda.get_device_properties(0).total_memory / 1e9
        job.found["limit_gb"] = min(GIGABYTES, whole)
        torch.cuda.set_per_process_memory_fraction(min(1.0, GIGABYTES / whole))
    given: dict[str, Any] = {"batch_size": batch, "tokens": 16 if job.toy else 256, "seconds": 0.0}
    for blocks in (1,) if job.toy else RECOMPUTED:
        title = f"{name} batch {batch}, {blocks} recomputed"
        if f"{title}, vanilla: MemoryError" in job.before.get("failed", ""):
            continue
        given["overrides"] = {"train.recompute": blocks}
        if one_by_one(job, title, name, config, ("vanilla",), **given) or job.postponed:
            one_by_one(job, title, name, config, ("stage2",), **given)
            break
