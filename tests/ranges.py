"""The ends of the ranges in pyproject.toml: the package with the lowest, or the newest, versions of what it depends on.

    python tests/ranges.py lowest        python tests/ranges.py newest        python tests/ranges.py lowest --torch 2.13.0

Makes a virtual environment in build/ranges-END, installs the package with its extras `media` and `text` there (as a wheel, with
pip), prints the versions, and runs a part of the tests with them. Several gigabytes where pip takes a CUDA build of torch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tomllib
from pathlib import Path

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("end", choices=("lowest", "newest"))
    parser.add_argument("--torch", metavar="VERSION", help="this version of torch, such as a CPU build that is at hand")
    parser.add_argument("--install-only", action="store_true", help="run no tests")
    parser.add_argument("tests", nargs="*", default=TESTS, help="tests to run, instead of the usual part")
    given = parser.parse_args()
    folder = ROOT / "build" / f"ranges-{given.end}"
    pins = lowest() if given.end == "lowest" else {}
    pins |= {"torch": given.torch} if given.torch else {}
    python = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    (folder / "pins.txt").write_text(
        "".join(f"{name}=={version}\n" for name, version in pins.items()), encoding="utf-8"
    )
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    wanted = [f"{ROOT}[{','.join(EXTRAS)}]", *TOOLS]
    subprocess.run([*pip, "install", "--quiet", "--constraint", str(folder / "pins.txt"), *wanted], check=True)
    subprocess.run([*pip, "check"], check=True)
    names = sorted(each.name for each in requirements())
    show = "import importlib.metadata as m, sys; print('\\n'.join(f'{n}=={m.version(n)}' for n in sys.argv[1:]), flush=True)"
    subprocess.run([python, "-c", show, *names], check=True)
    if given.install_only:
        return 0
    command = [python, "-m", "pytest", "-m", "not slow", *given.tests]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONNOUSERSITE": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
