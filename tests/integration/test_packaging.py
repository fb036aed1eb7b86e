"""Declared, pinned, imported and installed packages agree."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import selftrans
from tests import ranges

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
#: all that the tests need: the extra dev names others
DEV = [r for r in EXTRAS["dev"] if r.name != "selftrans"] + [
    r for name in sorted(next(r.extras for r in EXTRAS["dev"] if r.name == "selftrans")) for r in EXTRAS[name]
]
PINS = {
    canonicalize_name(name): Version(version)
    for name, version in (
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
}
#: import names that differ from the name of their distribution
DISTRIBUTION = {
    "PIL": "pillow",
    "nvmath": "nvmath-python",
    "sklearn": "scikit-learn",
    "torch_fidelity": "torch-fidelity",
}


def test_one_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", changelog, flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"]
    assert importlib.metadata.version("selftrans") == PROJECT["version"]
    assert selftrans.__version__ == PROJECT["version"]


def test_command_is_installed_and_lists_its_commands() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="selftrans")
    assert callable(script.load())
    command = Path(sys.executable).parent / "selftrans"
    done = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("prepare", "train", "sample", "evaluate", "quickstart"):
        assert word in done.stdout


@pytest.mark.parametrize("requirement", CORE + DEV, ids=lambda requirement: requirement.name)
def test_each_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    pin = PINS.get(canonicalize_name(requirement.name))
    assert pin is not None, f"constraints.txt has no {requirement.name}"
    assert pin in requirement.specifier


def test_ends_of_the_ranges() -> None:
    """`make ranges` installs the lowest version of each; there are no upper bounds."""
    lowest = ranges.lowest()
    assert set(lowest) == {each.name for each in CORE + EXTRAS["media"] + EXTRAS["text"]}
    for each in CORE + EXTRAS["media"] + EXTRAS["text"]:
        assert [of.operator for of in each.specifier] == [">="], each
    printed = subprocess.run(["make", "-n", "ranges"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "tests/ranges.py lowest" in printed and "tests/ranges.py newest" in printed
    missing = [test for test in ranges.TESTS if not (ROOT / test).exists()]
    assert not missing


def test_pins_fit_every_machine() -> None:
    """No local builds (+cpu, +cu126), which exist on some machines only, and no addresses."""
    assert not [name for name, version in PINS.items() if version.local]


#: imported only where the user has installed them: trackers that accelerate starts; and with torch for GPUs
USERS = {"trackio", "triton"}


def test_each_import_is_declared() -> None:
    own = [each for name, extra in EXTRAS.items() if name not in ("dev", "docs") for each in extra]
    declared = {canonicalize_name(requirement.name) for requirement in CORE + own} | USERS
    undeclared = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            for top in (module.split(".")[0] for module in modules):
                theirs = top not in sys.stdlib_module_names and top != "selftrans"
                if theirs and canonicalize_name(DISTRIBUTION.get(top, top)) not in declared:
                    undeclared[f"{path.name}:{node.lineno}"] = top
    assert not undeclared


def test_torch_fidelity_stays_out_of_the_core() -> None:
    """It depends on torchvision, which cannot be imported with every build of torch."""
    names = {canonicalize_name(requirement.name) for requirement in CORE + DEV}
    assert not names & {"torch-fidelity", "torchvision", "torchmetrics", "timm"}
    assert not set(PINS) & {"torch-fidelity", "torchvision", "torchmetrics", "timm"}


def test_type_hints_are_shipped() -> None:
    assert (ROOT / "src" / "selftrans" / "py.typed").is_file()
