"""An MLP with GELU, its gradient and the sum for a bias in the epilogues of products, against torch's own gradients."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from selftrans.models import fused_bias, fused_gelu, fused_norm
from selftrans.models.compiling import compile_model
from selftrans.models.sit import SiT
from tests.support.kernels import assert_near, block_gradients, force_fused, needs_gpu

OPERATORS = {"linear_gelu", "linear_gelu_backward"}
D, H = 24, 40


def test_gradients_equal_those_of_autograd() -> None:
    torch.manual_seed(0)
    fc1, fc2 = nn.Linear(D, H, dtype=torch.float64), nn.Linear(H, D, dtype=torch.float64)
    x, weight = torch.randn(2, 3, 5, D, dtype=torch.float64)
    parameters = [x.requires_grad_(), *fc1.parameters(), *fc2.parameters()]
    outputs = fused_gelu.mlp(fc1, fc2, x), fc2(F.gelu(fc1(x), approximate="tanh"))
    found = [[out, *torch.autograd.grad((out * weight).sum(), parameters)] for out in outputs]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.fixture
def epilogues(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As on a GPU with SELFTRANS_EPILOGUES=1."""
    monkeypatch.setattr(fused_gelu, "EPILOGUES", True)
    force_fused(monkeypatch)
    return monkeypatch


@pytest.mark.parametrize("biases", [False, True])
def test_compiled_block_uses_the_operators_without_a_break(biases: bool, epilogues: pytest.MonkeyPatch) -> None:
    """Under recomputation of activations, alone and together with biases in the kernels."""
    with epilogues.context() as without:
        without.setattr(fused_gelu, "EPILOGUES", False)
        theirs = block_gradients("cpu")
    epilogues.setattr(fused_bias, "FUSED_BIASES", biases)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours = block_gradients("cpu")
    assert {event.key.removeprefix("selftrans::") for event in profile.key_averages()} >= OPERATORS
    assert_near(ours, theirs, 2e-2)


@pytest.mark.parametrize("trained", [("attn.proj.weight", "mlp.fc1.bias"), ("mlp.fc1",), ("mlp.fc2.bias", "attn")])
def test_frozen_parts_leave_the_other_gradients(trained: tuple[str, ...], epilogues: pytest.MonkeyPatch) -> None:
    ours = block_gradients("cpu", trained=trained)
    epilogues.setattr(fused_gelu, "EPILOGUES", False)
    theirs = block_gradients("cpu", trained=trained)
    assert ours.keys() == theirs.keys() and ours.keys() - {"out"}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=2e-2, atol=2e-2 * float(value.abs().max()))


