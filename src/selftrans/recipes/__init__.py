"""Recipes: functions that return a complete RunConfig. Each docstring gives the command, the cost and what to expect."""

from __future__ import annotations

from collections.abc import Callable

from selftrans.config import RunConfig
from selftrans.methods.registry import find, stages
from selftrans.recipes.cifar10 import cifar10
from selftrans.recipes.digits import digits
from selftrans.recipes.digits_t2i import digits_t2i
from selftrans.recipes.imagefolder import imagefolder, imagefolder_t2i
from selftrans.recipes.imagenet import sit_imagenet, sit_imagenet_b2, sit_imagenet_l2, sit_imagenet_s2, sit_imagenet_xl2
from selftrans.recipes.imagenet_lightning import lightningdit_imagenet_b1, lightningdit_imagenet_xl1
from selftrans.recipes.mmdit_coco import mmdit_coco
from selftrans.recipes.moving_digits import moving_digits
from selftrans.recipes.speech_words import speech_words
from selftrans.sections import fields_of
from selftrans.suggest import nearest

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "digits": digits,
    "digits_t2i": digits_t2i,
    "cifar10": cifar10,
    "imagefolder": imagefolder,
    "imagefolder_t2i": imagefolder_t2i,
    "moving_digits": moving_digits,
    "speech_words": speech_words,
    "sit_imagenet": sit_imagenet,
    "sit_imagenet_s2": sit_imagenet_s2,
    "sit_imagenet_b2": sit_imagenet_b2,
    "sit_imagenet_l2": sit_imagenet_l2,
    "sit_imagenet_xl2": sit_imagenet_xl2,
    "lightningdit_imagenet_b1": lightningdit_imagenet_b1,
    "lightningdit_imagenet_xl1": lightningdit_imagenet_xl1,
    "mmdit_coco": mmdit_coco,
}


def recipe(name: str) -> RunConfig:
    """The configuration of a recipe. ValueError suggests the nearest name."""
    if name not in RECIPES:
        raise ValueError(f"recipe '{name}' is unknown{nearest(name, RECIPES)}")
    return RECIPES[name]()


def ignored(config: RunConfig) -> list[str]:
    """Sentences on what differs from the recipe and is never read: settings of other methods, of stages that are not run,
    and ranges that do not act. `config` may hold sections of several methods."""
    plan = stages(config)
    first = next((i for i, stage in enumerate(plan) if stage.teacher and stage.teacher.given), 0)
    used = {section.key for stage in plan[first:] for section in stage.sections}
    own = {section.key for section in find(config.method).sections}
    options = {stage.teacher.option for stage in plan if stage.teacher}
    plain, found = recipe(config.recipe), []
    for key, section in config.sections.items():
        before = plain.section(type(section))
        changed = [name for name, value, _, _ in fields_of(section) if value != getattr(before, name)]
        changed = [name for name in changed if f"{key}.{name}" not in options or key not in own]
        if key not in used and changed:
            why = "--teacher takes its place" if key in own else f"method {config.method} does not use it"
            found.append(f"{', '.join(f'{key}.{name}' for name in changed)} is ignored: {why}")
        if key in used:
            reasons = section.ineffective()
            found += [f"{key}.{name} is ignored: {reasons[name]}" for name in changed if name in reasons]
    usual_model = type(config.model)(name=config.model.name)
    for part, usual in ((config.init, plain.init), (config.lora, plain.lora), (config.model, usual_model)):
        changed = [name for name, value, _, _ in fields_of(part) if value != getattr(usual, name)]
        reasons = part.ineffective()
        found += [f"{part.key}.{name} is ignored: {reasons[name]}" for name in changed if name in reasons]
    if config.log.held_out_every != plain.log.held_out_every and not config.data.held_out:
        found.append("log.held_out_every is ignored: data.held_out is 0")
    return found
