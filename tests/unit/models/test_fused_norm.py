"""The fused backward pass of gate, add, LayerNorm and modulate against torch's own gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from selftrans.models import fused_norm, layers
from tests.support.diffusers_blocks import randomised
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

EPS = 1e-6


def tensors(n: int, t: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """x, a, gate, shift, scale; the last three are columns of one tensor, as in a block."""
    x, a = torch.randn(n, t, d, dtype=dtype) * 2 + 1, torch.randn(n, t, d, dtype=dtype)
    wide = torch.randn(n, 6 * d, dtype=dtype)
    return [each.requires_grad_() for each in (x, a, wide[:, 2 * d : 3 * d], wide[:, :d], wide[:, 5 * d :])]


def plain(x: Tensor, a: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    x1 = x if a is None or gate is None else x + gate[:, None] * a
    return x1, F.layer_norm(x1, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def fused(x: Tensor, a: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    if a is None or gate is None:
        return fused_norm.modulated(x, shift, scale, EPS)
    return fused_norm.gate_modulated(x, a, gate, shift, scale, EPS)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("used", ["both", "residual", "norm"])
def test_gradients_equal_those_of_autograd(gated: bool, used: str) -> None:
    torch.manual_seed(0)
    inputs = tensors(3, 5, 12, torch.float64)
    if not gated:
        inputs = [inputs[0], *inputs[3:]]
    weights = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    weights[0] *= used != "norm"
    weights[1] *= used != "residual"
    found = []
    for function in (plain, fused):
        outputs = function(*(inputs if gated else (inputs[0], None, None, *inputs[1:])))
        loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        found.append([*outputs, *torch.autograd.grad(loss, inputs, materialize_grads=True)])
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_compiled_block_uses_the_fused_norm_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under recomputation of activations; on the CPU by force, with the formulas in place of the kernel."""
    theirs = block_gradients("cpu")
    force_fused(monkeypatch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours = block_gradients("cpu")
    assert "selftrans::gate_norm_backward" in {event.key for event in profile.key_averages()}
    assert_near(ours, theirs, 1e-2)


@pytest.mark.parametrize("trained", [("attn", "mlp"), ("mlp.fc2",)])
def test_frozen_inputs_and_modulation_leave_the_other_gradients(
    trained: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the first block of a model with adapters: some or all inputs of the operator need no gradient."""
    theirs = block_gradients("cpu", trained=trained)
    force_fused(monkeypatch)
    ours = block_gradients("cpu", trained=trained)
    assert ours.keys() == theirs.keys() and ours.keys() - {"out"}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=2e-2, atol=2e-2 * float(value.abs().max()))


def test_attention_and_mlp_of_others_are_called_as_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_norm, "applies", lambda x: True)
    block = randomised(layers.Block(8, 2, 4.0, True))
    block.attn, block.mlp = nn.Identity(), nn.Identity()
    x, c = torch.randn(2, 3, 8), torch.randn(2, 8)
    ours = block(x, c)
    monkeypatch.setattr(fused_norm, "applies", lambda x: False)
    torch.testing.assert_close(ours, block(x, c))


def test_fused_norm_is_used_only_in_training_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_norm, "FUSED_NORMS", True)
    with FakeTensorMode():
        x = torch.empty(1, 1, 4, device="cuda")
        assert not fused_norm.applies(x), "not compiled"
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert fused_norm.applies(x) and not fused_norm.applies(x.double()) and not fused_norm.applies(x.cpu())
        with torch.no_grad():
            assert not fused_norm.applies(x)
        monkeypatch.setattr(fused_norm, "FUSED_NORMS", False)
        assert not fused_norm.applies(x)


def test_the_operator_describes_its_outputs() -> None:
    x, a, gate, _, scale = (each.detach() for each in tensors(2, 3, 4, torch.float32))
    mean, rstd = torch.zeros(2, 3, 1), torch.ones(2, 3, 1)
    for *extra, biased in ((a, gate, True), (a, gate, False), (None, None, False)):
        torch.library.opcheck(
            torch.ops.selftrans.gate_norm_backward.default,
            (x, a, x, *extra, scale, mean, rstd, biased),
            test_utils=("test_schema", "test_faketensor"),
        )


INTERPRETED = """
import torch
from selftrans.models import fused_norm, norm_kernel
torch.manual_seed(0)
for n, t, d, sums in ((2, 37, 96, 3), (1, 9, 1152, 3), (2, 50, 48, 2), (2, 37, 96, 4)):
    wide = torch.randn(n, 6 * d)
    x, a, d_x1, d_y = torch.randn(4, n, t, d).unbind()
    extra = (a, wide[:, :d]) if sums > 2 else (None, None)
    x1 = x + wide[:, None, :d] * a if sums > 2 else x
    _, mean, rstd = torch.native_layer_norm(x1, (d,), None, None, 1e-6)
    inputs = (d_x1, d_y, x, *extra, wide[:, 2 * d : 3 * d], mean, rstd, sums == 4)
    for ours, theirs in zip(norm_kernel.launch(*inputs), fused_norm.gate_norm_backward(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
print("equal")
"""


@needs_triton
def test_the_interpreted_kernel_equals_the_formulas() -> None:
    interpreted(INTERPRETED)


@needs_triton
@pytest.mark.parametrize("capability", SHARED)
def test_the_kernel_is_compiled_for_every_gpu_and_fits_its_shared_memory(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of float32 at both ends of what is loaded ahead."""
    from selftrans.models import norm_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for block in (norm_kernel.WIDEST, 2 * norm_kernel.WIDEST):
        constants = {"CHUNK": norm_kernel.TOKENS, "D": block, "BLOCK": block, "SUMS": 4}
        constants["STAGES"] = norm_kernel.stages_of(block)
        assert_compiles(norm_kernel._gate_norm_backward, constants, capability, norm_kernel.warps_of(block))


@needs_gpu
@pytest.mark.parametrize("size", [(4, 100, 384), (2, 256, 1152)])
def test_compiled_block_on_a_gpu_has_the_same_gradients(
    size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for fused_norms in (False, True, True):
        monkeypatch.setattr(fused_norm, "FUSED_NORMS", fused_norms)
        found.append(block_gradients("cuda", size))
    assert_near(found[1], found[0], 2e-2)
    assert all(torch.equal(found[1][name], found[2][name]) for name in ("out", "adaLN_modulation.1.weight"))
