"""The ends of the ranges in pyproject.toml: the package with the lowest, or the newest, versions of what it depends on.

    python tests/ranges.py lowest        python tests/ranges.py newest        python tests/ranges.py lowest --torch 2.13.0

Asks pip which versions it would take, installs these and the package with its extras `media` and `text` (as a wheel) in a
virtual environment in build/ranges-END, and runs a part of the tests with them. The lowest end fixes what pyproject.toml
names; pip chooses the newest of all else. Several gigabytes where pip takes a CUDA build of torch: --torch names the version
of a CPU build that is at hand. Repeating the command keeps what is installed already. build/ranges-END/result.json has
versions, tests and times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("media", "text")
TOOLS = ("pytest", "pytest-timeout", "hypothesis")
#: what the tests run: every library is called by one of them
TESTS = (
    "tests/unit/cli",
    "tests/unit/checkpoints",
    "tests/unit/data/sources",
    "tests/unit/data/test_prepare.py",
    "tests/unit/data/test_encode_captions.py",
    "tests/unit/encoders",
    "tests/unit/evaluate/test_classifier.py",
    "tests/unit/evaluate/test_metrics.py",
    "tests/unit/evaluate/test_plots.py",
    "tests/unit/interop",
    "tests/unit/models/test_diffusers_published.py",
    "tests/unit/models/test_lora.py",
    "tests/unit/sampling/test_sample_to_folder.py",
    "tests/unit/train/test_trainer.py",
    "tests/integration/test_golden.py",
)
#: free space that an installation needs at most, in GB: with a CPU build of torch, and with the CUDA libraries
SPACE = {False: 4, True: 16}
CUDA = re.compile(r"nvidia-|cuda-|triton$")


class Failed(Exception):
    """One line for the user."""


def requirements() -> list[Requirement]:
    """What the package and its extras depend on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return [
        Requirement(line) for line in (*project["dependencies"], *(line for name in EXTRAS for line in extras[name]))
    ]


def lowest() -> dict[str, str]:
    """Distribution -> the lowest version that pyproject.toml allows."""
    return {each.name: next(of.version for of in each.specifier if of.operator == ">=") for each in requirements()}


def resolved(report: Mapping[str, Any]) -> dict[str, str]:
    """Distribution -> version, from what `pip install --dry-run --report` writes; without the package itself."""
    found = {each["metadata"]["name"]: each["metadata"]["version"] for each in report["install"]}
    return {
        name: version
        for name, version in sorted(found.items(), key=lambda item: item[0].lower())
        if name != "selftrans"
    }


def pip_error(output: str) -> str:
    """The reason in pip's output, in one line: what cannot be had, or which requirements exclude each other."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    conflict = [line for line in lines if re.search(r" (depends on|requires|requested) ", line) and "ERROR" not in line]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return "; ".join([*errors[:1], *conflict[:4]]) or (lines[-1] if lines else "no output")


def check_space(folder: Path, names: Iterable[str]) -> None:
    """Failed where the disk is too full for these distributions."""
    needed, free = SPACE[any(map(CUDA.match, names))], shutil.disk_usage(folder).free / 1e9
    if free < needed:
        raise Failed(
            f"{folder} has {free:.1f} GB free, and these versions may need {needed} GB; give --torch a CPU build"
        )


def environment() -> dict[str, str]:
    """That of the tests: the installed package is imported, not the one in src."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONNOUSERSITE": "1"}


