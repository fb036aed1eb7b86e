"""The least time that a training step of SiT can take on a GPU, computed from the operations and bytes of each part.

    python benchmarks/step_floor.py --out floor                 # the table, and step_floor.json; seconds
    python benchmarks/step_floor.py --out floor --kernels       # and the kernels and bytes of a compiled block, from inductor

Assumed: bf16 autocast with weights, gradients and the residual stream in float32, blocks compiled one by one, a step captured
as one graph (no launch is waited for), fused AdamW, and an average. Matrix products run at the measured rate or at the rate
of their bytes, whichever is slower; all else runs at the rate of its bytes. Times are sums: nothing overlaps.
`--kernels` lowers one block with inductor for the CPU, without compiling or running its kernels: Triton's fusions are decided
by the same scheduler, but may differ in detail. docs/step-block.md explains the numbers.
"""

from __future__ import annotations

import argparse
import collections
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from selftrans.models.layers import Block
from selftrans.models.lightning import LightningBlock
from selftrans.models.sit import SIT_SIZES
from selftrans.storage import write_json

MODELS = {"SiT-S/4": 64, "SiT-S/2": 256, "SiT-B/2": 256, "SiT-XL/2": 256}  #: tokens of a 32x32 latent
#: bytes per token and channel that a block moves outside its products, as inductor fuses it, each operand of a kernel once:
#: bf16 (2) but for the residual stream (4)
FORWARD = {
    "norm 1, modulate": 4 + 2,
    "norms of queries and keys": 2 * (2 + 2),
    "gate, add, norm 2, modulate (the sum is not stored)": 4 + 2 + 2,
    "GELU": 4 * (2 + 2),
    "gate, add, gate, add": 4 + 2 + 2 + 4,
}
BACKWARD = {
    "gate 2 and its gradient": 4 + 2 + 2,
    "GELU": 4 * (2 + 2 + 2),
    "modulate, norm 2, add, gate 1": 4 + 2 + 2 + 4 + 4 + 4 + 2,
    "sums over tokens: scale 2, shift 2, gate 1": (2 + 4) + (4 + 2),
    "norms of queries and keys, three gradients into one tensor": 2 * (2 + 2 + 2) + 2 + 2,
    "modulate, norm 1, add": 2 + 4 + 4 + 4,
    "sums over tokens: scale 1, shift 1": 2 + 4,
    "sums over tokens: biases of fc2, fc1, proj, qkv": 2 * (1 + 4 + 1 + 3),
}
#: kernels of one block without its products and attention, as inductor fuses them: forward, backward
KERNELS = (7, 8)


class Chip(NamedTuple):
    """What limits a step."""

    flops: float = 807e12  #: measured, of a large bf16 product
    bandwidth: float = 3.35e12  #: bytes/s, of H100 SXM


def product(rows: int, inner: int, columns: int, chip: Chip) -> tuple[float, float, float]:
    """(operations, bytes, seconds) of a product in bf16, each operand moved once."""
    flops, moved = 2.0 * rows * inner * columns, 2.0 * (rows * inner + inner * columns + rows * columns)
    return flops, moved, max(flops / chip.flops, moved / chip.bandwidth)


