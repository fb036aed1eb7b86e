"""The training methods by name: those listed here, entry points of installed packages, and `module:function` with --trust."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from selftrans.flow import PATHS
from selftrans.methods.dispersive import DISPERSIVE
from selftrans.methods.guidance import Frozen, Guidance
from selftrans.methods.internal_guidance import INTERNAL_GUIDANCE
from selftrans.methods.layersync import LAYERSYNC
from selftrans.methods.objective import Objective
from selftrans.methods.repa import REPA
from selftrans.methods.self_transcendence import SELF_TRANSCENDENCE, STRUCTURE
from selftrans.methods.spec import MethodSpec, Stage
from selftrans.methods.sra import SRA_METHOD
from selftrans.methods.vanilla import VANILLA
from selftrans.plugins import Registry
from selftrans.sections import Section
from selftrans.types import Backbone, Conditions

if TYPE_CHECKING:
    from selftrans.config import RunConfig

#: the built-in methods, in the order in which tables show them
METHODS: dict[str, MethodSpec] = {
    spec.name: spec
    for spec in (VANILLA, STRUCTURE, SELF_TRANSCENDENCE, REPA, SRA_METHOD, LAYERSYNC, DISPERSIVE, INTERNAL_GUIDANCE)
}
DEFAULT, BASELINE = SELF_TRANSCENDENCE.name, VANILLA.name
#: the methods of this process; `selftrans.methods` is the group of entry points that other packages join by
REGISTRY: Registry[MethodSpec] = Registry("method", METHODS, MethodSpec, "selftrans.methods")


def find(name: str) -> MethodSpec:
    """The method of this name. ValueError suggests the nearest, or says how code outside the package is allowed."""
    return REGISTRY.find(name)


def titles(names: Iterable[str]) -> dict[str, str]:
    """Name -> what tables and pages show for it: the title of a method that is loaded, else the name itself.

    The names may come from files: nothing is imported for them. Where several have one title, they keep their names.
    """
    specs = {name: REGISTRY.loaded(name) for name in names}
    shown = {name: spec.title if spec else name for name, spec in specs.items()}
    return {name: title if list(shown.values()).count(title) == 1 else name for name, title in shown.items()}


def stages(config: RunConfig) -> list[Stage]:
    """The stages of a run with this configuration, in order. ValueError where the method's list is inconsistent."""
    plan = list(find(config.method).stages(config))
    names = [stage.name for stage in plan]
    if not plan or len(set(names)) < len(names):
        raise ValueError(f"method {config.method} has the stages {names}; it needs one at least, each of another name")
    for number, stage in enumerate(plan):
        if stage.teacher and stage.teacher.stage not in names[:number]:
            raise ValueError(
                f"method {config.method}: stage {stage.name} is taught by '{stage.teacher.stage}', which is no stage before it"
            )
    return plan


def config_of_teacher(config: RunConfig, stage: Stage) -> RunConfig:
    """The settings of the earlier stage that trains the teacher of `stage`; its model may have another size."""
    assert stage.teacher is not None
    return next(config.override(each.settings) for each in stages(config) if each.name == stage.teacher.stage)


def meta_objective(
    config: RunConfig,
    stage: Stage,
    shape: tuple[int, ...],
    conditions: Conditions,
    given: Any = None,
    *,
    dtype: torch.dtype | None = None,
) -> Objective:
    """The objective of a stage on latents (C, *S), on the meta device, without memory for weights. ValueError where its parts
    do not fit each other.

    `given`: the encoder or teacher of the stage; None: a teacher of the size that the settings give it, not trained yet, with
    parameters of `dtype`.
    """
    with torch.device("meta"):
        student = config.override(stage.settings).build_model(shape, conditions)
        if stage.teacher and given is None:
            model = config_of_teacher(config, stage).build_model(shape, conditions)
            given = Frozen(model, stage.teacher.block(model.depth), dtype=dtype, in_place=True)
        return objective_of(config, student, stage.guide(student, given))


def objective_of(config: RunConfig, student: Backbone, guidances: Iterable[Guidance]) -> Objective:
    """An objective with the options of a run's training settings."""
    train = config.train
    return Objective(
        student,
        guidances,
        path=PATHS[train.path],
        times=train.times,
        time_shift=train.time_shift,
        drop=train.drop,
        cosine=train.cosine,
        contrastive=train.contrastive,
        loss=train.loss,
    )


def sections_of(methods: Iterable[MethodSpec]) -> dict[str, type[Section]]:
    """key -> section of all these methods. ValueError where two different sections have one key."""
    found: dict[str, type[Section]] = {}
    owner: dict[str, str] = {}
    for spec in methods:
        for section in spec.sections:
            if found.setdefault(section.key, section) is not section:
                both = f"methods {owner[section.key]} and {spec.name}"
                raise ValueError(
                    f"{both} have different sections '{section.key}'; rename one, or uninstall its package"
                )
            owner.setdefault(section.key, spec.name)
    return found
