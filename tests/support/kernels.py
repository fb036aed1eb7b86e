"""Triton kernels without a GPU, and the gradients of compiled blocks that use them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selftrans.models import fused_norm, layers
from tests.support.diffusers_blocks import randomised

TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="needs triton")
needs_gpu = pytest.mark.skipif(not (TRITON and torch.cuda.is_available()), reason="needs a CUDA GPU and triton")
#: compute capability -> bytes of shared memory that a program may have there
SHARED = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


def block_gradients(
    device: str,
    size: tuple[int, int, int] = (3, 7, 32),
    trained: tuple[str, ...] = (),
    qk_norm: bool = True,
    make: Callable[[int], nn.Module] | None = None,
) -> dict[str, Tensor]:
    """The output and the gradients of a compiled block, by name. `trained`: those parts of it alone, and not its inputs.

    make: a block of this width, of another model.
    """
    torch.manual_seed(0)
    n, t, d = size
    made = make(d) if make else layers.Block(d, max(2, d // 64), 4.0, qk_norm)
    block = randomised(made).train().to(device)
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
    """The same names and dtypes, and values that differ by less than `tolerance`, relative to their norm."""
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, value in theirs.items():
        error = (ours[name].float() - value.float()).norm() / value.float().norm()
        assert error < tolerance and ours[name].dtype == value.dtype, (name, float(error))


def interpreted(code: str) -> None:
    """Run Python code in a process in which Triton interprets its kernels on the CPU; it has to print "equal"."""
    on_cpu = "import contextlib, torch\ntorch.cuda.device_of = lambda x: contextlib.nullcontext()\n"
    done = subprocess.run(
        [sys.executable, "-c", on_cpu + code],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr


def assert_compiles(
    kernel: Any, constants: dict[str, int], capability: int, warps: int, kinds: dict[str, str] | None = None
) -> None:
    """To machine code, which needs no GPU, within the shared memory of a program. `kinds`: of arguments that are neither
    pointers to float32 nor whole numbers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    signature = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in names} | (kinds or {})
    aligned = {(k,): [["tt.divisibility", 16]] for k, name in enumerate(names) if name.endswith(("_ptr", "_stride"))}
    made = compile(
        ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps},
    )
    assert made.asm["cubin"] and made.metadata.shared <= SHARED[capability], (constants, made.metadata.shared)


def force_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the operators of a GPU in compiled blocks on the CPU, with the formulas in place of the kernels."""
    monkeypatch.setattr(fused_norm, "applies", lambda x: torch.compiler.is_compiling() and torch.is_grad_enabled())
