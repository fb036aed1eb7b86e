"""What a training method is: a record of its settings and of its stages, in order.

Nothing outside this package names a method, one of its sections or one of its stages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from torch import Tensor

from selftrans.methods.guidance import Guidance
from selftrans.sections import RESERVED_KEYS, RUN_SECTIONS, Section
from selftrans.types import Backbone, Conditions

if TYPE_CHECKING:
    from selftrans.config import RunConfig

S = TypeVar("S", bound=Section)

RESERVED_FOLDERS = ("data", "tensorboard", "wandb")  #: in a run directory
#: settings of which a stage may have its own values, besides those of the model
STAGE_SETTINGS = ("train.lr", "train.recompute")


@dataclass(frozen=True)
class TeacherSpec:
    """The frozen model that teaches a stage: an earlier stage of the run, or a run or file given in its place."""

    stage: str  #: name of the stage that trains it, in this run or in the one given
    block: Callable[[int], int]  #: depth of the teacher -> its last block that is used (1-based)
    weights: Literal["raw", "ema"]
    given: str | None = None  #: a run, checkpoint or weights file; the stages before this one are then not run
    option: str = ""  #: dotted setting that holds `given`; `--teacher` sets it


@dataclass(frozen=True)
class EncoderSpec:
    """The external encoder of a stage: a vision model (hub id or folder), or None for features stored with the data."""

    name: str | None


@dataclass(frozen=True)
class Stage:
    """One training run inside a method: a new student, some steps, some guidance."""

    name: str  #: of its folder in the run directory, and of the stage in messages
    steps: int
    guide: Callable[[Backbone, Any], Sequence[Guidance]]  #: from the student, and the teacher or encoder below
    sections: tuple[type[Section], ...] = ()  #: settings that its steps depend on
    teacher: TeacherSpec | None = None
    encoder: EncoderSpec | None = None
    stream: int = 0  #: stages with another stream start from other weights and draw other noise under the same seed
    #: its own values of settings of the run, such as {"model.depth": 4}: of the model, and those of `STAGE_SETTINGS`
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]{0,99}", self.name) or self.name in RESERVED_FOLDERS:
            raise ValueError(f"stage '{self.name}' cannot be a folder of a run; use letters, digits, '_' and '-'")
        shared = [name for name in self.settings if not name.startswith("model.") and name not in STAGE_SETTINGS]
        if shared:
            raise ValueError(f"stage '{self.name}' cannot have its own {shared[0]}: all stages of a run share it")


def single_stage(
    section: type[Section], guidance: Callable[[Backbone, RunConfig], Guidance]
) -> Callable[[RunConfig], list[Stage]]:
    """`MethodSpec.stages` of a method with one stage, named as its section, and one guidance without teacher or encoder."""

    def stages(config: RunConfig) -> list[Stage]:
        guide = lambda student, _: [guidance(student, config)]  # noqa: E731
        return [Stage(section.key, config.train.steps, guide, (section,))]

    return stages


def section_stage(section: type[S], guidance: Callable[[Backbone, S], Guidance]) -> Callable[[RunConfig], list[Stage]]:
    """`single_stage` of a guidance that is made from the student and its section alone."""
    return single_stage(section, lambda student, config: guidance(student, config.section(section)))


class PublishedHeads(NamedTuple):
    """Heads found in a published checkpoint that belong to a method's stage."""

    sections: tuple[Section, ...]  #: the settings that they were trained with
    names: Mapping[str, str]  #: names in the file -> names in `Objective.state_dict`
    #: prefix of the layer that predicts a token's cells, which the published code may order differently
    predicts_cells: str


@dataclass(frozen=True)
class MethodSpec:
    """A training method. Built-in ones are listed in `registry.METHODS`; other packages add theirs by an entry point."""

    name: str
    title: str  #: what tables and pages call it
    stages: Callable[[RunConfig], list[Stage]]
    sections: tuple[type[Section], ...] = ()  #: its own settings; each becomes `--<key>.*`
    #: adapts the settings to what the data are conditioned on, before a run begins or continues
    settle: Callable[[RunConfig, Conditions], RunConfig] = lambda config, conditions: config
    #: recognises heads of this method's first stage in a published file: (tensors, options of its command, config)
    published_heads: Callable[[Mapping[str, Tensor], Mapping[str, Any], RunConfig], PublishedHeads | None] = (
        lambda named, arguments, config: None
    )

    def __post_init__(self) -> None:
        for key in (section.key for section in self.sections):
            if not re.fullmatch(r"[a-z][a-z0-9_]*", key) or key in (*RUN_SECTIONS, *RESERVED_KEYS):
                raise ValueError(f"method {self.name}: '{key}' cannot be the key of a section; choose another name")
