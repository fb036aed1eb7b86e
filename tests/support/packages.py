"""Packages outside selftrans, put on the path as pip would install them, but without pip, network or build."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from selftrans import plugins
from selftrans.methods.registry import REGISTRY as METHODS
from selftrans.models.registry import REGISTRY as MODELS


def install(project: Path, site: Path) -> Path:
    """Copy the modules of `project` (src layout) to `site`, with the metadata of its pyproject.toml; returns `site`."""
    about = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(project / "src", site, dirs_exist_ok=True, ignore=skip)
    info = site / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n")
    lines = []
    for group, points in about["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return site


@contextlib.contextmanager
def importable(*folders: Path, drop: tuple[str, ...]) -> Iterator[None]:
    """These folders first on the path, without records of code outside selftrans; `drop`: top modules to import again.

    Afterwards path, modules and records are restored.
    """
    ours = [name for name in sys.modules if name.partition(".")[0] in drop]
    with pytest.MonkeyPatch.context() as patch:
        for name in ours:
            patch.delitem(sys.modules, name)
        others = [entry for entry in sys.path if not any((Path(entry) / name).is_dir() for name in drop)]
        patch.setattr(sys, "path", [*map(str, folders), *others])
        for registry in (METHODS, MODELS):
            patch.setattr(registry, "_outside", {})
        patch.setattr(plugins, "_trusted", {})
        try:
            yield
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] in drop]:
                del sys.modules[name]
