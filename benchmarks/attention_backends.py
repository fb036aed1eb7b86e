"""Time of torch's attention backends at the heads of SiT, forward and backward, on the device at hand.

    python benchmarks/attention_backends.py --out attention

Queries and keys are contiguous, as after their norms; values are a view of the product that makes all three. Each
backend that takes these sizes is timed in turn, in five rounds; the first column is what torch chooses by itself.
Writes attention_backends.json.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from selftrans.models.layers import attend, split_heads
from selftrans.models.sit import SIT_SIZES
from selftrans.storage import write_json

BACKENDS = {
    "chosen": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
TOKENS = {"SiT-S/4": 64, "SiT-S/2": 256, "SiT-B/2": 256, "SiT-XL/2": 256}


def once(qkv: Tensor, heads: int) -> None:
    """Attention forward and backward; qkv (N, T, 3 D)."""
    q, k, v = split_heads(qkv, heads)
    attend(q.contiguous(), k.contiguous(), v).sum().backward()


def milliseconds(qkv: Tensor, heads: int, backend: SDPBackend | None, repeats: int) -> float | None:
    """Milliseconds of one forward and backward pass; None where the backend does not support the input."""
    wait = torch.cuda.synchronize if qkv.is_cuda else lambda: None
    try:
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            once(qkv, heads)
            wait()
            started = time.perf_counter()
            for _ in range(repeats):
                once(qkv, heads)
            wait()
    except RuntimeError:
        return None
    return 1e3 * (time.perf_counter() - started) / repeats


def measured(name: str, device: torch.device, batch: int, repeats: int, rounds: int) -> dict[str, float | None]:
    """Backend -> milliseconds with the heads of a model: the median over rounds, in which backends take turns."""
    width, heads = SIT_SIZES[name]["width"], SIT_SIZES[name]["heads"]
    qkv = torch.randn(batch, TOKENS[name], 3 * width, device=device, dtype=torch.bfloat16, requires_grad=True)
    times: dict[str, list[float]] = {key: [] for key in BACKENDS}
    for _ in range(rounds):
        for key, backend in BACKENDS.items():
            if (ms := milliseconds(qkv, heads, backend, repeats)) is not None:
                times[key].append(ms)
    return {key: statistics.median(each) if each else None for key, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {"device": str(device), "batch": options.batch, "milliseconds": {}}
    print(f"{'ms':<10}" + "".join(f"{name:>11}" for name in BACKENDS))
    for name in TOKENS:
        values = measured(name, device, options.batch, options.repeats, 5)
        found["milliseconds"][name] = values
        print(f"{name:<10}" + "".join(f"{'-' if ms is None else f'{ms:.3f}':>11}" for ms in values.values()))
    write_json(options.out / "attention_backends.json", found)


if __name__ == "__main__":
    main()
