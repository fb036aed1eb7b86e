"""Which weights a request asks for, and the models that are kept in memory between two jobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from selftrans.checkpoints.load import LoadedModel, load_model
from selftrans.plain_json import from_plain
from selftrans.types import Backbone
from selftrans.ui.jobs import Job
from selftrans.ui.run_state import RunState

KEPT = 2  #: models in memory: a student and its teacher


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