class Place:
    """The virtual environment of one end."""

    def __init__(self, end: str) -> None:
        self.end, self.folder = end, ROOT / "build" / f"ranges-{end}"
        self.python = self.folder / ("Scripts" if os.name == "nt" else "bin") / "python"

    def make(self) -> None:
        """Make it, unless there is one of this version of Python that works."""
        same = ["-c", f"import pip, sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"]
        if not self.python.exists() or self.call(*same).returncode:
            self.folder.parent.mkdir(exist_ok=True)
            done = subprocess.run(
                [sys.executable, "-m", "venv", "--clear", str(self.folder)], capture_output=True, text=True
            )
            if done.returncode:
                raise Failed(f"no virtual environment could be made: {pip_error(done.stdout + done.stderr)}")

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(self.python), *words], cwd=ROOT, env=environment(), capture_output=True, text=True)

    def pip(self, *words: str) -> None:
        done = self.call("-m", "pip", "--disable-pip-version-check", "--no-input", *words)
        if done.returncode:
            raise Failed(f"pip {words[0]} of the {self.end} versions: {pip_error(done.stdout + done.stderr)}")

    def resolve(self, pins: Mapping[str, str]) -> dict[str, str]:
        """The versions that pip would install with these, which may need a download of large files' descriptions only."""
        held, report = self.folder / "pins.txt", self.folder / "report.json"
        held.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()), encoding="utf-8")
        ours = f"{ROOT}[{','.join(EXTRAS)}]"
        options = ["--dry-run", "--quiet", "--ignore-installed", "--report", str(report), "--constraint", str(held)]
        self.pip("install", *options, ours, *TOOLS)
        return resolved(json.loads(report.read_text(encoding="utf-8")))

    def install(self, versions: Mapping[str, str]) -> None:
        """Exactly these versions; those that are installed stay. Then the package, as a wheel."""
        exact = self.folder / "versions.txt"
        exact.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()), encoding="utf-8")
        self.pip("install", "--quiet", "--no-deps", "--requirement", str(exact))
        self.pip("install", "--quiet", "--no-deps", "--force-reinstall", str(ROOT))
        self.pip("check")

    def test(self, tests: Sequence[str]) -> int:
        """pytest's exit status."""
        command = [
            str(self.python),
            "-m",
            "pytest",
            "-m",
            "not slow",
            "-o",
            f"cache_dir={self.folder / 'pytest'}",
            *tests,
        ]
        return subprocess.run(command, cwd=ROOT, env=environment()).returncode


def run(end: str, torch: str | None, tests: Sequence[str], *, install_only: bool) -> int:
    """Resolve, install, test; the exit status of the tests. Failed with one line where it does not come to them."""
    missing = [test for test in tests if not (ROOT / test.partition("::")[0]).exists()]
    if missing:
        raise Failed(f"there is no {missing[0]}; name tests from the root of the repository")
    place, times = Place(end), dict[str, float]()

    def timed(what: str, since: float) -> float:
        times[what] = round(time.perf_counter() - since, 1)
        print(f"{end}: {what} in {times[what]:.0f} s", flush=True)
        return time.perf_counter()

    started = time.perf_counter()
    print(f"{end}: Python {platform.python_version()}, {place.folder}; asking pip for versions", flush=True)
    place.make()
    pins = (lowest() if end == "lowest" else {}) | ({"torch": torch} if torch else {})
    versions = place.resolve(pins)
    started = timed(f"{len(versions)} versions found", started)
    cuda = sum(bool(CUDA.match(name)) for name in versions)
    direct = {each.name.lower().replace("_", "-") for each in requirements()} | {*TOOLS}
    print("\n".join(f"  {n}=={v}" for n, v in versions.items() if n.lower().replace("_", "-") in direct), flush=True)
    if cuda:
        print(
            f"{end}: {cuda} CUDA libraries among them: gigabytes; --torch VERSION of a CPU build avoids them",
            flush=True,
        )
    check_space(place.folder, versions)
    place.install(versions)
    started = timed("installed", started)
    result: dict[str, Any] = {"end": end, "python": platform.python_version(), "versions": versions, "tests": None}
    if not install_only:
        result |= {"tests": [*tests], "status": place.test(tests)}
        timed(f"{len(tests)} files and folders of tests ended with {result['status']}", started)
    file = place.folder / "result.json"
    file.write_text(json.dumps(result | {"seconds": times}, indent=2) + "\n", encoding="utf-8")
    print(f"{end}: {file}", flush=True)
    return int(result.get("status", 0))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("end", choices=("lowest", "newest"))
    parser.add_argument("--torch", metavar="VERSION", help="this version of torch, such as a CPU build that is at hand")
    parser.add_argument("--install-only", action="store_true", help="run no tests")
    parser.add_argument("tests", nargs="*", default=TESTS, help="tests to run, instead of the usual part")
    given = parser.parse_args(argv)
    try:
        return run(given.end, given.torch, given.tests, install_only=given.install_only)
    except (Failed, OSError) as error:
        print(f"ranges: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ranges: interrupted; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
