"""Gradients of the biases of a block, summed in the kernels that compute what they are sums of, in blocks compiled for a GPU.

The gradient of a bias is the sum over all tokens of the gradient of the layer's output. Inductor writes that gradient with one
kernel and reads it again with another. Here the forward pass is as without this module, but each layer takes its bias detached,
and the function that follows the layer returns the gradient of the bias from its own backward pass:

- queries, keys, values: a Triton kernel (`bias_kernel`) that also does the norms of queries and keys and their sums;
- last layer of attention: the Triton kernel of `fused_norm`;
- first layer of the MLP: a Triton kernel with the gradient of GELU;
- last layer of the MLP: inductor's kernel of the gate's gradient, a sum over the tokens of a sample as well.

The Triton kernels are operators to torch.compile, with the formulas in plain torch for the CPU. SELFTRANS_FUSED_BIASES=1 in the
environment switches all of it on, where `fused_norm` is in use. It was not measured on a GPU yet.

Shape legend: N batch, T tokens, D width, h heads, d channels of a head.
"""

from __future__ import annotations

import math
import os
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selftrans.models import fused_norm

FUSED_BIASES = os.environ.get("SELFTRANS_FUSED_BIASES", "0") != "0"  #: whether compiled blocks use it


def applies(layer: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether to sum the gradient of this layer's bias here. x: the input of the layer.

    Not for layers that only look linear to their block, those of adapters and in eight bits.
    """
    if not (FUSED_BIASES and fused_norm.applies(x) and type(layer) is nn.Linear):
        return False
    return layer.bias is not None and layer.bias.requires_grad


def linear(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The output of a layer, and its bias, if the function that takes the output returns the gradient of the bias."""
    if applies(layer, x):
        return F.linear(x, layer.weight, layer.bias.detach()), layer.bias
    return layer(x), None


def gate_add(x: Tensor, a: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    """Tokens x and a (N, T, D), gate (N, 1, D) -> x + gate * a. a, bias: the output of a layer, from `linear`."""
    return x + gate * a if bias is None else _GateAdd.apply(x, a, gate, bias)


def gelu(x: Tensor, bias: Tensor) -> Tensor:
    """tanh-GELU of x (N, T, D). x, bias: the output of a layer, from `linear`."""
    return _Gelu.apply(x, bias)


def sigmoid_gelu(x: Tensor) -> Tensor:
    """tanh-GELU as x sigmoid(2 u), which equals x (1 + tanh u) / 2."""
    wide = x.float() if x.dtype.itemsize < 4 else x
    u = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    out = wide * torch.sigmoid(2 * u)
    return out if out.dtype == x.dtype else out.to(x.dtype)


def split_heads(qkv: Tensor, bias: Tensor, heads: int, q_norm: nn.Module, k_norm: nn.Module) -> tuple[Tensor, ...]:
    """(N, T, 3 D) -> queries, keys, values (N, T, h, d), the first two normalised by a LayerNorm each, or by none.

    qkv, bias: the output of a layer, from `linear`.
    """
    if isinstance(q_norm, nn.LayerNorm) and isinstance(k_norm, nn.LayerNorm):
        return _QueriesKeysValues.apply(
            qkv, bias, heads, q_norm.eps, q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias
        )
    return _QueriesKeysValues.apply(qkv, bias, heads, 0.0, None, None, None, None)


class _GateAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(a, gate)
        ctx.bias_dtype = bias.dtype
        return x + gate * a

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (d,) = gradients
        a, gate = ctx.saved_tensors
        d_gate = (d * a).sum(dim=1, keepdim=True).to(gate.dtype)
        d_bias = (gate * d.sum(dim=1, keepdim=True)).sum(dim=(0, 1)).to(ctx.bias_dtype)
        return d.view_as(d), (gate * d).to(a.dtype), d_gate, d_bias


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bias_dtype = bias.dtype
        return sigmoid_gelu(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_bias = gelu_backward(*gradients, *ctx.saved_tensors)
        return d_x, d_bias.to(ctx.bias_dtype)


class _QueriesKeysValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        bias: Tensor,
        heads: int,
        eps: float,
        q_weight: Tensor | None,
        q_bias: Tensor | None,
        k_weight: Tensor | None,
        k_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(dim=2)
        if q_weight is not None:
            q = F.layer_norm(q, q.shape[-1:], q_weight, q_bias, eps)  # in float32 with autocast
            k = F.layer_norm(k, k.shape[-1:], k_weight, k_bias, eps)
            q, k = (each if each.dtype == v.dtype else each.to(v.dtype) for each in (q, k))
        ctx.save_for_backward(qkv, q_weight, k_weight)
        ctx.eps, ctx.bias_dtype = eps, bias.dtype
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_weight, k_weight = ctx.saved_tensors
        d_qkv, sums = heads_backward(*gradients, qkv, q_weight, k_weight, ctx.eps)
        d_bias = sums[0].flatten().to(ctx.bias_dtype)
        if q_weight is None:
            return d_qkv, d_bias, None, None, None, None, None, None
        (q_shift, k_shift, _), (q_scale, k_scale, _) = sums[1:].sum(dim=2).to(q_weight.dtype)
        return d_qkv, d_bias, None, None, q_scale, q_shift, k_scale, k_shift


@torch.library.custom_op("selftrans::gelu_backward", mutates_args=())
def gelu_backward(d: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of x (N, T, D) from d (N, T, D), that of gelu(x); and its sum over samples and tokens (D,) in float32 (float64
    for float64)."""
    if x.is_cuda:
        from selftrans.models import bias_kernel

        return bias_kernel.launch_gelu(d, x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    root = math.sqrt(2 / math.pi)
    part = torch.sigmoid(2 * root * (wide + 0.044715 * wide**3))
    slope = 2 * root * (wide + 3 * 0.044715 * wide**3)  # of the argument, times x
    d_x = d * part * (1 + slope * (1 - part))
    return d_x.to(x.dtype), d_x.flatten(end_dim=-2).sum(dim=0)


@gelu_backward.register_fake
def _(d: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape[-1:], dtype=wide)


@torch.library.custom_op("selftrans::heads_backward", mutates_args=())
def heads_backward(
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of `split_heads`, without those of the norms if there are no weights.

    Args: d_q, d_k, d_v (N, T, h, d), of queries, keys and values; qkv (N, T, 3 D); weights of the norms (d,), and their eps.
    Returns: that of qkv, and sums over samples and tokens (3, 3, h, d) in float32 (float64 for float64), on the second axis for
    queries, keys and values: of the gradient of qkv; of the gradients of shift and scale of a norm, for each head. The last
    two mean nothing where there is no norm.
    """
    if qkv.is_cuda:
        from selftrans.models import bias_kernel

        return bias_kernel.launch_heads(d_q, d_k, d_v, qkv, q_weight, k_weight, eps)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    d = torch.stack([d_q, d_k, d_v], dim=2).to(wide)  # (N, T, 3, h, d)
    d_x, normal = d.clone(), torch.zeros_like(d)
    if q_weight is not None and k_weight is not None:
        x = qkv.view(d.shape)[:, :, :2].to(wide)
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
        rstd = torch.rsqrt(variance + eps)
        normal[:, :, :2] = own = (x - mean) * rstd
        g = d[:, :, :2] * torch.stack([q_weight, k_weight]).to(wide)[:, None]
        d_x[:, :, :2] = rstd * (g - g.mean(dim=-1, keepdim=True) - own * (g * own).mean(dim=-1, keepdim=True))
    sums = torch.stack([d_x, d, d * normal]).sum(dim=(1, 2))
    return d_x.to(qkv.dtype).view(qkv.shape), sums


@heads_backward.register_fake
def _(d_q: Tensor, d_k: Tensor, d_v: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(qkv.dtype, torch.float32)
    d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    return d_qkv, qkv.new_empty((3, 3, *d_q.shape[-2:]), dtype=wide)
