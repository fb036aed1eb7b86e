"""bench.json of an earlier run => what a training step costs on one device of that kind."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selftrans.config import RunConfig
from selftrans.messages import first_line, printable
from selftrans.models.registry import find
from selftrans.storage import UNREADABLE
from selftrans.types import Conditions

#: prefixes of rows: of the plain implementation (`plain_step`), which `train` does not run, and of steps replayed as CUDA
#: graphs (`train.capture`)
PLAIN, CAPTURED = "plain_", "captured_"


@dataclass(frozen=True)
class Row:
    """A step of one stage."""

    name: str
    batch: int
    seconds: float
    fixed: float  #: seconds of it that do not depend on the batch: clipping, optimiser, average
    flops: float  #: floating-point operations of one image
    peak_bytes: float | None  #: of the device's memory

    @property
    def replayed(self) -> bool:
        """Whether its steps were replays of CUDA graphs."""
        return self.name.startswith(CAPTURED)

    @property
    def stage(self) -> str:
        """The stage of which it is a step."""
        return self.name.removeprefix(CAPTURED)

    @property
    def per_image(self) -> float:
        """Seconds of one more image in the batch."""
        return (self.seconds - self.fixed) / self.batch


@dataclass(frozen=True)
class BenchedModel:
    """The rows of one model on one device."""

    source: str
    device: str
    model: str
    rows: dict[str, Row]
    precision: str = ""  #: of the steps, as `train.precision` has it; empty where it is not recorded

    @functools.cached_property
    def parameters(self) -> int | None:
        """Number of parameters of the model, on latents as `bench` has them; None where its name is not known here."""
        try:
            with torch.device("meta"):
                config = RunConfig("bench", model=find(self.model).Config(name=self.model))
                model = config.build_model((4, 32, 32), Conditions("labels", 1000))
        except ValueError:
            return None
        return sum(p.numel() for p in model.parameters())

    def row(self, stage: str, *, replayed: bool = False) -> Row:
        """The row of this stage, or else the first: of replayed steps, or of launched ones, where there are any of these."""
        wanted = [row for row in self.rows.values() if row.replayed == replayed]
        known = [*wanted, *self.rows.values()] if replayed else wanted or [*self.rows.values()]
        return next((row for row in known if row.stage == stage), known[0])


def read_measured(path: Path, model: str) -> BenchedModel:
    """The rows of `model` in a bench.json, or of the model in it with the most operations. ValueError where there are none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        machine = report["machine"]
        device = printable(machine["gpu"] or machine["cpu"])
        found = {
            name: BenchedModel(printable(path), device, printable(name), _rows(each), str(machine.get("dtype", "")))
            for name, each in report["models"].items()
            if "rows" in each
        }
        found = {name: each for name, each in found.items() if each.rows}
        if not found:
            raise ValueError("it has no measured model")
    except UNREADABLE as error:
        reason = f"{type(error).__name__} {first_line(error)}" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(f"{path} is not a bench.json ({reason}); give one that `selftrans bench` wrote") from None
    return found.get(model) or max(found.values(), key=lambda each: each.row("").flops)


def _rows(model: dict[str, Any]) -> dict[str, Row]:
    peak, batch = float(model["matmul_peak_tflops"]) * 1e12, int(model["batch"])
    rows = {}
    for name, row in model["rows"].items():
        if name.startswith(PLAIN):
            continue
        seconds, fixed = float(row["ms"]) / 1e3, float(row["optimiser_ms"] or 0) / 1e3
        memory = row.get("peak_memory_gb")
        flops = float(row["utilisation"]) * peak * seconds / batch
        if not (0 <= fixed < seconds < math.inf and 0 < flops < math.inf):
            raise ValueError(f"the numbers of row {printable(name)} are impossible")
        rows[name] = Row(name, batch, seconds, fixed, flops, None if memory is None else float(memory) * 1e9)
    return rows
