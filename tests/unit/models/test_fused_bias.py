"""Gradients of biases that are summed in the kernels of a compiled block, against torch's own gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from selftrans.models import fused_bias, fused_norm, layers
from selftrans.models.lightning import LightningBlock
from tests.support.kernels import (
    SHARED,
    assert_compiles,
    assert_near,
    block_gradients,
    force_fused,
    interpreted,
    needs_gpu,
    needs_triton,
)

D = 12
BIASES = tuple(f"{layer}.bias" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_same_gradients(ours: Callable[..., object], theirs: Callable[..., object], inputs: list[Tensor]) -> None:
    """Outputs and gradients, of functions in float64."""
    found = []
    for function in (ours, theirs):
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        loss = sum((output * torch.randn_like(output)).sum() for output in outputs)
        found.append([*outputs, *torch.autograd.grad(loss, inputs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_of_gelu_equal_those_of_autograd() -> None:
    torch.manual_seed(0)
    assert_same_gradients(
        lambda x, bias: fused_bias.gelu(x + bias.detach(), bias),
        lambda x, bias: F.gelu(x + bias, approximate="tanh"),
        [drawn(3, 5, D), drawn(D)],
    )


def test_gradients_of_gates_equal_those_of_autograd() -> None:
    torch.manual_seed(0)
    x, a, gate, bias, shift, scale = drawn(3, 5, D), drawn(3, 5, D), drawn(3, D), drawn(D), drawn(3, D), drawn(3, D)

    def added(x: Tensor, a: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
        return x + gate[:, None] * (a + bias)

    def normed(x: Tensor, a: Tensor, gate: Tensor, bias: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x1 = added(x, a, gate, bias)
        return x1, F.layer_norm(x1, (D,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    assert_same_gradients(
        lambda x, a, gate, bias: fused_bias.gate_add(x, a + bias.detach(), gate[:, None], bias),
        added,
        [x, a, gate, bias],
    )
    assert_same_gradients(
        lambda x, a, gate, bias, shift, scale: fused_norm.gate_modulated(
            x, a + bias.detach(), gate, shift, scale, 1e-6, bias
        ),
        normed,
        [x, a, gate, bias, shift, scale],
    )


@pytest.mark.parametrize("normed", [False, True])
def test_gradients_of_heads_equal_those_of_autograd(normed: bool) -> None:
    torch.manual_seed(0)
    norms = [nn.LayerNorm(D // 2, eps=1e-5).double() if normed else nn.Identity() for _ in range(2)]
    weights = [nn.init.normal_(parameter) for norm in norms for parameter in norm.parameters()]

    def theirs(qkv: Tensor, bias: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        q, k, v = layers.split_heads(qkv + bias, 2)
        return norms[0](q), norms[1](k), v

    assert_same_gradients(
        lambda qkv, bias, *_: fused_bias.split_heads(qkv + bias.detach(), bias, 2, *norms),
        theirs,
        [drawn(3, 5, 3 * D), drawn(3 * D), *weights],
    )


@pytest.mark.parametrize("qk_norm", [False, True])
def test_compiled_block_uses_the_operators_without_a_break(qk_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under recomputation of activations; the forward pass is the same to the bit."""
    theirs = block_gradients("cpu", qk_norm=qk_norm)
    force_fused(monkeypatch)
    monkeypatch.setattr(fused_bias, "FUSED_BIASES", True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours = block_gradients("cpu", qk_norm=qk_norm)
    used = {event.key.removeprefix("selftrans::") for event in profile.key_averages()}
    assert used >= {"gelu_backward", "heads_backward", "gate_norm_backward"}
    assert_near(ours, theirs, 1e-2)
    assert torch.equal(ours["out"], theirs["out"])


def test_blocks_of_other_models_use_it_for_what_their_layers_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningDiT without rotations, RMSNorm and SwiGLU: `qkv` and `mlp.fc1`, whose gates and norms are its own."""

    def block(width: int) -> nn.Module:
        plain = {"swiglu": False, "rms_norm": False, "shift": True, "mlp_ratio": 4.0}
        return LightningBlock(width, 2, qk_norm=True, **plain)

    theirs = block_gradients("cpu", make=block)
    force_fused(monkeypatch)
    monkeypatch.setattr(fused_bias, "FUSED_BIASES", True)
    ours = block_gradients("cpu", make=block)
    assert_near(ours, theirs, 2e-2)
    changed = {name for name in BIASES if not torch.equal(ours[name], theirs[name])}
    assert changed == {"attn.qkv.bias", "mlp.fc1.bias"}, "in float32 in place of bfloat16"


@pytest.mark.parametrize("trained", [BIASES, ("attn.proj.weight", "mlp.fc1.bias"), ("attn.q_norm", "mlp.fc2.bias")])
def test_frozen_parts_leave_the_other_gradients(trained: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = block_gradients("cpu", trained=trained)
    force_fused(monkeypatch)
    monkeypatch.setattr(fused_bias, "FUSED_BIASES", True)
    ours = block_gradients("cpu", trained=trained)
    assert ours.keys() == theirs.keys() and ours.keys() - {"out"}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=2e-2, atol=2e-2 * float(value.abs().max()))


def test_it_is_used_only_where_it_is_asked_for_and_for_plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for frozen biases, layers without one, and those of a class of their own, as adapters and eight bits have."""

    class Other(nn.Linear):
        pass

    assert not fused_bias.FUSED_BIASES, "the default"
    monkeypatch.setattr(fused_norm, "FUSED_NORMS", True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode():
        x = torch.empty(1, 1, 4, device="cuda")
        layer = nn.Linear(4, 4)
        assert not fused_bias.applies(layer, x)
        monkeypatch.setattr(fused_bias, "FUSED_BIASES", True)
        assert fused_bias.applies(layer, x) and not fused_bias.applies(layer, x.cpu())
        assert not fused_bias.applies(Other(4, 4), x) and not fused_bias.applies(nn.Linear(4, 4, bias=False), x)
        layer.bias.requires_grad_(False)
        assert not fused_bias.applies(layer, x)
        monkeypatch.setattr(fused_norm, "FUSED_NORMS", False)
        assert not fused_bias.applies(nn.Linear(4, 4), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_describe_their_outputs(dtype: torch.dtype) -> None:
    x, d, qkv = torch.randn(2, 3, 8, dtype=dtype), torch.randn(3, 2, 3, 2, 4, dtype=dtype), torch.randn(2, 3, 24)
    inputs = {torch.ops.selftrans.gelu_backward.default: [(x, x)]}
    inputs[torch.ops.selftrans.heads_backward.default] = [
        (*d.unbind(), qkv.to(dtype), *weights, 1e-5) for weights in ((torch.ones(4), torch.ones(4)), (None, None))
    ]
    for operator, calls in inputs.items():
        for call in calls:
            torch.library.opcheck(operator, call, test_utils=("test_schema", "test_faketensor"))


INTERPRETED = """
from selftrans.models import bias_kernel, fused_bias
torch.manual_seed(0)

def near(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

for n, t, d in ((2, 37, 96), (3, 100, 144)):
    inputs = torch.randn(2, n, t, d).unbind()
    near(bias_kernel.launch_gelu(*inputs), fused_bias.gelu_backward(*inputs))
for n, t, h, d in ((2, 37, 3, 24), (3, 90, 1, 72)):
    qkv = torch.randn(n, t, 3 * h * d) + 1
    inputs = *torch.randn(3, n, t, h, d).unbind(), qkv
    for weights in ((None, None), torch.randn(2, d).unbind()):
        calls = bias_kernel.launch_heads, fused_bias.heads_backward
        (ours, sums), (theirs, expected) = (call(*inputs, *weights, 1e-5) for call in calls)
        near((ours, sums[0]), (theirs, expected[0]))
        if weights[0] is not None:
            near(sums[1:, :2], expected[1:, :2])
print("equal")
"""


@needs_triton
def test_the_interpreted_kernels_equal_the_formulas() -> None:
    interpreted(INTERPRETED)


@needs_triton
@pytest.mark.parametrize("capability", SHARED)
def test_the_kernels_are_compiled_for_every_gpu_and_fit_its_shared_memory(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On float32, with heads that are a power of two wide and those of XL."""
    from selftrans.models import bias_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert_compiles(bias_kernel._gelu_backward, {"D": 3072, **bias_kernel.gelu_sizes()}, capability, bias_kernel.WARPS)
    for width in (64, 72):
        constants = {"HEADS": 12, "D": width, "NORMS": 2, **bias_kernel.heads_sizes(width)}
        assert_compiles(bias_kernel._heads_backward, constants, capability, bias_kernel.WARPS, {"eps": "fp32"})


@needs_gpu
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("size", [(4, 100, 384), (2, 256, 1152)])
def test_biases_of_a_compiled_block_on_a_gpu_have_the_same_gradients(
    size: tuple[int, int, int], qk_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by inductor's kernels alone, and the same to the bit when repeated."""
    found = []
    for fused in (False, True, True):
        monkeypatch.setattr(fused_norm, "FUSED_NORMS", fused)
        monkeypatch.setattr(fused_bias, "FUSED_BIASES", fused)
        found.append(block_gradients("cuda", size, qk_norm=qk_norm))
    assert_near(found[1], found[0], 2e-2)
    assert all(torch.equal(found[1][name], found[2][name]) for name in ("out", *BIASES))
