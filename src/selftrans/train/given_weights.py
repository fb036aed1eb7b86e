"""The weights that a run is given to start from (`--init`): of a run of ours, or of a published file."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints import hub
from selftrans.checkpoints.load import IMPORTED, load_model
from selftrans.config import RunConfig
from selftrans.data.manifest import Manifest
from selftrans.encoders.identity import same_latents
from selftrans.fine_tuning import Init
from selftrans.interop import published_file
from selftrans.interop.importing import recognised
from selftrans.messages import printable
from selftrans.models.spec import ModelConfig, Named
from selftrans.recipes import RECIPES
from selftrans.sections import fields_of
from selftrans.storage import sha256_file
from selftrans.types import Conditions


class Given(NamedTuple):
    """Weights, and the model that they are weights of."""

    tensors: Named  #: by the names of our backbone
    model: ModelConfig
    shape: tuple[int, ...]  #: (C, *S) of a latent
    conditions: Conditions
    classes: tuple[str, ...] | None  #: names of the classes; None: unknown, as in published files
    path: str | None  #: probability path, where it is known
    autoencoder: str | None
    about: dict[str, Any]  #: path, sha256, and what else a run records of them


def read_given(init: Init) -> Given:
    """The weights that `init` names. ValueError where there are none, or they are not finite."""
    assert init.path is not None
    path = hub.local(init.path)
    given = _published(path, init) if path.is_file() and not _ours(path) else _own(path, init)
    for name, tensor in given.tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: {name} holds values that are not finite: its training diverged")
    return given


def _ours(path: Path) -> bool:
    try:
        return bool(checkpoint.read_header(path))
    except ValueError:
        return False


def _own(path: Path, init: Init) -> Given:
    found = load_model(path, stage=init.stage, weights=init.weights)
    if found.weights != init.weights:
        warnings.warn(f"{path} holds {found.weights} weights, which are used", stacklevel=4)
    counted = found.classes == tuple(map(str, range(len(found.classes))))
    about = {"path": found.source["path"], "sha256": found.source["sha256"], "weights": found.weights}
    return Given(
        dict(found.model.state_dict()),
        found.config.model,
        tuple(found.model.shape),
        found.model.conditions,
        None if IMPORTED in found.source and counted else found.classes,
        found.config.train.path,
        found.autoencoder,
        about | {"stage": found.stage, "step": found.step},
    )


def _published(path: Path, init: Init) -> Given:
    file = published_file.read(path)
    if init.stage is not None:
        raise ValueError(f"{path} is a published file, which has no stages; leave out init.stage")
    try:
        model = recognised(file, init.heads, init.convention)
    except ValueError as error:  # its remedies are options of `selftrans import`
        raise ValueError(re.sub("--(?=heads|convention)", "--init.", str(error))) from error
    kind = init.weights if init.weights in file.weights else next(iter(file.weights))
    if kind != init.weights:
        warnings.warn(f"{path} holds {kind} weights only, which are used", stacklevel=4)
    about = {"path": str(path.resolve()), "sha256": sha256_file(path), "weights": kind}
    return Given(
        {name: tensor.float() for name, tensor in model.translate(file.weights[kind], False).items()},
        model.config,
        tuple(model.shape),
        model.conditions,
        None,
        model.path,
        None,
        about | {"published": model.name, "convention": f"{model.convention}, {model.reason}", "step": file.steps},
    )


def with_model_of(config: RunConfig, model: ModelConfig, typed: Collection[str] = ()) -> RunConfig:
    """The settings with the model of the given weights in place of the recipe's default.

    `typed`: names of settings that were given, such as model.depth, also those equal to the recipe's defaults. early_block
    stays: the method decides whether the model has a second output. ValueError names a given model setting that differs.
    """
    model = dataclasses.replace(model, early_block=config.model.early_block)
    named = {name.removeprefix("model.") for name in typed if name.startswith("model.")}
    usual = RECIPES[config.recipe]().model if config.recipe in RECIPES else type(config.model)()
    if type(config.model) is not type(model):
        asked = {} if config.model == usual and not named else {"name": config.model.name}
    else:
        known = _settings(usual if type(usual) is type(model) else type(model)())
        asked = {name: v for name, v in _settings(config.model).items() if v != known[name] or name in named}
    for name, value in asked.items():
        theirs = _settings(model)[name]
        if value != theirs:
            has = f"name {model.name}" if theirs is None else f"{name} {theirs}"
            raise ValueError(
                f"model.{name} is {value}, but the weights {config.init.path} are those of a model of {has}; leave it out, or "
                "start without --init"
            )
    return dataclasses.replace(config, model=model)


def with_given_model(config: RunConfig, typed: Collection[str] = ()) -> RunConfig:
    """The settings with the model of the weights in init.path, if it is set. ValueError as `with_model_of`."""
    return config if config.init.path is None else with_model_of(config, read_given(config.init).model, typed)


def _settings(model: ModelConfig) -> dict[str, Any]:
    return {name: value for name, value, _, _ in fields_of(model)}


def check_path(what: str, path: str | None, config: RunConfig) -> None:
    """ValueError where `path`, on which a model was trained, is another than the run's; None: it is not known.

    `what` begins the message, such as "the teacher RUN was".
    """
    if path not in (None, config.train.path):
        raise ValueError(
            f"{what} trained on the {path} path, and train.path is {config.train.path}: the same t is another noise level; "
            f"give weights of that path, or --train.path {path}"
        )


def check_weights_fit(given: Given, config: RunConfig, manifest: Manifest) -> None:
    """ValueError where the weights were trained on another probability path, or with text where the data have none, or the
    other way round. A warning where they may have been trained on other latents or text tokens than those of the data."""
    theirs, own = given.conditions, manifest.conditions
    check_path(f"the weights {config.init.path} were", given.path, config)
    if (theirs.kind == "text") != (own.kind == "text"):
        raise ValueError(
            f"the weights {config.init.path} are those of a model of {theirs}, the data have {own}; give weights of a model "
            f"{'of text' if own.kind == 'text' else 'without text'}, or start without --init"
        )
    if theirs.sha256 and own.sha256 and theirs.sha256 != own.sha256:
        warnings.warn(
            f"the weights {config.init.path} were trained on text of the encoder {printable(theirs.encoder)} (sha256 "
            f"{printable(theirs.sha256[:12])}), the data have text of {printable(own.encoder)} ({own.sha256[:12]}): the "
            "model has to learn the new tokens",
            stacklevel=4,
        )
    ours = config.data.autoencoder or manifest.autoencoder
    if given.autoencoder and ours and not same_latents(given.autoencoder, ours):
        warnings.warn(
            f"the weights {config.init.path} name the autoencoder {printable(given.autoencoder)}, the data {printable(ours)}; "
            "unless both are the same, the first and last layers start from weights for other latents",
            stacklevel=4,
        )
