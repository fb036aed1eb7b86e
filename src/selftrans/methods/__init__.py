"""Training methods. `METHODS` is the whole registry: a name and the stages that it runs, in order."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from selftrans.flow import PATHS
from selftrans.methods.dispersive import DispersiveGuidance
from selftrans.methods.layersync import LayerSyncGuidance
from selftrans.methods.objective import Frozen, Guidance
from selftrans.methods.repa import RepaGuidance
from selftrans.methods.self_transcendence import SelfGuidance, StructureGuidance, default_teacher_block
from selftrans.methods.sra import SRAGuidance
from selftrans.types import Backbone

if TYPE_CHECKING:
    from selftrans.config import RunConfig


@dataclass(frozen=True)
class TeacherSpec:
    """What a stage wants of its teacher: its block (a function of the teacher's depth), and which weights."""

    block: Callable[[int], int]
    weights: Literal["raw", "ema"]


@dataclass(frozen=True)
class EncoderSpec:
    """What a stage wants of an external encoder: its name (hub id or folder), or None for features stored with the data."""

    name: str | None


@dataclass(frozen=True)
class Stage:
    """One training run inside a method: a new student, some steps, some guidance."""

    name: str  #: folder in the run directory, and what the screen calls it
    steps: int
    guide: Callable[[Backbone, Any], Sequence[Guidance]]  #: is handed the student, and the teacher or encoder below
    teacher: TeacherSpec | None = None
    encoder: EncoderSpec | None = None
    stream: int = 0  #: stages with another stream start from other weights and draw other noise under the same seed


def _vanilla(config: RunConfig) -> list[Stage]:
    return [Stage("vanilla", config.train.steps, lambda student, teacher: [])]


def _stage1(config: RunConfig, steps: int) -> Stage:
    # stream 1: a teacher that shared the student's initial weights would be easier to match than an honest one
    return Stage("stage1", steps, lambda student, teacher: [StructureGuidance(student, config.stage1)], stream=1)


def _structure(config: RunConfig) -> list[Stage]:
    return [_stage1(config, config.train.steps)]


def _self_transcendence(config: RunConfig) -> list[Stage]:
    def guide(student: Backbone, teacher: Frozen | None) -> Sequence[Guidance]:
        assert teacher is not None
        return [SelfGuidance(student, teacher, config.stage2)]

    steps = config.train.steps // 2 if config.stage1.steps is None else config.stage1.steps
    block = config.stage2.teacher_block
    spec = TeacherSpec(default_teacher_block if block is None else lambda depth: block, config.stage2.teacher_weights)
    return [_stage1(config, max(1, steps)), Stage("stage2", config.train.steps, guide, spec)]


def _repa(config: RunConfig) -> list[Stage]:
    def guide(student: Backbone, encoder: Any) -> Sequence[Guidance]:
        return [RepaGuidance(student, encoder, config.repa)]

    return [Stage("repa", config.train.steps, guide, encoder=EncoderSpec(config.repa.encoder))]


def _guided(name: str, guidance: Callable[[Backbone, RunConfig], Guidance]) -> Callable[[RunConfig], list[Stage]]:
    """A method of one stage with one guidance, which needs no teacher of its own."""

    def plan(config: RunConfig) -> list[Stage]:
        return [Stage(name, config.train.steps, lambda student, teacher: [guidance(student, config)])]

    return plan


#: name -> the stages of a run with this configuration
METHODS: dict[str, Callable[[RunConfig], list[Stage]]] = {
    "vanilla": _vanilla,
    "structure": _structure,  # stage 1 alone, to train.steps
    "self_transcendence": _self_transcendence,
    # the neighbours
    "repa": _repa,
    "sra": _guided("sra", lambda student, config: SRAGuidance(student, config.sra, PATHS[config.train.path])),
    "layersync": _guided("layersync", lambda student, config: LayerSyncGuidance(student, config.layersync)),
    "dispersive": _guided("dispersive", lambda student, config: DispersiveGuidance(student, config.dispersive)),
}


def stages(config: RunConfig) -> list[Stage]:
    """Stages of `config.method`: a name in METHODS, or a stranger's `module:function` with the same signature."""
    if ":" in config.method:
        module, _, function = config.method.partition(":")
        try:
            method = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"method '{config.method}' cannot be imported ({error}); give module:function") from error
        return list(method(config))
    if config.method not in METHODS:
        raise ValueError(f"method '{config.method}' is unknown; choose one of {', '.join(METHODS)}, or module:function")
    return METHODS[config.method](config)
