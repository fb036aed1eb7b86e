"""How fast `selftrans ui` answers: fifty made-up runs with long logs, each kind of request, time on the wall and of the server.

    python benchmarks/ui_speed.py [--runs 50] [--lines 10000] [--starts 3] [--repeats 20] [--out DIR]

Makes the runs in a temporary folder: two stages with `--lines` lines of log each, measured points, previews, checkpoints
without content. Starts the server, and asks as the page does. What is counted:

    cold    the first request of its kind after a start; for what depends on a run, the first one of each of ten runs
    warm    again, while nothing has changed; a browser sends what it has, and gets no content
    grown   after a line was added to the log of a run

Prints medians and largest values over all starts: milliseconds until the answer is complete, milliseconds of processor time of
the server in them (of Linux), bytes that were sent. Writes them to DIR/ui_speed.json. The files are in the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from selftrans.config import to_json
from selftrans.evaluate.plots import save
from selftrans.experiments.bench.machine import describe
from selftrans.experiments.html_report import aligned
from selftrans.methods.registry import stages
from selftrans.recipes import recipe
from selftrans.storage import write_json

POINTS, PREVIEWS, COLD = 10, 8, 10  #: of each run; runs that are opened anew after each start
SECONDS, TFLOPS = 0.1, 0.004  #: of a step
PAUSE = 2.1  #: seconds between two requests of the list, after which the folders are searched again


def make_runs(folder: Path, count: int, lines: int) -> None:
    """Finished runs of the recipe digits, `run-seed<k>`: settings, report, logs, measured points, previews, checkpoints."""
    config = recipe("digits").restricted()
    plan = stages(config)
    spent = [
        {"stage": each.name, "steps": lines, "seconds": SECONDS * lines, "tflops": TFLOPS * lines} for each in plan
    ]
    report = {
        "method": config.method,
        "order": [each.name for each in plan],
        "student_steps": lines,
        "student_tflops": TFLOPS * lines,
        "total_tflops": 2 * TFLOPS * lines,
        "total_seconds": 2 * SECONDS * lines,
        "stages": spent,
    }
    config = config.override({"train.steps": lines, "stage1.steps": lines})
    sampler = {"steps": 12, "sampler": "heun", "guidance_scale": 1.0}
    measured = {"metric": "distance", "sampler": sampler, "images": 1000, "extractor_sha256": "0" * 64, "block": 2}
    measured |= {"accuracy": 0.9, "probe": 0.7}
    logs = {each.name: "".join(log_line(each.name, step) for step in range(1, lines + 1)) for each in plan}
    steps = sorted({max(1, lines * k // POINTS) for k in range(1, POINTS + 1)})
    for k in tqdm(range(count), desc="making runs", unit="run", disable=count < 10):
        run = folder / f"run-seed{k}"
        run.mkdir(parents=True)
        (run / "config.json").write_text(to_json(config), encoding="utf-8")
        (run / "run.json").write_text(json.dumps(report), encoding="utf-8")
        points = [
            {"step": s, "seconds": SECONDS * s, "tflops": TFLOPS * s, "distance": 9 / s + k} | measured for s in steps
        ]
        (run / "measured.json").write_text(json.dumps(points), encoding="utf-8")
        for name, log in logs.items():
            (run / name / "previews").mkdir(parents=True)
            (run / name / "log.jsonl").write_text(log, encoding="utf-8")
            for step in steps[:PREVIEWS]:
                (run / name / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
                picture = np.random.default_rng(step).integers(0, 256, (64, 256, 3), dtype=np.uint8)
                save(picture, run / name / "previews" / f"step-{step:08d}.png")


def log_line(stage: str, step: int) -> str:
    """A line of log.jsonl, as the two stages write it."""
    loss = 0.5 + 1 / step + 0.01 * (step % 7)
    values = {
        "loss": loss,
        "flow": 0.8 * loss,
        "self": 0.4 * loss,
        "self/feature_norm": 8.5 + loss,
        "grad_norm": 0.7 + loss,
    }
    rest = {"lr": 0.004, "seconds": round(SECONDS * step, 3), "tflops": TFLOPS * step}
    return json.dumps({"stage": stage, "step": step, **values, **rest}) + "\n"


def processor_time(pid: int) -> float | None:
    """Seconds of processor time of all threads that a process has; None where the system does not say."""
    try:
        of_threads = [int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat")]
        return sum(of_threads) / 1e9 if of_threads else None
    except (OSError, ValueError, IndexError):
        return None


@contextlib.contextmanager
def started(folder: Path) -> Iterator[tuple[int, int]]:
    """(port, process) of `selftrans ui` on a folder. ValueError with its last line where it does not start."""
    command = [sys.executable, "-m", "selftrans", "ui", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        said = ""
        for said in process.stdout:
            if found := re.search(r"Open http://127\.0\.0\.1:(\d+)/", said):
                yield int(found[1]), process.pid
                return
        raise ValueError(f"the server did not start: {said.strip()}")
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()


@dataclass
class Client:
    """Asks a server, and notes what each answer took: (kind, state) -> rows of (wall ms, processor ms or None, bytes)."""

    noted: dict[tuple[str, str], list[tuple[float, float | None, int]]] = field(default_factory=dict)
    _tags: dict[str, str] = field(default_factory=dict)

    def connect(self, port: int, pid: int) -> None:
        """To a server that has just been started: nothing is known of its answers."""
        self._connection, self._pid = http.client.HTTPConnection("127.0.0.1", port, timeout=600), pid
        self._tags.clear()

    def ask(self, kind: str, state: str, path: str) -> bytes:
        """The content, compressed if the server does that; none if it is what was sent before. ValueError for an error."""
        headers = {"Accept-Encoding": "gzip"} | ({"If-None-Match": self._tags[path]} if path in self._tags else {})
        self._connection.close()  # the server closes those that were idle for long
        before, began = processor_time(self._pid), time.perf_counter()
        self._connection.request("GET", path, headers=headers)
        answer = self._connection.getresponse()
        content = answer.read()
        wall, after = time.perf_counter() - began, processor_time(self._pid)
        if answer.status not in (200, 304):
            raise ValueError(f"{path} was answered with {answer.status}: {content[:200].decode(errors='replace')}")
        if tag := answer.headers.get("ETag"):
            self._tags[path] = tag
        used = None if before is None or after is None else 1e3 * (after - before)
        self.noted.setdefault((kind, state), []).append((1e3 * wall, used, len(content)))
        return content

    def plain(self, path: str) -> Any:
        """The json of an answer that is not noted."""
        self._connection.close()
        self._connection.request("GET", path)
        return json.loads(self._connection.getresponse().read())


def measure(client: Client, folder: Path, lines: int, repeats: int, pause: float) -> None:
    """All requests after one start. ValueError where the server finds anything wrong with the runs."""
    client.ask("page", "cold", "/")
    client.ask("list of runs", "cold", "/api/runs")
    found = client.plain("/api/runs")["runs"]
    wrong = [run for run in found if run["state"] != "done" or run["notes"] or run["step"] != run["steps"]]
    if wrong or len(found) != len([*folder.iterdir()]):
        raise ValueError(f"the server lists {len(found)} runs, {len(wrong)} of them not as they were made: {wrong[:1]}")
    keys = {run["name"]: run["id"] for run in found}
    opened = list(keys.values())[:COLD]
    addresses = {
        "a run": f"/api/runs/{opened[0]}",
        "side by side": "/api/side?" + "&".join(f"run={key}" for key in opened[:8]),
        "tables": "/api/tables",
        "preview": f"/api/runs/{opened[0]}/previews/1/{max(1, lines // POINTS)}.png",
    }
    for key in opened:
        client.ask("a run", "cold", f"/api/runs/{key}")
    for kind in ("side by side", "tables", "preview"):
        client.ask(kind, "cold", addresses[kind])
    for _ in range(repeats):
        for kind, path in ({"page": "/"} | addresses).items():
            client.ask(kind, "warm", path)
    for _ in range(max(1, repeats // 2)):
        time.sleep(pause)
        client.ask("list of runs", "warm", "/api/runs")
    log = folder / next(iter(keys)) / "stage2" / "log.jsonl"
    before = log.read_bytes()
    for k in range(1, repeats + 1):
        with log.open("a", encoding="utf-8") as file:
            file.write(log_line("stage2", lines + k))
        client.ask("a run", "grown", addresses["a run"])
        client.ask("list of runs", "grown", "/api/runs")
    log.write_bytes(before)


def table(noted: dict[tuple[str, str], list[tuple[float, float | None, int]]]) -> list[dict[str, Any]]:
    """A row for each kind of request and state."""
    found = []
    for (kind, state), rows in sorted(noted.items()):
        wall, used, sent = zip(*rows, strict=True)
        row: dict[str, Any] = {"request": kind, "state": state, "count": len(rows)}
        row["bytes"] = int(statistics.median(sent))
        for name, values in (("ms", wall), ("processor_ms", used)):
            known = [value for value in values if value is not None]
            row[name] = round(statistics.median(known), 2) if known else None
            row[f"{name}_largest"] = round(max(known), 2) if known else None
        found.append(row)
    return found


def text(found: Sequence[dict[str, Any]]) -> str:
    """The table for a terminal."""
    keys = ("request", "state", "count", "ms", "ms_largest", "processor_ms", "processor_ms_largest", "bytes")
    lines = [[key.replace("_", " ") for key in keys], *([str(row[key]) for key in keys] for row in found)]
    return aligned(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--lines", type=int, default=10_000, help="of log, for each of two stages")
    parser.add_argument("--starts", type=int, default=3, help="of the server")
    parser.add_argument("--repeats", type=int, default=20, help="of each warm request, after each start")
    parser.add_argument("--pause", type=float, default=PAUSE, help="seconds before each warm request of the list")
    parser.add_argument("--out", type=Path, help="folder for ui_speed.json")
    given = parser.parse_args(argv)
    if min(given.runs, given.lines, given.starts, given.repeats) < 1 or given.pause < 0:
        parser.error("--runs, --lines, --starts and --repeats are 1 at least, --pause is 0 at least")
    client, machine = Client(), describe(torch.device("cpu"), "fp32")
    with tempfile.TemporaryDirectory(prefix="ui-speed-") as place:
        folder = Path(place, "runs")
        make_runs(folder, given.runs, given.lines)
        size = sum(file.stat().st_size for file in folder.rglob("log.jsonl"))
        for _ in tqdm(range(given.starts), desc="measuring", unit="start", disable=given.starts < 2):
            with started(folder) as (port, pid):
                client.connect(port, pid)
                measure(client, folder, given.lines, given.repeats, given.pause)
    found = table(client.noted)
    options = {name: value for name, value in vars(given).items() if name != "out"}
    print(text(found))
    print(f"\n{given.runs} runs, {size / 1e6:.0f} MB of logs; the load average was {machine['load_before']} before")
    if given.out:
        write_json(given.out / "ui_speed.json", {"machine": machine, **options, "log_bytes": size, "requests": found})
        print(f"{given.out / 'ui_speed.json'}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the server
    main()
