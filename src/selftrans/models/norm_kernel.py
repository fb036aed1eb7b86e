"""The Triton kernel of `fused_norm`; imported where it is launched, as it needs a GPU and the package triton.

One program takes the tokens of one chunk of one sample, one after the other. A row of D channels lies in registers, as do the
per-sample sums over the tokens of the chunk, so each input is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 32  #: most tokens of a chunk: with fewer, sums cost more memory traffic; with more, large GPUs run short of programs
STAGES = 3  #: rows in flight: two are loaded while one is computed
WIDEST = 2048  #: with wider rows, those in flight do not fit the shared memory of some GPUs
PROGRAMS = 1024  #: fewest programs that keep a large GPU busy


# Read: d_x1, d_y, x, a (N, T, D) and contiguous, gate and scale (N, D) with row strides, mean and rstd (N, T) in float32.
# Written: d_x, d_a (N, T, D), sums (N, chunks, SUMS, D) in float32 of shift, scale, gate, d_a. D: channels; BLOCK: D rounded up
# to a power of two; CHUNK: tokens of a program; SUMS: 2 to 4; with 2 there is no a, gate and d_a.
@triton.jit
def _gate_norm_backward(  # type: ignore[no-untyped-def]
    d_x1_ptr, d_y_ptr, x_ptr, a_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr, d_x_ptr, d_a_ptr, sums_ptr,
    gate_stride, scale_stride, tokens, chunks,
    CHUNK: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    first = (program % chunks) * CHUNK
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    factor = 1.0 + tl.load(scale_ptr + sample * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
    d_shift = tl.zeros((BLOCK,), dtype=tl.float32)
    d_scale = tl.zeros((BLOCK,), dtype=tl.float32)
    if SUMS > 2:
        gate = tl.load(gate_ptr + sample * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        d_gate = tl.zeros((BLOCK,), dtype=tl.float32)
    if SUMS > 3:
        d_total = tl.zeros((BLOCK,), dtype=tl.float32)
    for step in tl.range(0, CHUNK, num_stages=STAGES):
        token = first + step
        row = sample * tokens + token
        at = row * D + columns
        present = columns < tl.where(token < tokens, D, 0)
        d_y = tl.load(d_y_ptr + at, mask=present, other=0.0).to(tl.float32)
        x1 = tl.load(x_ptr + at, mask=present, other=0.0).to(tl.float32)
        d_x1 = tl.load(d_x1_ptr + at, mask=present, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=token < tokens, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=token < tokens, other=0.0)
        if SUMS > 2:
            a = tl.load(a_ptr + at, mask=present, other=0.0).to(tl.float32)
            x1 += gate * a
        normal = (x1 - mean) * rstd  # not zero outside, where d_y is
        d_normal = d_y * factor
        d_shift += d_y
        d_scale += d_y * normal
        along_ones = tl.sum(d_normal, axis=0) / D
        along_normal = tl.sum(d_normal * normal, axis=0) / D
        d_x1 += rstd * (d_normal - along_ones - normal * along_normal)
        tl.store(d_x_ptr + at, d_x1.to(d_x_ptr.dtype.element_ty), mask=present)
        if SUMS > 2:
            d_gate += d_x1 * a
            tl.store(d_a_ptr + at, (gate * d_x1).to(d_a_ptr.dtype.element_ty), mask=present)
        if SUMS > 3:
            d_total += d_x1
    sums = sums_ptr + program.to(tl.int64) * (SUMS * D) + columns
    tl.store(sums, d_shift, mask=inside)
    tl.store(sums + D, d_scale, mask=inside)
    if SUMS > 2:
        tl.store(sums + 2 * D, d_gate, mask=inside)
    if SUMS > 3:
        tl.store(sums + 3 * D, gate * d_total, mask=inside)


def warps_of(block: int) -> int:
    """Warps of a program on rows of `block` channels, at most 32: four channels a thread. bfloat16 and float32 then have one
    layout; with eight, values are exchanged between threads before they are stored."""
    return min(max(block // 128, 1), 32)


def stages_of(block: int) -> int:
    """Rows in flight of `block` channels."""
    return STAGES if block <= WIDEST else 1


def chunk_of(samples: int, tokens: int) -> int:
    """Tokens of a program: a power of two from 8 to `TOKENS`, so that there are `PROGRAMS` programs if possible."""
    chunk = TOKENS
    while chunk > 8 and samples * -(-tokens // chunk) < PROGRAMS:
        chunk //= 2
    return chunk


def launch(
    d_x1: Tensor,
    d_y: Tensor,
    x: Tensor,
    a: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    biased: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result of `fused_norm.gate_norm_backward` on a GPU. Equal inputs give the same bits."""
    samples, tokens, width = x.shape
    chunk = chunk_of(samples, tokens)
    chunks = -(-tokens // chunk)
    gated = a is not None and gate is not None
    d_x1, d_y, x = d_x1.contiguous(), d_y.contiguous(), x.contiguous()
    a = x if a is None else a.contiguous()  # x and scale: never read
    gate = scale if gate is None else gate
    gate, scale = (each if each.stride(-1) == 1 else each.contiguous() for each in (gate, scale))
    d_x = torch.empty_like(x)
    d_a = torch.empty_like(a) if gated else x.new_empty(0)
    sums = x.new_empty((samples, chunks, 2 + gated + biased, width), dtype=torch.float32)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _gate_norm_backward[(samples * chunks,)](
            d_x1, d_y, x, a, gate, scale, mean.contiguous(), rstd.contiguous(), d_x, d_a, sums,
            gate.stride(0), scale.stride(0), tokens, chunks,
            CHUNK=chunk, D=width, BLOCK=block, SUMS=sums.shape[2], STAGES=stages_of(block), num_warps=warps_of(block),
        )  # fmt: skip
    return d_x, d_a, sums.sum(dim=1)
