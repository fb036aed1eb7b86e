"""The parts of `gpu_lease.sh`: each measures one thing and writes DIR/PART.json as it goes; `table` shows what is there.

    python benchmarks/gpu_parts.py PART --out DIR [--limit SECONDS] [--into DIR] [--toy]

Parts: correctness, s4, s2, b2, xl2, memory (XL/2 at batch 256 in 80 GB), variants (other choices for the same step), sampling,
first_step, around (what surrounds the training step: a classifier, its features, decoding, encoding), tuned (kernels that
inductor chooses by timing them), table. `gpu_measures.py` and `gpu_variants.py` have the measurements. This file imports no
torch: a table takes a moment, the time of a part counts from its start, and a part that cannot be imported says so in its json.
`--into` is where all results are put after every write, in two files: gpu_lease.json, and lease.tgz with json and logs.
`--toy`, for a machine without a GPU, takes tiny models in float32 and shows only that the parts run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selftrans.messages import first_line
from selftrans.storage import atomic_write, write_json
from selftrans.train.interrupted import Interrupted

MODELS = ("s2", "b2", "s4", "xl2")
PARTS = ("correctness", *MODELS, "memory", "variants", "sampling", "first_step", "around", "tuned")
NO_GPU = 3  #: exit status where torch cannot use a GPU


class Job:
    """One part while it is measured: what it has found, written after every piece of work."""

    def __init__(self, part: str, out: Path, limit: float, *, toy: bool = False, into: Path | None = None) -> None:
        self.part, self.out, self.into, self.toy, self.limit = part, out, into, toy, limit
        self.started = time.monotonic()
        self.found: dict[str, Any] = {"unfinished": True}

    @property
    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self.limit - (time.monotonic() - self.started)

    def attempt(self, name: str, work: Callable[[], Mapping[str, Any]]) -> bool:
        """Add what `work` returns to what was found, or its error; the other pieces are of use without this one."""
        try:
            self.found |= work()
        except Interrupted:  # the time is over
            raise
        except Exception as error:
            self.failed(name, error)
            return False
        self.write()
        return True

    def failed(self, name: str, error: Exception) -> None:
        traceback.print_exc()
        said = f"{name}: {type(error).__name__} {first_line(error)}"
        self.found["failed"] = f"{self.found['failed']}; {said}" if "failed" in self.found else said
        self.write()

    def write(self) -> None:
        """OUT/PART.json, and the results of all parts in `into`."""
        self.found["part_s"] = round(time.monotonic() - self.started, 1)
        write_json(self.out / f"{self.part}.json", self.found)
        publish(self.out, self.into)


def results(out: Path) -> dict[str, Any]:
    """Part -> what it has found."""
    return {name: json.loads(path.read_text()) for name in PARTS if (path := out / f"{name}.json").is_file()}


def publish(out: Path, into: Path | None) -> None:
    """All results in one json, and with the logs in one archive."""
    write_json((into or out) / "gpu_lease.json", results(out))
    if into is None:
        return
    with atomic_write(into / "lease.tgz") as file, tarfile.open(fileobj=file, mode="w:gz") as packed:
        for path in sorted([*out.rglob("*.json"), *out.glob("*.log")]):
            if path.is_file() and not path.is_symlink():
                packed.add(path, str(path.relative_to(out)))


def table(out: Path) -> None:
    """Print a line for each part."""
    found = results(out)
    machine = next((part["machine"] for part in found.values() if "machine" in part), None)
    if machine:
        print(f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}")
    for name in PARTS:
        print(f"{name:<12} {line(name, found[name]) if name in found else 'not measured'}")


def line(name: str, part: Mapping[str, Any]) -> str:
    """One part in a line: what it measured, and what failed."""
    shown = ["unfinished"] if "unfinished" in part else []
    shown += [f"failed: {part['failed']}"] if "failed" in part else []
    if name == "correctness" and part.get("checks"):
        checks = [f"{key} {_number(check['difference'], '.1e')}" for key, check in part["checks"].items()]
        shown.append(f"{'passed' if part.get('passed') else 'NOT passed'}: {', '.join(checks)}")
    for model in part.get("models", {}).values():
        shown += [_row(key, row) for key, row in model["rows"].items()]
    known = ((key, value) for key, value in part.items() if isinstance(value, float) and key != "part_s")
    return "; ".join([*shown, ", ".join(f"{key} {value:,.3g}" for key, value in known)]).removesuffix("; ")


def _row(name: str, row: Mapping[str, Any]) -> str:
    memory = "" if row["peak_memory_gb"] is None else f", {row['peak_memory_gb']:.1f} GB"
    used = "" if row["utilisation"] is None else f" ({row['utilisation']:.1%} of the peak)"
    graph = "" if row.get("replayed", True) else " without graphs"
    return f"{name}{graph} {row['images_per_s']:,.0f}/s{used}{memory}, first step {row['first_step_s']:.1f} s"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def measures() -> Any:
    """gpu_measures.py, which imports torch and the package."""
    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("gpu_measures")


def measure(job: Job) -> int:
    """Run a part; returns the exit status."""
    try:
        found = measures()
        reason = None if job.toy else found.no_gpu()
        if reason:
            print(f"torch cannot use a GPU: {reason}", file=sys.stderr)
            return NO_GPU
        job.found["machine"] = found.machine(job.toy)
        job.write()
        found.PARTS[job.part](job)
    except Exception as error:
        job.failed(job.part, error)
    else:
        del job.found["unfinished"]
    job.write()
    print(f"{job.part}: {line(job.part, job.found)}")
    return int("failed" in job.found or not job.found.get("passed", True))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[*PARTS, "table"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=600.0)
    parser.add_argument("--into", type=Path)
    parser.add_argument("--toy", action="store_true")
    given = parser.parse_args(words)
    for folder in (given.out, given.into):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    if given.part != "table":
        return measure(Job(given.part, given.out, given.limit, toy=given.toy, into=given.into))
    publish(given.out, given.into)
    table(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