def block(width: int, tokens: int, batch: int, chip: Chip) -> dict[str, dict[str, float]]:
    """Operations, bytes and seconds of one block, forward and backward, by part."""
    rows, d = batch * tokens, width
    shapes = [(rows, d, 3 * d), (rows, d, d), (rows, d, 4 * d), (rows, 4 * d, d)]
    found: dict[str, dict[str, float]] = {}

    def add(name: str, parts: list[tuple[float, float, float]]) -> None:
        flops, moved, seconds = (sum(each) for each in zip(*parts, strict=True))
        found[name] = {"flops": flops, "bytes": moved, "seconds": seconds}

    def bytes_only(moved: float) -> tuple[float, float, float]:
        return 0.0, moved, moved / chip.bandwidth

    attention = 4.0 * batch * tokens * tokens * d
    weights = 18 * d * d
    add("forward products", [product(*s, chip) for s in shapes])
    add("forward modulation", [product(batch, d, 6 * d, chip)])
    add("forward attention", [(attention, 8.0 * rows * d, max(attention / chip.flops, 8 * rows * d / chip.bandwidth))])
    add("forward elementwise", [bytes_only(sum(FORWARD.values()) * rows * d)])
    add("forward casts of weights", [bytes_only(6.0 * weights)])
    turned = [(m, n, k) for m, k, n in shapes] + [(k, m, n) for m, k, n in shapes]
    add("backward products", [product(*s, chip) for s in turned])
    add("backward modulation", [product(batch, 6 * d, d, chip), product(d, batch, 6 * d, chip)])
    # queries times keys is computed again: five products instead of the two of the forward pass
    again = 2.5 * attention
    add("backward attention", [(again, 16.0 * rows * d, max(again / chip.flops, 16 * rows * d / chip.bandwidth))])
    add("backward elementwise", [bytes_only(sum(BACKWARD.values()) * rows * d)])
    add("backward casts of gradients", [bytes_only(6.0 * weights)])
    return found


