"""The Triton kernels of `fused_bias`; imported where they are launched, as they need a GPU and the package triton.

One program takes the rows of one chunk in tiles of a few rows and some of the channels. The sums over rows stay in registers
until the chunk is done, so each input is read once. The sums of the chunks are added by torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 256  #: rows of a program: with fewer, sums cost more traffic; with more, large GPUs run short of programs
COLUMNS = 128  #: channels of a program of `_gelu_backward`
TILE = 2048  #: elements of a tile of `_gelu_backward`: two 16-byte loads a thread of each input, in bfloat16
HEADS_TILE = 1024  #: of `_heads_backward`, which has three sums for each element
WARPS = 4
STAGES = 3  #: tiles in flight: two are loaded while one is computed


# Read: d, x (rows, D), contiguous. Written: d_x (rows, D), sums (chunks, D) in float32. ROWS, COLUMNS: of a tile.
@triton.jit
def _gelu_backward(  # type: ignore[no-untyped-def]
    d_ptr, x_ptr, d_x_ptr, sums_ptr, rows,
    D: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    chunk = tl.program_id(1).to(tl.int64)
    inside = columns < D
    d_bias = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in tl.range(0, CHUNK // ROWS, num_stages=STAGES):
        row = chunk * CHUNK + step * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * D + columns[None, :]
        present = (row < rows)[:, None] & inside[None, :]
        x = tl.load(x_ptr + at, mask=present, other=0.0).to(tl.float32)
        d = tl.load(d_ptr + at, mask=present, other=0.0).to(tl.float32)
        square = x * x
        # 2 u of gelu(x) = x sigmoid(2 u), and its derivative times x; 1.59577 = 2 sqrt(2 / pi)
        part = tl.sigmoid(x * (1.5957691216057308 + 0.07135481282770186 * square))
        slope = x * (1.5957691216057308 + 0.21406443848310558 * square)
        d_x = d * part * (1.0 + slope * (1.0 - part))
        d_bias += d_x
        tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=present)
    tl.store(sums_ptr + chunk * D + columns, tl.sum(d_bias, axis=0), mask=inside)


# Read: d_q, d_k, d_v (rows, HEADS, D), x (rows, 3, HEADS, D), all contiguous; weights (D,) of the norms of queries and keys,
# where NORMS is 2; with 0 neither these nor x. Written: d_x as x, sums (chunks, 3, 3, HEADS, D) in float32: of d_x, d, and
# d times the normalised x. A program takes one head of the queries, keys or values. BLOCK: D rounded up to a power of two.
@triton.jit
def _heads_backward(  # type: ignore[no-untyped-def]
    d_q_ptr, d_k_ptr, d_v_ptr, x_ptr, q_weight_ptr, k_weight_ptr, d_x_ptr, sums_ptr, rows, eps,
    HEADS: tl.constexpr, D: tl.constexpr, NORMS: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)  # of all, 3 HEADS
    part = head // HEADS
    chunk = tl.program_id(1).to(tl.int64)
    d_ptr, weight_ptr = d_q_ptr, q_weight_ptr
    if part == 1:
        d_ptr, weight_ptr = d_k_ptr, k_weight_ptr
    elif part == 2:
        d_ptr = d_v_ptr
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    weight = tl.zeros((BLOCK,), dtype=tl.float32)
    if NORMS > 0:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    d_bias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    d_shift = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    d_scale = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for step in tl.range(0, CHUNK // ROWS, num_stages=STAGES):
        row = chunk * CHUNK + step * ROWS + tl.arange(0, ROWS)
        present = (row < rows)[:, None] & inside[None, :]
        to = row[:, None] * (3 * HEADS * D) + head * D + columns[None, :]
        d = tl.load(d_ptr + row[:, None] * (HEADS * D) + (head % HEADS) * D + columns[None, :], mask=present, other=0.0)
        d = d.to(tl.float32)
        # outside the branch, so that it is loaded ahead
        x = tl.load(x_ptr + to, mask=present & (part < NORMS), other=0.0).to(tl.float32)
        if part < NORMS:
            x = tl.where(inside[None, :], x - tl.sum(x, axis=1)[:, None] / D, 0.0)
            rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
            normal = x * rstd
            d_shift += d
            d_scale += d * normal
            d *= weight[None, :]
            along_ones = tl.sum(d, axis=1)[:, None] / D
            along_normal = tl.sum(d * normal, axis=1)[:, None] / D
            d = tl.where(inside[None, :], rstd * (d - along_ones - normal * along_normal), 0.0)
        # rows beyond the last have d = 0, and so gradients of zero
        d_bias += d
        tl.store(d_x_ptr + to, d.to(d_x_ptr.dtype.element_ty), mask=present)
    sums = sums_ptr + chunk * (9 * HEADS * D) + head * D + columns
    tl.store(sums, tl.sum(d_bias, axis=0), mask=inside)
    tl.store(sums + 3 * HEADS * D, tl.sum(d_shift, axis=0), mask=inside)
    tl.store(sums + 6 * HEADS * D, tl.sum(d_scale, axis=0), mask=inside)


def gelu_sizes() -> dict[str, int]:
    """The sizes of a program of `_gelu_backward`."""
    return {"CHUNK": CHUNK, "ROWS": TILE // COLUMNS, "COLUMNS": COLUMNS, "STAGES": STAGES}


def heads_sizes(width: int) -> dict[str, int]:
    """The sizes of a program of `_heads_backward` on heads of `width` channels."""
    block = triton.next_power_of_2(width)
    return {"CHUNK": CHUNK, "ROWS": max(HEADS_TILE // block, 1), "BLOCK": block, "STAGES": STAGES}


def launch_gelu(d: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The result of `fused_bias.gelu_backward` on a GPU. Equal inputs give the same bits."""
    d, x = d.contiguous(), x.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    d_x = torch.empty_like(x)
    sums = x.new_empty((triton.cdiv(rows, CHUNK), width), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _gelu_backward[(triton.cdiv(width, COLUMNS), len(sums))](
            d, x, d_x, sums, rows, D=width, **gelu_sizes(), num_warps=WARPS
        )
    return d_x, sums.sum(dim=0)


def launch_heads(
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The result of `fused_bias.heads_backward` on a GPU. Equal inputs give the same bits."""
    heads, width = d_q.shape[-2:]
    d_q, d_k, d_v, qkv = d_q.contiguous(), d_k.contiguous(), d_v.contiguous(), qkv.contiguous()
    rows = qkv.numel() // qkv.shape[-1]
    d_x = torch.empty_like(qkv)
    sums = qkv.new_empty((triton.cdiv(rows, CHUNK), 3, 3, heads, width), dtype=torch.float32)
    norms = 0 if q_weight is None else 2
    q_weight, k_weight = (qkv if weight is None else weight for weight in (q_weight, k_weight))  # qkv: never read
    with torch.cuda.device_of(qkv):
        _heads_backward[(3 * heads, len(sums))](
            d_q, d_k, d_v, qkv, q_weight, k_weight, d_x, sums, rows, eps,
            HEADS=heads, D=width, NORMS=norms, **heads_sizes(width), num_warps=WARPS,
        )  # fmt: skip
    return d_x, sums.sum(dim=0)
