"""The scripts in benchmarks/ as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any


def script(name: str) -> Any:
    """benchmarks/<name>.py, imported anew."""
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # some import their neighbours
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look their types up
    spec.loader.exec_module(module)
    return module
