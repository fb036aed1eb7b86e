"""An MLP whose products also do GELU, its gradient and the sum for a bias, in blocks compiled for a GPU.

Inductor computes GELU by a kernel after the product of the first layer, the gradient of GELU by a kernel after a product of the
second layer's backward pass, and from that the gradient of the first bias by one more kernel. Here cuBLASLt does it in the
epilogues of these two products (`gelu_product`):

- forward of the first layer (GELU_AUX_BIAS): writes the output of the layer, kept for the backward pass, and its GELU;
- backward of the second layer (DGELU_BGRAD): writes the gradient of the first layer's output, and its sum over all tokens.

Both are operators to torch.compile, with the formulas in plain torch for the CPU. SELFTRANS_EPILOGUES=1 in the environment
switches them on for bfloat16, where `fused_norm` is in use; they need nvmath-python. They have not run on a GPU yet.

Shape legend: N batch, T tokens, D width, H width of the hidden layer.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selftrans.models import fused_bias, fused_norm

EPILOGUES = os.environ.get("SELFTRANS_EPILOGUES", "0") != "0"  #: whether compiled blocks use them
#: whether the second product sums its output for the bias, or else (DGELU) a kernel of torch after it
SUM_INSIDE = True
MULTIPLE = 8  #: of D and H: cuBLASLt takes rows of 16 bytes


def check() -> None:
    """ValueError, in one line, where the epilogues are asked for on a GPU without the library that has them."""
    used = EPILOGUES and fused_norm.FUSED_NORMS and torch.cuda.is_available()
    if used and importlib.util.find_spec("nvmath") is None:
        raise ValueError("SELFTRANS_EPILOGUES needs nvmath-python: pip install 'selftrans[epilogues]', or unset it")


def applies(fc1: nn.Module, fc2: nn.Module, x: Tensor) -> bool:
    """Whether to compute these two layers of an MLP by `mlp`. x: the input of the first (N, T, D).

    Not for layers that only look linear, those of adapters and in eight bits.
    """
    if not (EPILOGUES and fused_norm.applies(x) and x.dtype == torch.bfloat16):
        return False
    return all(type(layer) is nn.Linear and layer.bias is not None and _fits(layer) for layer in (fc1, fc2))


def _fits(layer: nn.Linear) -> bool:
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


def mlp(fc1: nn.Linear, fc2: nn.Linear, x: Tensor, *, bias_apart: bool = False) -> Tensor:
    """fc2(gelu(fc1(x))) of x (N, T, D), in the dtype of x. bias_apart: the gradient of fc2's bias is left to another function
    (`fused_bias.linear`)."""
    last = fc2.bias.detach() if bias_apart else fc2.bias
    parameters = (fc1.weight, fc1.bias, fc2.weight, last)
    return _Mlp.apply(x, *(each if each.dtype == x.dtype else each.to(x.dtype) for each in parameters))


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        hidden, act = linear_gelu(x, weight1, bias1)
        ctx.save_for_backward(x, hidden, act, weight1, weight2)
        return F.linear(act, weight2, bias2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (d,) = gradients
        x, hidden, act, weight1, weight2 = ctx.saved_tensors
        d_hidden, d_bias1 = linear_gelu_backward(d, weight2, hidden)
        rows, d_rows, d_hidden_rows = (each.flatten(end_dim=-2) for each in (x, d, d_hidden))
        d_weight1, d_weight2 = d_hidden_rows.T @ rows, d_rows.T @ act.flatten(end_dim=-2)
        return d_hidden @ weight1, d_weight1, d_bias1, d_weight2, d_rows.sum(dim=0)


@torch.library.custom_op("selftrans::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The output (N, T, H) of a linear layer of x (N, T, D), weight (H, D), bias (H,); and its tanh-GELU."""
    if x.is_cuda:
        from selftrans.models import gelu_product

        return gelu_product.linear_gelu(x, weight, bias)
    hidden = F.linear(x, weight, bias)
    return hidden, F.gelu(hidden, approximate="tanh")


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], len(weight))
    return x.new_empty(shape), x.new_empty(shape)


@torch.library.custom_op("selftrans::linear_gelu_backward", mutates_args=())
def linear_gelu_backward(d: Tensor, weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of hidden (N, T, H) from d (N, T, D), that of gelu(hidden) weight^T, weight (D, H); and its sum over samples
    and tokens (H,), in the dtype of hidden."""
    if d.is_cuda:
        from selftrans.models import gelu_product

        return gelu_product.linear_gelu_backward(d, weight, hidden, SUM_INSIDE)
    d_hidden, sums = fused_bias.gelu_backward(d @ weight, hidden)
    return d_hidden, sums.to(hidden.dtype, copy=True)


@linear_gelu_backward.register_fake
def _(d: Tensor, weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format), hidden.new_empty(hidden.shape[-1:])
