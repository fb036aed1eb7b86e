"""The models of runs: which ones the page offers, which weights a request asks for, which are kept in memory between jobs."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from selftrans.checkpoints.load import LoadedModel, load_model
from selftrans.messages import printable
from selftrans.methods.spec import Stage
from selftrans.plain_json import from_plain
from selftrans.types import Backbone
from selftrans.ui.contained import number, part, plain
from selftrans.ui.jobs import Job
from selftrans.ui.run_plan import scale_of
from selftrans.ui.run_state import STEP, RunState

KEPT = 2  #: models in memory: a student and its teacher
MOST_CLASSES = 1000  #: classes whose names are sent to the page


def available_models(state: RunState, known: Sequence[RunState]) -> dict[str, Any]:
    """What can be sampled and drawn, as json types. `known`: the runs that may hold its teacher."""
    run = state.read()
    data, _ = state.files.read(state.place / "data.json")
    classes, sample = part(data, "classes", list), part(run.config, "sample", dict)
    stages = [{"name": name, "checkpoints": found} for name in run.stages if (found := state.checkpoints(name))]
    plan, last = run.plan, run.plan.stages[-1] if run.plan.stages else None
    return {
        "stages": stages,
        "conditions": str(part(data, "conditions", dict).get("kind", "none")),
        "classes": [printable(name, 60) for name in classes[:MOST_CLASSES]],
        "rows": number((data or {}).get("count")),
        "sample": {
            name: plain(sample.get(name))
            for name in ("steps", "sampler", "guidance_scale", "guidance_interval", "time_shift", "seed", "prompts")
        },
        "teacher": _teacher(state, last, known),
        "scale": scale_of(plan.config, last) if plan.config and last else None,
    }


def _teacher(state: RunState, last: Stage | None, known: Sequence[RunState]) -> dict[str, Any] | None:
    """The checkpoint that taught the last stage, if it is in one of the runs."""
    spec = last.teacher if last else None
    if spec is None:
        return None
    holder, step = (state, None) if spec.given is None else _holder(spec.given, known)
    if holder is None:
        return None
    held = holder.checkpoints(spec.stage)
    chosen = step if step in held else held[-1] if held else None
    if chosen is None:
        return None
    return {
        "run": holder.found.id,
        "name": holder.found.name,
        "stage": spec.stage,
        "step": chosen,
        "weights": spec.weights,
    }


def _holder(given: str, known: Sequence[RunState]) -> tuple[RunState | None, int | None]:
    """The run that holds a given teacher, and the step of its checkpoint if it is named."""
    path = Path(os.path.realpath(given)) if "\0" not in given else Path()
    holder = next((each for each in known if path.is_relative_to(each.place.path)), None)
    steps = [int(match[1]) for name in path.parts if (match := re.fullmatch(STEP, name))]
    return holder, steps[-1] if steps else None


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Weights of a run, as a request names them."""

    run: str
    """id"""
    stage: str
    step: int
    weights: Literal["ema", "raw"] = "ema"


class Source(NamedTuple):
    """Weights that exist."""

    state: RunState
    wanted: Wanted
    file: Path

    @property
    def text(self) -> str:
        return f"{self.state.found.name}, {self.wanted.stage}, step {self.wanted.step:,}"


def source_of(raw: Any, run: Callable[[str], RunState], where: str) -> Source:
    """The weights that a request names. ValueError or LookupError where there are none."""
    wanted: Wanted = from_plain(Wanted, raw, where)
    state = run(wanted.run)
    if wanted.stage not in state.read().stages:
        raise LookupError(f"{state.found.name} has no such stage")
    return Source(state, wanted, state.weights(wanted.stage, wanted.step, wanted.weights))


class ModelCache:
    """The models used last, by the file of their weights, on `device`. Used by one job at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[tuple[Any, ...], LoadedModel] = {}

    def load(self, source: Source, job: Job, *, cast: str = "fp32") -> LoadedModel:
        """The model, on the device. `cast`: the precision that the caller casts it to. ValueError as `load_model`."""
        job.doing = f"loading {source.text}"
        job.check()
        about = source.file.stat()
        key = (source.file, about.st_ino, about.st_mtime_ns, about.st_size, cast)
        found = self._kept.pop(key, None)
        if found is None:
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            found = load_model(source.file)
            found.model.to(self.device)
        self._kept[key] = found  # last: the one used last
        job.check()
        return found


@contextmanager
def counted_passes(model: Backbone, job: Job) -> Iterator[None]:
    """Within the block, each pass of the model counts as one unit of the job; Cancelled where the job was asked to end."""
    hook = model.register_forward_pre_hook(job.advance)
    try:
        yield
    finally:
        hook.remove()


def take(raw: Mapping[str, Any], name: str, kind: Any, default: Any = None) -> Any:
    """A field of a request, or the default. ValueError, with its name, where it has another type."""
    return default if raw.get(name) is None else from_plain(kind, raw[name], name)
