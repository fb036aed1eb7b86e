"""The fused backward pass of gate, add, LayerNorm and modulate against torch's own gradients."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from selftrans.models import fused_norm, layers
from tests.support.diffusers_blocks import randomised

EPS = 1e-6
TRITON = importlib.util.find_spec("triton") is not None


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


def block_gradients(
    device: str, size: tuple[int, int, int] = (3, 7, 32), trained: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The output and the gradients of a compiled block, by name. `trained`: those parts of it alone, and not its inputs."""
    torch.manual_seed(0)
    n, t, d = size
    block = randomised(layers.Block(d, max(2, d // 64), 4.0, True)).train().to(device)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not trained or name.startswith(trained))
    x, c = (torch.randn(shape, device=device, requires_grad=not trained) for shape in ((n, t, d), (n, d)))
    torch.compiler.reset()
    block.compile(fullgraph=True, dynamic=False, backend="inductor" if device == "cuda" else "aot_eager")
    with torch.autocast(device, torch.bfloat16):
        out = torch.utils.checkpoint.checkpoint(block, x, c, use_reentrant=False)
    (out * torch.linspace(-1, 1, d, device=device)).sum().backward()
    named = {"out": out.detach(), "x": x.grad, "c": c.grad}
    named |= {
        name: each.grad for name, each in block.named_parameters() if "k_norm.bias" not in name
    }  # zero but for rounding
    torch.compiler.reset()
    return {name: each for name, each in named.items() if each is not None}


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, value in theirs.items():
        error = (ours[name].float() - value.float()).norm() / value.float().norm()
        assert error < tolerance and ours[name].dtype == value.dtype, (name, float(error))


def test_compiled_block_uses_the_fused_norm_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under recomputation of activations; on the CPU by force, with the formulas in place of the kernel."""
    theirs = block_gradients("cpu")
    monkeypatch.setattr(fused_norm, "applies", lambda x: torch.compiler.is_compiling() and torch.is_grad_enabled())
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
    monkeypatch.setattr(fused_norm, "applies", lambda x: torch.compiler.is_compiling() and torch.is_grad_enabled())
    ours = block_gradients("cpu", trained=trained)
    assert ours.keys() == theirs.keys() and ours.keys() - {"out"}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=2e-2, atol=2e-2 * float(value.abs().max()))


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
    for extra in ((a, gate), (None, None)):
        torch.library.opcheck(
            torch.ops.selftrans.gate_norm_backward.default,
            (x, a, x, *extra, scale, mean, rstd),
            test_utils=("test_schema", "test_faketensor"),
        )


INTERPRETED = """
import contextlib, torch
torch.cuda.device_of = lambda x: contextlib.nullcontext()
from selftrans.models import fused_norm, norm_kernel
torch.manual_seed(0)
for n, t, d, gated in ((2, 37, 96, True), (1, 9, 1152, True), (2, 50, 48, False)):
    wide = torch.randn(n, 6 * d)
    x, a, d_x1, d_y = torch.randn(4, n, t, d).unbind()
    extra = (a, wide[:, :d]) if gated else (None, None)
    x1 = x + wide[:, None, :d] * a if gated else x
    _, mean, rstd = torch.native_layer_norm(x1, (d,), None, None, 1e-6)
    inputs = (d_x1, d_y, x, *extra, wide[:, 2 * d : 3 * d], mean, rstd)
    for ours, theirs in zip(norm_kernel.launch(*inputs), fused_norm.gate_norm_backward(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
print("equal")
"""


@pytest.mark.skipif(not TRITON, reason="needs triton")
def test_the_interpreted_kernel_equals_the_formulas() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr


#: compute capability -> bytes of shared memory that a program may have there
SHARED = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@pytest.mark.skipif(not TRITON, reason="needs triton")
@pytest.mark.parametrize("capability", SHARED)
def test_the_kernel_is_compiled_for_every_gpu_and_fits_its_shared_memory(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code, which needs no GPU; rows of float32 at both ends of what is loaded ahead."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from selftrans.models import norm_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = norm_kernel._gate_norm_backward
    for block in (norm_kernel.WIDEST, 2 * norm_kernel.WIDEST):
        constants = {"CHUNK": norm_kernel.TOKENS, "D": block, "BLOCK": block, "GATED": True}
        constants["STAGES"] = norm_kernel.stages_of(block)
        names = kernel.arg_names
        kinds = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in names} | dict.fromkeys(
            constants, "constexpr"
        )
        aligned = {
            (k,): [["tt.divisibility", 16]] for k, name in enumerate(names) if name.endswith(("_ptr", "_stride"))
        }
        made = compile(
            ASTSource(kernel, kinds, constants, aligned),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": norm_kernel.warps_of(block)},
        )
        assert made.asm["cubin"] and made.metadata.shared <= SHARED[capability], (block, made.metadata.shared)


@pytest.mark.skipif(not (TRITON and torch.cuda.is_available()), reason="needs a CUDA GPU and triton")
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
