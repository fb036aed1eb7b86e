"""The backbones by name: those listed here, entry points of installed packages, and `module:function` with --trust."""

from __future__ import annotations

from typing import get_args

from selftrans.models import (
    diffusers_published,
    dit,
    dit_published,
    lightning,
    lightning_published,
    mmdit,
    mmdit_published,
    sit,
    sit_published,
)
from selftrans.models.spec import ModelSpec
from selftrans.plugins import Registry

SIT = ModelSpec(
    "sit",
    sit.SiTConfig,
    sit.build,
    tuple(sit.SIT_SIZES),
    sit_published.LAYOUTS,
    sit_published.read,
    conventions=get_args(sit_published.Convention),
)
DIT = ModelSpec(
    "dit",
    dit.DiTConfig,
    dit.build,
    tuple(dit.DIT_SIZES),
    dit_published.LAYOUTS,
    dit_published.read,
    conventions=("dit",),
)
LIGHTNING = ModelSpec(
    "lightningdit",
    lightning.LightningConfig,
    lightning.build,
    tuple(lightning.LIGHTNING_SIZES),
    lightning_published.LAYOUTS,
    lightning_published.read,
)
MMDIT = ModelSpec(
    "mmdit",
    mmdit.MMDiTConfig,
    mmdit.build,
    tuple(mmdit.MMDIT_SIZES),
    mmdit_published.LAYOUTS,
    mmdit_published.read,
    conventions=(mmdit_published.CONVENTION,),
)
DIFFUSERS = tuple(
    ModelSpec(
        name,
        family.Config,
        family.module.build,
        layouts=diffusers_published.LAYOUTS,
        reader=diffusers_published.reader(name),
        conventions=("diffusers",),
    )
    for name, family in diffusers_published.FAMILIES.items()
)

#: the built-in families of models, in the order in which their readers try a published file: those of diffusers take files
#: with diffusers' config.json next to them; LightningDiT's reader returns None for files with SiT's names, and DiT's for files
#: without evidence of DiT; SiT's reader comes last and refuses what it does not know
MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in (MMDIT, *DIFFUSERS, LIGHTNING, DIT, SIT)}
#: the models of this process; `selftrans.models` is the group of entry points that other packages join by
REGISTRY: Registry[ModelSpec] = Registry("model.name", MODELS, ModelSpec, "selftrans.models", lambda spec: spec.names)


def find(name: str) -> ModelSpec:
    """The family that `model.name` belongs to. ValueError suggests the nearest name."""
    return REGISTRY.find(name)
