"""The sampling settings of a trained model: those of its run, and what is given in their place."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from selftrans.checkpoints.load import LoadedModel
from selftrans.config import SampleConfig
from selftrans.messages import plural
from selftrans.sampling.chosen_labels import chosen_labels
from selftrans.types import Backbone


def overridden(loaded: LoadedModel, overrides: dict[str, Any]) -> SampleConfig:
    """The settings of a run with the fields `overrides` in place of its own; its prompts are those recorded with the weights.

    `labels` may name classes, see `chosen_labels`; with counts, they set the number of images unless that is given.
    ValueError for invalid settings.
    """
    words, conditions = overrides.get("labels"), loaded.model.conditions
    numbers = isinstance(words, tuple) and len(words) > 0 and all(isinstance(word, int) for word in words)
    if isinstance(words, tuple) and not numbers:
        labels, counts = chosen_labels(words, loaded.classes, conditions)
        overrides = ({"num": len(labels)} if counts else {}) | overrides | {"labels": labels}
        if counts and overrides["num"] < len(labels):
            warnings.warn(
                f"{plural(overrides['num'], 'image')} of the {len(labels):,} that the labels ask for", stacklevel=4
            )
    settings = dataclasses.replace(loaded.config.sample, **{"prompts": None} | overrides)
    settings.check()
    for name in ("guidance_interval", "guidance_channels", "autoguidance") if settings.guidance_scale == 1 else ():
        if name in overrides:
            warnings.warn(f"the {name.replace('_', ' ')} is ignored: the guidance scale is 1", stacklevel=4)
    if settings.early_guidance == 1 and "early_interval" in overrides:
        warnings.warn("the early interval is ignored: the early guidance is 1", stacklevel=4)
    return settings if settings.guidance_scale != 1 else dataclasses.replace(settings, autoguidance=None)


def applicable_settings(settings: SampleConfig, model: Backbone) -> SampleConfig:
    """The settings without guidance by a second output where the model has none, for sampling several models alike."""
    return settings if model.early is not None else dataclasses.replace(settings, early_guidance=1.0)
