"""The products of `fused_gelu`, by cuBLASLt; imported where they are launched, as they need a GPU and nvmath-python.

cuBLASLt has matrices by columns, so a tensor (..., C) with R rows is its matrix C x R with leading dimension C. The products:

- forward: act (H x rows) = gelu(W1 (D x H)^T x (D x rows) + bias), with the argument of gelu as a second output;
- backward: d_hidden (H x rows) = W2 (H x D) d (D x rows) times the derivative of gelu, and the sums of its rows.

A bias, or its gradient, has an element for each row of the matrix that is written, and its dtype.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from nvmath import CudaDataType
from nvmath.bindings import cublas, cublasLt
from torch import Tensor

WORKSPACE = 32 << 20  #: bytes that a product may use besides its operands: what NVIDIA recommends for Hopper
ALIGNMENT = 256  #: bytes: what cuBLASLt expects of an address by default
ONE, ZERO = np.ones((), np.float32), np.zeros((), np.float32)  #: factors of the product and of what was there before


class _Plan(NamedTuple):
    """What a product of one shape needs: objects of cuBLASLt by address. They are kept as long as the process runs."""

    handle: int
    description: int
    layouts: tuple[int, int, int]  #: of weight, input, output
    algorithm: Any  #: the result of the search, which begins with the algorithm


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The result of `fused_gelu.linear_gelu` on a GPU."""
    hidden = x.new_empty((*x.shape[:-1], len(weight)))
    act = torch.empty_like(hidden)
    _launch(cublasLt.Epilogue.GELU_AUX_BIAS, weight, x, act, bias=_ready(bias), aux=hidden)
    return hidden, act


def linear_gelu_backward(d: Tensor, weight: Tensor, hidden: Tensor, sum_inside: bool) -> tuple[Tensor, Tensor]:
    """The result of `fused_gelu.linear_gelu_backward` on a GPU. sum_inside: as `fused_gelu.SUM_INSIDE`."""
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if not sum_inside:
        _launch(cublasLt.Epilogue.DGELU, weight, d, d_hidden, bias=None, aux=_ready(hidden))
        return d_hidden, d_hidden.flatten(end_dim=-2).sum(dim=0)
    d_bias = hidden.new_empty(hidden.shape[-1:])
    _launch(cublasLt.Epilogue.DGELU_BGRAD, weight, d, d_hidden, bias=d_bias, aux=_ready(hidden))
    return d_hidden, d_bias


def _launch(epilogue: int, weight: Tensor, x: Tensor, out: Tensor, *, bias: Tensor | None, aux: Tensor) -> None:
    """One product on the current stream. The host does not wait, and the workspace is torch's, so that graphs can record it."""
    weight, x = _ready(weight), _ready(x)
    device = x.device.index
    with torch.cuda.device(device):
        plan = _plan(device, epilogue, tuple(weight.shape), x.numel() // x.shape[-1])
        # addresses are read when the product is launched: a plan serves one thread at a time
        if bias is not None:
            _describe(plan.description, "BIAS_POINTER", bias.data_ptr())
        _describe(plan.description, "EPILOGUE_AUX_POINTER", aux.data_ptr())
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=x.device)
        a, b, d = plan.layouts
        cublasLt.matmul(
            plan.handle, plan.description, ONE.ctypes.data, weight.data_ptr(), a, x.data_ptr(), b,
            ZERO.ctypes.data, out.data_ptr(), d, out.data_ptr(), d,
            plan.algorithm.ptr, workspace.data_ptr(), WORKSPACE, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip


def _ready(x: Tensor) -> Tensor:
    """x as cuBLASLt takes it; torch's tensors are aligned unless they are part of another."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


@functools.cache
def _handle(device: int) -> int:
    return cublasLt.create()


@functools.cache
def _plan(device: int, epilogue: int, weight: tuple[int, int], rows: int) -> _Plan:
    """RuntimeError, in one line, where cuBLASLt has no such product."""
    forward = epilogue == cublasLt.Epilogue.GELU_AUX_BIAS
    width, hidden = reversed(weight) if forward else weight
    description = cublasLt.matmul_desc_create(cublas.ComputeType.COMPUTE_32F, CudaDataType.CUDA_R_32F)
    _describe(description, "TRANSA", int(forward))
    _describe(description, "EPILOGUE", epilogue)
    _describe(description, "EPILOGUE_AUX_LD", hidden)
    # an algorithm is only found if addresses are given
    _describe(description, "EPILOGUE_AUX_POINTER", ALIGNMENT)
    if epilogue != cublasLt.Epilogue.DGELU:
        _describe(description, "BIAS_POINTER", ALIGNMENT)
    a, b, d = layouts = tuple(
        cublasLt.matrix_layout_create(CudaDataType.CUDA_R_16BF, columns, count, columns)
        for count, columns in (weight, (rows, width), (rows, hidden))
    )
    preference = cublasLt.matmul_preference_create()
    attribute = cublasLt.MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES
    limit = np.array(WORKSPACE, cublasLt.get_matmul_preference_attribute_dtype(attribute))
    cublasLt.matmul_preference_set_attribute(preference, attribute, limit.ctypes.data, limit.nbytes)
    found, count = cublasLt.MatmulHeuristicResult(1), np.zeros((), np.int32)
    handle = _handle(device)
    reason = "it found no algorithm"
    try:
        cublasLt.matmul_algo_get_heuristic(handle, description, a, b, d, d, preference, 1, found.ptr, count.ctypes.data)
    except cublasLt.cuBLASLtError as error:
        reason = str(error)
    cublasLt.matmul_preference_destroy(preference)
    if int(count) == 0:
        name = cublasLt.Epilogue(epilogue).name
        raise RuntimeError(f"cuBLASLt has no product with {name} for {rows} rows and weight {weight}: {reason}")
    return _Plan(handle, description, layouts, found)


def _describe(description: int, name: str, value: int) -> None:
    """Set an attribute of a product."""
    attribute = cublasLt.MatmulDescAttribute[name]
    given = np.array(value, cublasLt.get_matmul_desc_attribute_dtype(attribute))
    cublasLt.matmul_desc_set_attribute(description, attribute, given.ctypes.data, given.nbytes)
