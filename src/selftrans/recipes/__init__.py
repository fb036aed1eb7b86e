"""Recipes: functions that return a complete RunConfig. Each docstring gives the command, the cost and what to expect."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from selftrans.config import RunConfig
from selftrans.methods import stages
from selftrans.recipes.cifar10 import cifar10
from selftrans.recipes.digits import digits
from selftrans.recipes.imagefolder import imagefolder
from selftrans.recipes.imagenet import sit_imagenet, sit_imagenet_b2, sit_imagenet_l2, sit_imagenet_s2, sit_imagenet_xl2
from selftrans.suggest import nearest

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "digits": digits,
    "cifar10": cifar10,
    "imagefolder": imagefolder,
    "sit_imagenet": sit_imagenet,
    "sit_imagenet_s2": sit_imagenet_s2,
    "sit_imagenet_b2": sit_imagenet_b2,
    "sit_imagenet_l2": sit_imagenet_l2,
    "sit_imagenet_xl2": sit_imagenet_xl2,
}
SECTIONS = ("stage1", "stage2", "repa", "sra", "layersync", "dispersive")  #: settings of the methods


def recipe(name: str) -> RunConfig:
    """The configuration of a recipe. ValueError suggests the nearest name."""
    if name not in RECIPES:
        raise ValueError(f"recipe '{name}' is unknown{nearest(name, RECIPES)}")
    return RECIPES[name]()


def ignored(config: RunConfig) -> list[str]:
    """Sentences on what differs from the recipe and is never read: settings of methods and ranges that are not at work."""
    names = {stage.name for stage in stages(config)}
    taught = "stage2" in names and config.stage2.teacher is not None
    names -= {"stage1"} if taught else set()
    plain, found = recipe(config.recipe), []
    for section in SECTIONS:
        mine, theirs = dataclasses.asdict(getattr(config, section)), dataclasses.asdict(getattr(plain, section))
        changed = [key for key in mine if mine[key] != theirs[key] and (section, key) != ("stage2", "teacher")]
        if section not in names and changed and ":" not in config.method:
            why = (
                "--teacher takes its place"
                if taught and section == "stage1"
                else f"method {config.method} does not use it"
            )
            found.append(f"{', '.join(f'{section}.{key}' for key in changed)} is ignored: {why}")
        if section in names and mine.get("timestep_range", 0) is None and "range_mode" in changed:
            found.append(f"{section}.range_mode is ignored: without a timestep_range every sample counts")
    return found
