"""Import of a published file in a test, and the distance between its network and the imported one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selftrans.checkpoints.load import Weights, load_model
from selftrans.interop.importing import import_run

HEADS = ["--heads", "2"]


def inputs(shape: tuple[int, ...], classes: int, n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, times and labels; among them times 0 and 1 and the null label."""
    g = torch.Generator().manual_seed(3)
    t = torch.cat([torch.tensor([0.0, 1.0]), torch.rand(n - 2, generator=g)])
    labels = torch.tensor(
        [0, classes, *torch.randint(classes + 1, (n - 2,), generator=g).tolist()]
    )  # one null at least
    return torch.randn(n, *shape, generator=g), t, labels


def run_import(path: Path, out: Path, **given: Any) -> tuple[Path, str]:
    """Import a file; returns the run and the printed lines."""
    output: list[str] = []
    import_run(path, out, **{"heads": None if given.pop("qk", False) else 2, "say": output.append} | given)
    return out, "\n".join(output)


@torch.no_grad()
def off(run: Path, network: nn.Module, sizes: dict[str, int], *, weights: Weights = "ema", flip: bool = False) -> float:
    """Largest difference between the velocities of a run and of the assembled network, in the network's convention."""
    model = load_model(run, weights=weights).model
    x, t, labels = inputs((sizes["channels"], sizes["side"], sizes["side"]), sizes["classes"])
    expected = -network(x, 1 - t, labels) if flip else network(x, t, labels)
    assert expected.abs().max() > 0.1
    return (model(x, t, labels).v - expected).abs().max().item()
