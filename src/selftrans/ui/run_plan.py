"""The plan of a run, from its config.json: its stages with their lengths, its teacher, the blocks that are guided."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, NamedTuple

from selftrans.config import RunConfig, from_json
from selftrans.messages import first_line
from selftrans.methods.registry import find, meta_objective, stages
from selftrans.methods.spec import Stage
from selftrans.plain_json import UNREADABLE
from selftrans.types import Backbone


class Plan(NamedTuple):
    """The settings of a run and its stages; or, in `problem`, why they cannot be used."""

    config: RunConfig | None = None
    stages: tuple[Stage, ...] = ()
    title: str = ""  #: of the method, as tables have it
    problem: str | None = None  #: one line

    def steps(self, stage: str) -> int | None:
        """The length of a stage; None if it is not known."""
        return next((each.steps for each in self.stages if each.name == stage), None)


def plan_of(config: dict[str, Any]) -> Plan:
    """The plan of the settings in a config.json. Nothing that they name is imported, and nothing is raised."""
    return _plan(json.dumps(config))


@lru_cache(maxsize=512)
def _plan(text: str) -> Plan:
    try:
        config = from_json(text, lenient=True)
        return Plan(config, tuple(stages(config)), find(config.method).title)
    except UNREADABLE as error:
        return Plan(problem=f"its settings are not understood ({first_line(error)})")


class Guided(NamedTuple):
    """The blocks that a stage connects (1-based)."""

    student: tuple[int, ...]
    teacher: int | None  #: the last one of the teacher that is used
    scale: float | None  #: w of the guided features, if the method has one


def guided_blocks(config: RunConfig, stage: Stage, model: Backbone) -> Guided:
    """The guided blocks of a stage; found on a model without memory for weights."""
    guidances = [] if stage.encoder else meta_objective(config, stage, model.shape, model.conditions).guidances
    taps = tuple(k for guidance in guidances for k in guidance.taps)
    block = next((guidance.teacher.block for guidance in guidances if guidance.teacher), None)
    return Guided(taps, block, scale_of(config, stage))


def scale_of(config: RunConfig, stage: Stage) -> float | None:
    """w of the guided features of a stage; None if its method has no such setting."""
    settings = (config.section(kind) for kind in stage.sections)
    return next((float(each.scale) for each in settings if hasattr(each, "scale")), None)
