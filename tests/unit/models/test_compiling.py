"""Compilation of a model block by block."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from selftrans.models.compiling import compile_model
from selftrans.models.sit import SiT


def test_all_shapes_of_a_block_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, calls = [], []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return lambda *args: calls.append(1) or graph(*args)

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend=backend, **options)
    )
    torch.compiler.reset()
    for width in (8, 16, 32):  # three models, four batch sizes each: more than dynamo's own limit
        model = SiT((1, 4, 4), 3, width=width, depth=2, heads=1, patch=2)
        compile_model(model)
        for n in (2, 3, 4, 5):
            model(torch.randn(n, 1, 4, 4), torch.rand(n), torch.zeros(n, dtype=torch.long))
    torch.compiler.reset()
    assert len(graphs) == 12 and len(calls) == 24
