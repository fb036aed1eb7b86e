"""tests/ranges.py: what it takes from pip, and its errors of one line; nothing is installed here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ranges

#: of pip 23 to 26
CONFLICT = """Processing /home/me/selftrans
ERROR: Cannot install numpy==1.26 and selftrans[media]==0.1.0 because these package versions have conflicting dependencies.

The conflict is caused by:
    selftrans[media] 0.1.0 depends on numpy>=2
    The user requested (constraint) numpy==1.26

To fix this you could try to:
1. loosen the range of package versions you've specified
ERROR: ResolutionImpossible: for help visit https://pip.pypa.io/
"""
MISSING = """ERROR: Could not find a version that satisfies the requirement torch==9.9 (from versions: 2.12.0, 2.13.0)
ERROR: No matching distribution found for torch==9.9
"""


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (
            CONFLICT,
            "Cannot install numpy==1.26 and selftrans[media]==0.1.0 because these package versions have conflicting "
            "dependencies.; selftrans[media] 0.1.0 depends on numpy>=2; The user requested (constraint) numpy==1.26",
        ),
        (
            MISSING,
            "Could not find a version that satisfies the requirement torch==9.9 (from versions: 2.12.0, 2.13.0)",
        ),
        ("torch 2.13 requires sympy, which is not installed.\n", "torch 2.13 requires sympy, which is not installed."),
        ("  error: subprocess-exited-with-error\n  gcc failed\n", "gcc failed"),
        ("", "no output"),
    ],
)
def test_reason_of_pip_in_one_line(output: str, line: str) -> None:
    assert ranges.pip_error(output) == line


def report(*names: str) -> dict[str, Any]:
    return {"install": [{"metadata": {"name": name, "version": "1.0"}} for name in names]}


def test_resolved_versions_are_those_of_the_report_without_the_package() -> None:
    assert ranges.resolved(report("torch", "selftrans", "Jinja2")) == {"Jinja2": "1.0", "torch": "1.0"}
    cuda = ["nvidia-cublas-cu12", "triton", "cuda-bindings"]
    assert all(map(ranges.CUDA.match, cuda)) and not any(map(ranges.CUDA.match, ["torch", "tritonclient", "numpy"]))


class NoPip(ranges.Place):
    """An environment whose pip only notes what it is asked for."""

    asked: list[tuple[str, ...]] = []  # noqa: RUF012 - one test at a time
    names: tuple[str, ...] = ("torch", "numpy", "pytest")
    fails = ""

    def __init__(self, end: str) -> None:
        super().__init__(end)
        self.folder = Path("ranges")

    def make(self) -> None:
        self.folder.mkdir(exist_ok=True)

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        self.asked.append(words)
        if "--report" in words:
            Path(words[words.index("--report") + 1]).write_text(json.dumps(report(*self.names)))
        failed = bool(self.fails) and self.fails in words
        return subprocess.CompletedProcess(words, failed, "", MISSING if failed else "")

    def test(self, tests: Any) -> int:
        return 3


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[NoPip]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ranges, "Place", NoPip)
    monkeypatch.setattr(NoPip, "asked", [])
    monkeypatch.setattr(ranges, "SPACE", {False: 0, True: 0})
    return NoPip


def test_lowest_end_pins_what_pyproject_names(place: type[NoPip], capsys: pytest.CaptureFixture[str]) -> None:
    assert ranges.main(["lowest", "--torch", "2.13.0"]) == 3, "pytest's status"
    pins = Path("ranges/pins.txt").read_text().splitlines()
    assert "torch==2.13.0" in pins and f"tyro=={ranges.lowest()['tyro']}" in pins and len(pins) == len(ranges.lowest())
    assert [words[4] for words in place.asked] == ["install", "install", "install", "check"]
    assert "--dry-run" in place.asked[0] and "--no-deps" in place.asked[1]
    assert Path("ranges/versions.txt").read_text() == "numpy==1.0\npytest==1.0\ntorch==1.0\n"
    result = json.loads(Path("ranges/result.json").read_text())
    assert (result["end"], result["status"], result["tests"]) == ("lowest", 3, [*ranges.TESTS])
    assert set(result["versions"]) == {*place.names} and len(result["seconds"]) == 3
    said = capsys.readouterr().out
    assert "  torch==1.0\n" in said and "CUDA" not in said and "15 files and folders of tests ended with 3 in " in said


def test_newest_end_pins_nothing_and_names_cuda(
    place: type[NoPip], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(place, "names", ("torch", "nvidia-cublas", "triton"))
    assert ranges.main(["newest", "--install-only"]) == 0
    assert Path("ranges/pins.txt").read_text() == ""
    assert "2 CUDA libraries among them: gigabytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fails", "words", "line"),
    [
        ("--dry-run", ["newest"], "ranges: pip install of the newest versions: Could not find a version that"),
        ("check", ["newest"], "ranges: pip check of the newest versions: Could not find"),
        (
            "",
            ["newest", "tests/unit/nothing.py"],
            "ranges: there is no tests/unit/nothing.py; name tests from the root",
        ),
        ("", ["newest"], " GB free, and these versions may need 4000 GB; give --torch a CPU build"),
    ],
)
def test_errors_are_one_line(
    fails: str,
    words: list[str],
    line: str,
    place: type[NoPip],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(place, "fails", fails)
    monkeypatch.setattr(place, "names", ("torch",))
    if not fails:
        monkeypatch.setattr(ranges, "SPACE", {False: 4000, True: 4000})
    assert ranges.main(words) == 1
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def test_the_installed_package_is_tested_and_not_the_one_in_src(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "src")
    assert "PYTHONPATH" not in ranges.environment() and ranges.environment()["PYTHONNOUSERSITE"] == "1"


def test_environment_that_works_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another one of the same version of Python stands for it; one that does not start is made again."""
    place = ranges.Place("newest")
    place.folder, place.python = tmp_path / "ranges", Path(sys.executable)
    made: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        made.append(command)
        return subprocess.CompletedProcess(
            command, 1 if "venv" in command else int("broken" in command[0]), "", "no space"
        )

    monkeypatch.setattr(ranges.subprocess, "run", run)
    place.make()
    assert [command[0] for command in made] == [sys.executable] and "venv" not in made[0]
    place.python = tmp_path / "broken"
    place.python.write_text("")
    with pytest.raises(ranges.Failed, match="no virtual environment could be made: no space"):
        place.make()
