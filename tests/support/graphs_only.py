"""torch.compile up to its graphs: no C++ is made of them, which takes most of the time and needs a compiler."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def graphs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules are compiled to graphs that run as they are. Import it into a test module."""
    compile_module = torch.nn.Module.compile

    def compiled(self: torch.nn.Module, **options: object) -> None:
        compile_module(self, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
