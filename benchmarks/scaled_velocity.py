"""A copy of a trained model whose velocity is multiplied by a constant, as a weights file.

    python benchmarks/scaled_velocity.py RUN --factor 1.0526 --out scaled.safetensors
    selftrans evaluate scaled.safetensors --reference digits --features digits --num 1000

Contrastive Flow Matching with factor c trains towards a velocity that is 1 / (1 - c) times as large (docs/method.md). With
this script its gain and that of larger steps at sampling can be measured one by one. For models whose last layer is
`final_layer.linear`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors import safe_open

from selftrans.checkpoints.format import write_tensors
from selftrans.checkpoints.load import find

LAST = ("final_layer.linear.weight", "final_layer.linear.bias")


def scale(source: str, factor: float, out: Path) -> None:
    """Write the averaged weights of a run, checkpoint or weights file with its last layer multiplied by `factor`."""
    with safe_open(find(source), framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for name in LAST:
        if name not in tensors:
            raise SystemExit(f"{source} has no {name}; this script is for SiT and LightningDiT")
        tensors[name] = factor * tensors[name]
    write_tensors(out, tensors, metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="run, checkpoint or weights file")
    parser.add_argument("--factor", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    scale(options.source, options.factor, options.out)


if __name__ == "__main__":
    main()
