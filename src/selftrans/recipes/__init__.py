"""Recipes: functions that return a complete RunConfig. Each docstring gives the command, the cost and what to expect."""

from __future__ import annotations

from collections.abc import Callable

from selftrans.config import RunConfig, nearest
from selftrans.recipes.cifar10 import cifar10
from selftrans.recipes.digits import digits
from selftrans.recipes.imagefolder import imagefolder
from selftrans.recipes.imagenet import sit_imagenet, sit_imagenet_b2, sit_imagenet_l2, sit_imagenet_s2, sit_imagenet_xl2

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


def recipe(name: str) -> RunConfig:
    """The configuration of a recipe. ValueError suggests the nearest name."""
    if name not in RECIPES:
        raise ValueError(f"recipe '{name}' is unknown{nearest(name, RECIPES)}")
    return RECIPES[name]()