def step(name: str, batch: int, chip: Chip) -> dict[str, Any]:
    """The floor of one step of a model: its parts, and the utilisation that it allows."""
    sizes, tokens = SIT_SIZES[name], MODELS[name]
    d, depth = sizes["width"], sizes["depth"]
    parts = block(d, tokens, batch, chip)
    # bytes: AdamW reads four tensors and writes three, clipping reads the gradient twice and writes it, the average reads two
    parameters = depth * (18 * d * d + 13 * d + 8 * d // 2)
    update = parameters * 4 * (7 + 3 + 3) / chip.bandwidth
    seconds = depth * sum(part["seconds"] for part in parts.values()) + update
    model = depth * sum(v["flops"] for k, v in parts.items() if k.startswith("forward")) * 3
    return {
        "model": name,
        "batch": batch,
        "block": parts,
        "parameters of the blocks": parameters,
        "optimiser, clipping, average: seconds": update,
        "seconds": seconds,
        "steps_per_second": 1 / seconds,
        "operations": model,
        "utilisation": model / seconds / chip.flops,
        "kernels of the blocks": depth * (sum(KERNELS) + 5 + 10 + 2),
    }


def table(steps: list[dict[str, Any]]) -> str:
    """Milliseconds of each part of a step, all blocks together."""
    lines = [f"{'ms a step, all blocks':<32}" + "".join(f"{s['model']:>10}" for s in steps)]
    depths = [SIT_SIZES[s["model"]]["depth"] for s in steps]
    for part in steps[0]["block"]:
        values = [1e3 * n * s["block"][part]["seconds"] for n, s in zip(depths, steps, strict=True)]
        lines.append(f"{part:<32}" + "".join(f"{v:>10.2f}" for v in values))
    for key, factor in (("optimiser, clipping, average: seconds", 1e3), ("seconds", 1e3), ("steps_per_second", 1.0)):
        label = key.replace(": seconds", "").replace("seconds", "floor of the step")
        lines.append(f"{label:<32}" + "".join(f"{factor * s[key]:>10.2f}" for s in steps))
    lines.append(f"{'utilisation at the floor':<32}" + "".join(f"{100 * s['utilisation']:>9.0f}%" for s in steps))
    lines.append(f"{'kernels of the blocks':<32}" + "".join(f"{s['kernels of the blocks']:>10}" for s in steps))
    return "\n".join(lines)


# ---- inductor


def kernels(made: torch.nn.Module, batch: int, tokens: int, width: int, inputs: tuple[torch.Tensor, ...] = ()) -> Any:
    """Kernels of a compiled block by kind, and bytes and number of the scheduler's nodes, forward and backward.

    `nodes` have been fused where they can share loops. The C++ backend joins several of them in one kernel, which reads data
    again from a cache. So the number of nodes, and their `bytes` per token and channel, are upper bounds for a GPU.
    Private interfaces of torch are used: the generated code is read, and its kernels are replaced by empty functions.
    """
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.graph import GraphLowering

    codes: list[str] = []
    moved: list[tuple[int, int]] = []
    lowered = GraphLowering.codegen

    def codegen(self: Any) -> Any:
        found = lowered(self)
        own = [node for node in self.scheduler.nodes if not node.is_extern() and node.get_nodes()]
        moved.append((sum(node.get_read_write_buffers_sizes() for node in own), len(own)))
        return found

    before = AsyncCompile.cpp_pybinding, GraphLowering.save_output_code
    AsyncCompile.cpp_pybinding = lambda self, *_: lambda *args: None  # type: ignore[method-assign]
    GraphLowering.codegen, GraphLowering.save_output_code = codegen, staticmethod(codes.append)  # type: ignore
    try:
        torch.compiler.reset()
        x = torch.randn(batch, tokens, width, requires_grad=True)
        c = torch.randn(batch, width, requires_grad=True)
        with config.patch(force_disable_caches=True), torch.autocast("cpu", torch.bfloat16):
            y = torch.compile(made, dynamic=False)(x, c, *inputs)
        with config.patch(force_disable_caches=True):
            y.sum().backward()
    finally:
        AsyncCompile.cpp_pybinding, GraphLowering.save_output_code = before  # type: ignore
        GraphLowering.codegen = lowered  # type: ignore[method-assign]
        torch.compiler.reset()
    weights = sum(p.numel() for p in made.parameters() if p.dim() == 2)
    return {
        name: _counted(code) | {"bytes": (size - 6 * weights) / (batch * tokens * width), "nodes": nodes}
        for name, code, (size, nodes) in zip(("forward", "backward"), codes, moved, strict=True)
    }


def _counted(code: str) -> dict[str, Any]:
    """Calls in the generated code, by kind."""
    calls = re.findall(r"^\s+(?:\w+ = )?(cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.\S+?)\(", code, re.MULTILINE)
    calls = [c for c in calls if "async_compile" not in c]
    kinds = collections.Counter(
        "fused" if c.startswith("cpp") else "products" if c.startswith("extern") else "attention" for c in calls
    )
    return {"kernels": dict(kinds), "names": [c for c in calls if c.startswith("cpp")]}


def all_kernels() -> dict[str, Any]:
    """Of SiT's block, with and without norms of queries and keys, and of LightningDiT's as published."""
    lightning = LightningBlock(128, 2, qk_norm=False, swiglu=True, rms_norm=True, shift=True, mlp_ratio=4.0)
    return {
        "SiT, qk_norm": kernels(Block(128, 2, 4.0, True), 16, 256, 128),
        "SiT": kernels(Block(128, 2, 4.0, False), 16, 256, 128),
        "LightningDiT": kernels(lightning, 16, 256, 128, (torch.randn(2, 256, 32),)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--tflops", type=float, default=807.0, help="rate of a large bf16 product")
    parser.add_argument("--bandwidth", type=float, default=3.35, help="TB/s")
    parser.add_argument("--kernels", action="store_true", help="count the kernels of compiled blocks, too")
    options = parser.parse_args()
    chip = Chip(options.tflops * 1e12, options.bandwidth * 1e12)
    steps = [step(name, options.batch, chip) for name in MODELS]
    found: dict[str, Any] = {"chip": chip._asdict(), "forward": FORWARD, "backward": BACKWARD, "steps": steps}
    print(table(steps))
    if options.kernels:
        found["inductor"] = all_kernels()
        for name, both in found["inductor"].items():
            for way, each in both.items():
                print(f"{name:<14}{way:<10}{each['kernels']}  {each['nodes']} nodes, {each['bytes']:.0f} bytes")
    write_json(options.out / "step_floor.json", found)


if __name__ == "__main__":
    main()