def test_they_are_used_only_where_they_are_asked_for_and_for_plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in float32, for layers without a bias, of sizes that cuBLASLt does not take, or of a class of their own."""

    class Other(nn.Linear):
        pass

    assert not fused_gelu.EPILOGUES, "the default"
    monkeypatch.setattr(fused_norm, "FUSED_NORMS", True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode():
        x = torch.empty(1, 1, 16, device="cuda", dtype=torch.bfloat16)
        fc1, fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        assert not fused_gelu.applies(fc1, fc2, x)
        monkeypatch.setattr(fused_gelu, "EPILOGUES", True)
        assert fused_gelu.applies(fc1, fc2, x)
        assert not fused_gelu.applies(fc1, fc2, x.float()) and not fused_gelu.applies(fc1, fc2, x.cpu())
        for other in (Other(32, 16), nn.Linear(32, 16, bias=False), nn.Linear(32, 12)):
            assert not fused_gelu.applies(fc1, other, x)
        with torch.no_grad():
            assert not fused_gelu.applies(fc1, fc2, x)


def test_a_missing_library_is_said_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SiT((1, 4, 4), 2, width=16, depth=1, heads=2, patch=2)
    monkeypatch.setattr(fused_gelu, "EPILOGUES", True)
    compile_model(model)  # it is not used on a CPU
    monkeypatch.setattr(fused_norm, "FUSED_NORMS", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs nvmath-python: pip install 'selftrans\[epilogues\]'"):
        compile_model(model)


def test_the_operators_describe_their_outputs() -> None:
    x, weight, bias = torch.randn(2, 3, D), torch.randn(H, D), torch.randn(H)
    backward = torch.randn(2, 3, D), torch.randn(D, H), torch.randn(2, 3, H)
    for operator, call in (("linear_gelu", (x, weight, bias)), ("linear_gelu_backward", backward)):
        function = getattr(torch.ops.selftrans, operator).default
        torch.library.opcheck(function, call, test_utils=("test_schema", "test_faketensor"))


class Columns(SimpleNamespace):
    """cuBLASLt as its documentation describes it, on the memory of the host: matrices by columns, bfloat16."""

    def __init__(self) -> None:
        self.made: list[Any] = [None]  # by handle
        self.MatmulDescAttribute = enum.IntEnum(
            "MatmulDescAttribute", "TRANSA TRANSB EPILOGUE EPILOGUE_AUX_LD EPILOGUE_AUX_POINTER BIAS_POINTER"
        )
        self.MatmulPreferenceAttribute = enum.IntEnum("MatmulPreferenceAttribute", "MAX_WORKSPACE_BYTES")
        self.Epilogue = enum.IntEnum("Epilogue", {"GELU_AUX_BIAS": 164, "DGELU": 192, "DGELU_BGRAD": 208})
        self.MatmulHeuristicResult = lambda count: SimpleNamespace(ptr=7)
        self.get_matmul_desc_attribute_dtype = self.get_matmul_preference_attribute_dtype = lambda attribute: np.int64
        self.create = self.matmul_preference_create = lambda: 1
        self.matmul_preference_set_attribute = self.matmul_preference_destroy = lambda *_: None
        self.cuBLASLtError = ArithmeticError  # as its name there: a class that nothing else here raises
        self.algorithms, self.refused = 1, False

    def new(self, value: Any) -> int:
        self.made.append(value)
        return len(self.made) - 1

    def matmul_desc_create(self, compute: int, scale: int) -> int:
        return self.new({})

    def matrix_layout_create(self, dtype: int, rows: int, cols: int, ld: int) -> int:
        return self.new((rows, cols, ld))

    def matmul_desc_set_attribute(self, handle: int, attribute: enum.IntEnum, at: int, size: int) -> None:
        self.made[handle][attribute.name] = ctypes.c_int64.from_address(at).value

    def matmul_algo_get_heuristic(self, *given: int) -> None:
        if self.refused:
            raise ArithmeticError("not supported")
        ctypes.c_int32.from_address(given[-1]).value = self.algorithms

    @staticmethod
    def matrix(at: int, rows: int, cols: int, ld: int) -> Tensor:
        memory = torch.frombuffer((ctypes.c_uint16 * (ld * cols)).from_address(at), dtype=torch.bfloat16)
        return memory.view(cols, ld)[:, :rows].T

    def matmul(self, handle: int, description: int, alpha: int, *given: int) -> None:
        a, a_layout, b, b_layout, _, _, _, out, layout, algorithm, *_ = given
        said, shape = self.made[description], self.made[layout]
        assert algorithm == 7 and not said.get("TRANSB")
        left = self.matrix(a, *self.made[a_layout])
        product = (left.T if said["TRANSA"] else left).float() @ self.matrix(b, *self.made[b_layout]).float()
        aux = self.matrix(said["EPILOGUE_AUX_POINTER"], *shape[:2], said["EPILOGUE_AUX_LD"])
        bias = self.matrix(said["BIAS_POINTER"], shape[0], 1, shape[0]) if "BIAS_POINTER" in said else None
        assert (bias is None) == (said["EPILOGUE"] == self.Epilogue.DGELU)
        if said["EPILOGUE"] == self.Epilogue.GELU_AUX_BIAS:
            product += bias.float()
            aux.copy_(product)
            product = F.gelu(product, approximate="tanh")
        else:
            product = torch.ops.aten.gelu_backward(product, aux.float(), approximate="tanh")
            if bias is not None:
                bias.copy_(product.sum(dim=1, keepdim=True))
        self.matrix(out, *shape).copy_(product)


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`gelu_product` with this cuBLASLt, for tensors on the CPU."""
    library, bindings, made = ModuleType("nvmath"), ModuleType("nvmath.bindings"), Columns()
    library.CudaDataType = SimpleNamespace(CUDA_R_32F=0, CUDA_R_16BF=14)  # type: ignore[attr-defined]
    bindings.cublas = SimpleNamespace(ComputeType=SimpleNamespace(COMPUTE_32F=68))  # type: ignore[attr-defined]
    bindings.cublasLt = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvmath", library)
    monkeypatch.setitem(sys.modules, "nvmath.bindings", bindings)
    monkeypatch.delitem(sys.modules, "selftrans.models.gelu_product", raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    from selftrans.models import gelu_product

    yield SimpleNamespace(product=gelu_product, library=made)
    sys.modules.pop("selftrans.models.gelu_product", None)


def test_products_by_columns_equal_the_formulas(columns: Any) -> None:
    """Also of tensors that are not contiguous, or begin within another; a shape is prepared once."""
    torch.manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16)

    for sum_inside in (True, True, False):
        x, weight, bias = drawn(5, 3, D).transpose(0, 1), drawn(H + 1, D)[1:], drawn(H + 3)[3:]
        d, weight2, hidden = drawn(3, 5, D), drawn(H, D).T, drawn(3, 5, H)
        for ours, theirs in (
            (columns.product.linear_gelu(x, weight, bias), fused_gelu.linear_gelu(x, weight, bias)),
            (
                columns.product.linear_gelu_backward(d, weight2, hidden, sum_inside),
                fused_gelu.linear_gelu_backward(d, weight2, hidden),
            ),
        ):
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(other.float().abs().max()))
    assert len(columns.library.made) == 1 + 3 * 4, "three products, each with a description and three layouts"
    columns.library.algorithms = 0
    with pytest.raises(RuntimeError, match=r"no product with GELU_AUX_BIAS for 1 rows .* no algorithm"):
        columns.product.linear_gelu(drawn(1, D), weight, bias)
    columns.library.refused = True
    with pytest.raises(RuntimeError, match=r"no product with GELU_AUX_BIAS for 1 rows .* not supported"):
        columns.product.linear_gelu(drawn(1, D), weight, bias)


