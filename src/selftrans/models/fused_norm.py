"""Modulated LayerNorm of a transformer block whose backward pass reads each activation once, in blocks compiled for a GPU.

Backward of `x1 = x + gate * a; y = LayerNorm(x1) * (1 + scale) + shift` needs sums over the channels of a token (for the
gradient of the norm) and over the tokens of a sample (for the gradients of shift, scale and gate). Inductor makes one kernel
for the first and others for the second, which read the activations again: 34 bytes for each token and channel with a float32
residual and bfloat16 activations, and 20 for the first norm of a block, which has no gate. A Triton kernel (`norm_kernel`)
makes both sums in one pass: 18 and 14 bytes. The forward pass stays with inductor, which fuses it well.

The kernel is an operator to torch.compile, `selftrans::gate_norm_backward`, with the formulas in plain torch for the CPU.
SELFTRANS_FUSED_NORMS=0 in the environment switches all of it off, 1 on with a torch older than 2.11. Compiled blocks have no
second derivative anyway; with it they have no forward-mode derivative either.

Shape legend: N batch, T tokens, D width. LayerNorm has no weights. The gradients of LayerNorm are those of Ba et al.,
1607.06450: with x^ the normalised row and g the gradient of it, rstd * (g - mean(g) - x^ mean(g x^)).
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

TESTED = "2.11"  #: the first torch whose compiler was seen to give an autograd function the right gradients
#: whether compiled blocks use it: not without Triton, on AMD GPUs (not tested), or, unless it is asked for, with an older torch
FUSED_NORMS = (
    os.environ.get("SELFTRANS_FUSED_NORMS", "1" if torch.__version__ >= TESTED else "0") != "0"
    and importlib.util.find_spec("triton") is not None
    and torch.version.hip is None
)


def applies(x: Tensor) -> bool:
    """Whether to use the fused norm: in a block that is being compiled for training on a GPU. x: its tokens (N, T, D)."""
    training = torch.compiler.is_compiling() and torch.is_grad_enabled()
    return FUSED_NORMS and training and x.is_cuda and x.dtype != torch.float64


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Tokens x (N, T, D), shift and scale (N, D) -> x, for the residual path, and the modulated norm in the dtype of `scale`.

    `scale` comes from a linear layer, so in autocast, too, the linear layer that follows takes the norm without a conversion.
    Use the returned x in place of the argument: the kernel then sums the gradients of both paths.
    """
    return _Modulated.apply(x, shift, scale, eps)


def gate_modulated(
    x: Tensor, a: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens x and a (N, T, D), gate, shift and scale (N, D) -> x + gate * a, and its modulated norm as in `modulated`.

    bias (D,): of the layer that has made a, if that layer leaves its gradient, the sum of that of a, to this function.
    """
    return _GateModulated.apply(x, a, gate, shift, scale, eps, bias)


def _forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The modulated norm of x (N, T, D), and mean and 1 / deviation of the tokens (N, T, 1).

    A tensor is not converted to the dtype that it has already: `to` would return the same tensor, and dynamo of torch 2.11 may
    then send the gradients of an autograd function to the wrong output (pytorch issue 180642).
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    normal, mean, rstd = torch.native_layer_norm(wide, (x.shape[-1],), None, None, eps)
    y = normal * (1 + scale.unsqueeze(dim=1)) + shift.unsqueeze(dim=1)
    return y if y.dtype == scale.dtype else y.to(scale.dtype), mean, rstd


class _Modulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, mean, rstd = _forward(x, shift, scale, eps)
        ctx.save_for_backward(x, scale, mean, rstd)
        return x.view_as(x), y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_x1, d_y = gradients
        x, scale, mean, rstd = ctx.saved_tensors
        d_x, _, sums = gate_norm_backward(d_x1, d_y, x, None, None, scale, mean, rstd)
        d_shift, d_scale = sums.to(scale.dtype).unbind(dim=1)
        return d_x, d_shift, d_scale, None


class _GateModulated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x1 = x + gate.unsqueeze(dim=1) * a
        y, mean, rstd = _forward(x1, shift, scale, eps)
        ctx.save_for_backward(x, a, gate, scale, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return x1, y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_x1, d_y = gradients
        x, a, gate, scale, mean, rstd = ctx.saved_tensors
        biased, d_bias = ctx.bias_dtype is not None, None
        d_x, d_a, sums = gate_norm_backward(d_x1, d_y, x, a, gate, scale, mean, rstd, biased)
        if biased:
            d_bias, sums = sums[:, 3].sum(dim=0).to(ctx.bias_dtype), sums[:, :3]
        d_shift, d_scale, d_gate = sums.to(scale.dtype).unbind(dim=1)
        return d_x, d_a, d_gate, d_shift, d_scale, None, d_bias


@torch.library.custom_op(
    "selftrans::gate_norm_backward",
    mutates_args=(),
    schema="(Tensor d_x1, Tensor d_y, Tensor x, Tensor? a, Tensor? gate, Tensor scale, Tensor mean, Tensor rstd,"
    " bool biased=False) -> (Tensor, Tensor, Tensor)",
)
def gate_norm_backward(
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
    """Gradients of `gate_modulated`, or of `modulated` with neither a nor gate.

    Args:
        d_x1, d_y: (N, T, D), of the tokens and of the modulated norm.
        x, a, gate, scale: as in `gate_modulated`; gate and scale may be columns of a wider tensor.
        mean, rstd: (N, T, 1), of the tokens x + gate * a.
        biased: whether the gradient of a is summed, too.
    Returns: those of x and a (N, T, D; of a without elements where there is none), and the sums over tokens (N, 2 to 4, D) in
    float32 (float64 for float64): of shift, scale, gate and a.
    """
    if x.is_cuda:
        from selftrans.models import norm_kernel

        return norm_kernel.launch(d_x1, d_y, x, a, gate, scale, mean, rstd, biased)
    wide = mean.dtype  # float32, or float64
    gate_row = None if gate is None else gate.to(wide).unsqueeze(dim=1)
    x1 = x.to(wide) if a is None or gate_row is None else x.to(wide) + gate_row * a.to(wide)
    normal = (x1 - mean) * rstd
    d_y = d_y.to(wide)
    d_normal = d_y * (1 + scale.to(wide).unsqueeze(dim=1))
    along = (d_normal * normal).mean(dim=-1, keepdim=True)
    total = d_x1.to(wide) + rstd * (d_normal - d_normal.mean(dim=-1, keepdim=True) - normal * along)
    sums = [d_y.sum(dim=1), (d_y * normal).sum(dim=1)]
    d_a = x.new_empty(0)
    if a is not None and gate_row is not None:
        sums.append((total * a).sum(dim=1))
        wide_a = gate_row * total
        sums += [wide_a.sum(dim=1)] if biased else []
        d_a = wide_a.to(a.dtype)
    return total.to(x.dtype, copy=True), d_a, torch.stack(sums, dim=1)


@gate_norm_backward.register_fake
def _(
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
    wide = torch.promote_types(x.dtype, torch.float32)
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    d_a = x.new_empty(0) if a is None else torch.empty_like(a, memory_format=torch.contiguous_format)
    return d_x, d_a, x.new_empty((x.shape[0], 2 if a is None else 3 + biased, x.shape[2]), dtype=wide)
