"""Compilation of a model block by block."""

from __future__ import annotations

import os
import stat
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from selftrans.models.compiling import CACHE, compile_model, keep_compiled
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
    assert len(graphs) == 12 + 12 and len(calls) == 24 + 12, "blocks, and the last layer"


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x


def test_every_bucket_of_student_and_teacher_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 34 buckets; `prepare` makes 99 at most. The teacher runs without gradients."""
    graphs, compile_module = [], torch.nn.Module.compile

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend=backend, **options)
    )
    torch.compiler.reset()
    model: Any = types.SimpleNamespace(repeated=lambda: [layer], compiled_alone=list)
    layer = Scaled()
    compile_model(model)
    for tokens in range(2, 36):
        layer(torch.zeros(tokens, 4))
        with torch.no_grad():
            layer(torch.zeros(tokens, 4))
    torch.compiler.reset()
    assert len(graphs) == 2 * 34


def test_compiled_code_is_kept_in_a_private_folder_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch executes the files in it, so a link, or a folder that others may write to, is not used."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(CACHE, raising=False)
    folder = tmp_path / "selftrans" / "compiled"
    assert keep_compiled() == os.environ[CACHE] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.setenv(CACHE, "mine")
    assert keep_compiled() == "mine", "a folder that is given stays"
    monkeypatch.delenv(CACHE)
    folder.chmod(0o777)
    assert keep_compiled() is None and CACHE not in os.environ
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert keep_compiled() is None and CACHE not in os.environ
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert keep_compiled() is None