@needs_gpu
@pytest.mark.parametrize("sum_inside", [True, False])
@pytest.mark.parametrize("rows, width", [((4, 100), 384), ((2, 256), 1152)])
def test_epilogues_on_a_gpu_equal_the_formulas(
    rows: tuple[int, int], width: int, sum_inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the rounding of bfloat16; the same to the bit when repeated, and when a graph is replayed."""
    pytest.importorskip("nvmath")
    monkeypatch.setattr(fused_gelu, "SUM_INSIDE", sum_inside)
    torch.manual_seed(0)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device="cuda").mul(scale).bfloat16()

    x, d, hidden = drawn(*rows, width), drawn(*rows, width), drawn(*rows, 4 * width)
    weight1, weight2 = drawn(4 * width, width, scale=width**-0.5), drawn(width, 4 * width, scale=width**-0.5)
    bias = drawn(4 * width)

    def products() -> list[Tensor]:
        return [*fused_gelu.linear_gelu(x, weight1, bias), *fused_gelu.linear_gelu_backward(d, weight2, hidden)]

    found = products()
    wide = F.linear(x.float(), weight1.float(), bias.float())
    d_hidden = torch.ops.aten.gelu_backward(d.float() @ weight2.float(), hidden.float(), approximate="tanh")
    expected = [wide, F.gelu(wide, approximate="tanh"), d_hidden, d_hidden.sum(dim=(0, 1))]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16 and ours.shape == theirs.shape
        assert (ours.float() - theirs).norm() / theirs.norm() < 5e-3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = products()
    graph.replay()
    for repeated in (products(), recorded):
        assert all(torch.equal(one, other) for one, other in zip(found, repeated, strict=True))


@needs_gpu
@pytest.mark.parametrize("biases", [False, True])
def test_epilogues_of_a_compiled_block_on_a_gpu_have_the_same_gradients(
    biases: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without them, and the same to the bit when repeated."""
    pytest.importorskip("nvmath")
    monkeypatch.setattr(fused_bias, "FUSED_BIASES", biases)
    found = []
    for used in (False, True, True):
        monkeypatch.setattr(fused_gelu, "EPILOGUES", used)
        found.append(block_gradients("cuda", (4, 100, 384)))
    assert_near(found[1], found[0], 2e-2)
    assert all(torch.equal(found[1][name], found[2][name]) for name in found[1] if name.startswith(("out", "mlp.fc1")))
