"""The wheel: what is in it, and that it works where nothing of the repository is at hand.

It is built by hatchling itself, without a network and without an environment of its own, and installed by pip into a folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from selftrans import __version__
from selftrans.recipes import RECIPES
from selftrans.ui.server import STATIC

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INFO = f"selftrans-{__version__}.dist-info"
#: what lies next to the code in a working tree, and belongs into no wheel
STRAY = (
    "src/selftrans/__pycache__/flow.cpython-311.pyc",
    "src/selftrans/cli/.DS_Store",
    "src/selftrans/ui/static/.main.js.swp",
    "src/notes.txt",
    "tests/test_architecture.py",
    "benchmarks/ablations.py",
    "docs/bench/steps.json",
    "docs/.results.md.swp",
    "quickstart/table.json",
)
BUILD = "import hatchling.build, sys; print(hatchling.build.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from an archive of the repository without its history, in which other files lie about."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copytree(ROOT / "docs", tree / "docs")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tree)
    for name in STRAY:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("left here")
    done = subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip has installed the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--no-index", "--no-compile", "--quiet", "--disable-pip-version-check", "--target"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, folder, wheel], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def python(installed: Path, folder: Path, *words: str) -> str:
    """Output of Python with the installed package and the packages of this environment, without its editable installs.

    Without `site` (-S) the files *.pth of the environment, which name the repository, are not read.
    """
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    done = subprocess.run(
        [sys.executable, "-S", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if not name.endswith("/")}


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    source = ROOT / "src"
    ours = {path.relative_to(source).as_posix() for path in (source / "selftrans").rglob("*") if path.is_file()}
    ours |= {f"selftrans/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "docs").rglob("*.md")}
    expected = {name for name in ours if "__pycache__" not in name}
    found = contents(wheel)
    assert not {name for name in found if not name.startswith(f"{INFO}/")} ^ expected
    assert found - expected == {
        f"{INFO}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    }


def test_files_that_are_no_code_are_in_the_wheel(wheel: Path) -> None:
    found, folder = contents(wheel), "selftrans/ui/static/"
    assert {"selftrans/py.typed", "selftrans/cli/settings.json"} <= found
    assert {name.removeprefix(folder) for name in found if name.startswith(folder)} == {
        path.name for path in STATIC.iterdir()
    }


def test_metadata_has_the_dependencies_of_pyproject(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        about = HeaderParser().parsestr(file.read(f"{INFO}/METADATA").decode())
    needed = [Requirement(line) for line in about.get_all("Requires-Dist", [])]
    plain = {each for each in needed if not each.marker or "extra" not in str(each.marker)}
    assert plain == {Requirement(line) for line in PROJECT["dependencies"]}
    assert {*about.get_all("Provides-Extra", [])} == {*PROJECT["optional-dependencies"]}
    assert (about["Name"], about["Version"]) == ("selftrans", PROJECT["version"])
    assert about["Requires-Python"] == PROJECT["requires-python"]
    assert about["License-Expression"] == PROJECT["license"] and about.get_payload().startswith("# selftrans")


def test_installed_command_works_elsewhere(installed: Path, tmp_path: Path) -> None:
    command = str(installed / "bin" / "selftrans")
    assert python(installed, tmp_path, command, "--version") == f"selftrans {__version__}\n"
    assert "quickstart" in python(installed, tmp_path, command, "--help")
    listed = python(installed, tmp_path, command, "train", "--help")  # the recipes, from settings.json
    assert all(name in listed for name in RECIPES)
    assert not [*tmp_path.iterdir()]


def test_installed_package_names_pages_that_it_has(installed: Path, tmp_path: Path) -> None:
    command, pages = str(installed / "bin" / "selftrans"), installed / "selftrans" / "docs"
    for words in (["--help"], ["train", "digits", "--help"]):
        assert str(pages) in python(installed, tmp_path, command, *words)
    code = """
from selftrans.data.streaming.remote import checked
try:
    checked("s3://key:word@bucket/data")
except ValueError as error:
    print(error)
"""
    message = python(installed, tmp_path, "-c", code)
    assert message.endswith(f"(see {pages / 'streaming.md'})\n")
    assert (pages / "streaming.md").read_text(encoding="utf-8") == (ROOT / "docs" / "streaming.md").read_text(
        encoding="utf-8"
    )


def test_installed_library_is_the_one_that_is_imported(installed: Path, tmp_path: Path) -> None:
    code = """
import importlib.metadata, pathlib, selftrans
from selftrans.ui.server import Page, application
model = selftrans.SiT((1, 4, 4), 3, width=8, depth=2, heads=2, patch=2)
application(Page([pathlib.Path()]))  # reads all files of the page
print(selftrans.__file__, importlib.metadata.version("selftrans"), model.depth, sep="\\n")
"""
    file, version, depth = python(installed, tmp_path, "-c", code).splitlines()
    assert Path(file).is_relative_to(installed), "the repository is on the path"
    assert (version, depth) == (__version__, "2")
