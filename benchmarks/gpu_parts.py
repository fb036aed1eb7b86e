"""The parts of `gpu_lease.sh`: each measures one thing and writes DIR/PART.json as it goes; `table` shows what is there.

    python benchmarks/gpu_parts.py PART --out DIR [--limit SECONDS] [--into DIR] [--toy]

Parts: those of `PARTS`, and table; docs/gpu-lease.md says what each measures. `gpu_measures.py`, `gpu_variants.py` and
`gpu_around.py` have the measurements. This file imports no torch: a table takes a moment, the time of a part counts from its
start, and a part that cannot be imported says so in its json.
`--into` is where all results are put after every write, in two files: gpu_lease.json, and lease.tgz with json and logs.
`--toy`, for a machine without a GPU, takes tiny models in float32 and shows only that the parts run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import statistics
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

#: in the order in which they are measured
PARTS = (
    "correctness", "b2", "first_step", "xl2", "memory", "s2", "loading", "attention", "variants", "compare", "route",
    "sampling", "variants_s2", "s4", "around", "tests", "tuned",
)  # fmt: skip
NO_GPU = 3  #: exit status where torch cannot use a GPU
#: errors after which a process cannot go on: a recording that failed, an error of the GPU
SPOILS = ("NotCaptured", "AcceleratorError")
USUAL = "as it is"  #: the choice that others are compared with
SHARED = 0.9  #: share of the memory of a GPU that is free where nothing else uses it
BUSY = 50.0  #: percent of the time that kernels ran, where the clock is that of the measurement


class Job:
    """One part while it is measured: what it has found, written after every piece of work."""

    def __init__(self, part: str, out: Path, limit: float, *, toy: bool = False, into: Path | None = None) -> None:
        self.part, self.out, self.into, self.toy, self.limit = part, out, into, toy, limit
        self.started = time.monotonic()
        self.found: dict[str, Any] = {"unfinished": True}
        self.postponed: list[str] = []  #: pieces that found no time, or a process that cannot go on
        self.spoilt = False  #: whether this process can use the GPU no longer
        path = out / f"{part}.json"
        self.before: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}  #: of an earlier call

    @property
    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self.limit - (time.monotonic() - self.started)

    def earlier(self, machine: Mapping[str, Any]) -> dict[str, Any]:
        """What an earlier call has found of this part, if its GPU and its torch were these; the rest is left to measure."""
        same = all(self.before.get("machine", {}).get(key) == machine[key] for key in ("gpu", "torch", "dtype"))
        known = {"machine", "failed", "unfinished", "measuring", "part_s"}
        return {key: value for key, value in self.before.items() if key not in known} if same else {}

    def stopped(self, name: str) -> bool:
        """Whether this piece failed in an earlier call, or was measured when that was stopped: others come first."""
        return f"{name}: " in self.before.get("failed", "") or name == self.before.get("measuring")

    def attempt(self, name: str, work: Callable[[], Mapping[str, Any]], needs: float = 0.0) -> bool:
        """Add what `work` returns to what was found, or its error; the other pieces are of use without this one.

        With less than `needs` seconds left, and after an error that ends the use of the GPU in this process, it is postponed:
        the part stays unfinished, and a later call measures it.
        """
        if self.spoilt or self.left < needs:
            self.postponed.append(name)
            return False
        self.found["measuring"] = name
        self.write()
        try:
            self.found |= work()
        except Interrupted:  # the time is over
            raise
        except Exception as error:
            self.spoilt = type(error).__name__ in SPOILS
            del self.found["measuring"]
            self.failed(name, error)
            return False
        del self.found["measuring"]
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
        if self.postponed:
            self.found["unfinished"] = f"not measured: {', '.join(self.postponed)}"
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
    """Print what each part has found, a line for each row or figure."""
    found = results(out)
    machines = [part["machine"] for part in found.values() if "machine" in part]
    for kind in dict.fromkeys(f"{each['gpu'] or each['cpu']}, torch {each['torch']}" for each in machines):
        print(kind)
    for name in PARTS:
        shown = [*items(name, found[name]), *clock(out / f"{name}-gpu.log")] if name in found else ["not measured"]
        for title, text in itertools.zip_longest([name], shown, fillvalue=""):
            print(f"{title:<12} {text}")


def items(name: str, part: Mapping[str, Any]) -> list[str]:
    """What a part measured, and what failed."""
    left = part.get("unfinished")
    stopped = f", stopped in {part['measuring']}" if "measuring" in part else ""
    shown = [f"unfinished: {left}" if isinstance(left, str) else f"unfinished{stopped}"] if left else []
    shown += [f"failed: {part['failed']}"] if "failed" in part else []
    share = part.get("machine", {}).get("free_memory")
    shown += (
        [f"OTHERS USE THE GPU ({share:.0%} of its memory was free)"] if share is not None and share < SHARED else []
    )
    if name == "correctness" and part.get("checks"):
        checks = [f"{key} {_number(check['difference'], '.1e')}" for key, check in part["checks"].items()]
        shown.append(f"{'passed' if part.get('passed') else 'NOT passed'}: {', '.join(checks)}")
    for model, found in part.get("models", {}).items():
        shown += [f"{model} {_row(key, row)}" for key, row in found["rows"].items()]
    choices = part.get("choices", {})
    shown += [_choice(name, row, choices.get(USUAL)) for name, row in choices.items()]
    shown += [f"{path}: {said}" for path, said in part.get("tests", {}).items()]
    shown += [f"{key} {_figure(value)}" for key, value in part.items() if isinstance(value, float) and key != "part_s"]
    return shown


def _choice(name: str, row: Mapping[str, Any], usual: Mapping[str, Any] | None) -> str:
    """A way to compute the step, and its differences from the usual one: those of loss and gradient should be of rounding."""
    differs = ""
    if usual and row is not usual:
        changes = [
            f"{label} {row[key] / usual[key] - 1:{form}}"
            for label, key, form in (
                ("time", "ms", "+.1%"),
                ("loss", "loss", "+.0e"),
                ("gradient", "grad_norm", "+.0e"),
            )
            if row[key] and usual[key]
        ]
        differs = f" ({', '.join(changes)})"
    return f"{name} {row['ms']:.2f} ms{differs}, first step {row['first_step_s']:.0f} s"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def clock(log: Path) -> list[str]:
    """Clock and power of the GPU while it was busy, from the lines of nvidia-smi that `gpu_lease.sh` keeps; [] without any."""
    read: list[list[float]] = []
    for text in log.read_text().splitlines() if log.is_file() else ():
        with contextlib.suppress(ValueError):  # a line that is cut short, or a value that the driver does not know
            values = [float(value) for value in text.split(",")]
            read += [values] if len(values) == 3 and values[0] >= BUSY else []
    if not read:
        return []
    _, clocks, watts = zip(*read, strict=True)
    return [f"{statistics.median(clocks):.0f} MHz ({min(clocks):.0f} at least), {max(watts):.0f} W at most"]


def _row(name: str, row: Mapping[str, Any]) -> str:
    memory = "" if row["peak_memory_gb"] is None else f", {row['peak_memory_gb']:.1f} GB"
    used = "" if row["utilisation"] is None else f" ({row['utilisation']:.1%} of the peak)"
    graph = "" if row.get("replayed", True) else " without graphs"
    rate = f"{row['ms']:.1f} ms, {row['images_per_s']:,.0f}/s"
    return f"{name}{graph} {rate}{used}{memory}, first step {row['first_step_s']:.1f} s"


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
        if not job.before:  # else the part may keep what an earlier call has found
            job.write()
        found.PARTS[job.part](job)
    except Exception as error:
        job.failed(job.part, error)
    else:
        del job.found["unfinished"]
    job.write()
    print(f"{job.part}: {'; '.join(items(job.part, job.found))}", flush=True)
    return int(bool({"failed", "unfinished"} & job.found.keys()) or not job.found.get("passed", True))


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
