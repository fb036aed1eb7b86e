"""Weights files that hold adapters alone (LoRA): the frozen weights that they refer to, and the merged weights of both."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from selftrans.checkpoints import format as checkpoint
from selftrans.config import RunConfig
from selftrans.messages import first_line
from selftrans.models.lora import merged
from selftrans.models.spec import Named
from selftrans.storage import sha256_file

INIT = "init"  #: header entry, and entry of run.json: the weights that a run started from
START = "init.safetensors"  #: in a run: the weights that every stage starts from, if they were given
ADAPTERS = "adapters"  #: header entry of a file that holds adapters alone: {"base": sha256 of START}


def frozen_weights(path: Path, metadata: dict[str, Any]) -> Path | None:
    """The file with the frozen weights that the adapters in `path` belong to; None where `path` holds a complete model.

    It must be in the run of the checkpoint. ValueError where it is missing or has another sha256.
    """
    if ADAPTERS not in metadata:
        return None
    try:
        expected = str(metadata[ADAPTERS]["base"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not say which weights its adapters belong to") from error
    absolute = path.resolve()
    base = absolute.parents[min(3, len(absolute.parents) - 1)] / START
    if not base.is_file() or sha256_file(base) != expected:
        raise ValueError(
            f"{path} holds adapters alone, for the weights with sha256 {expected[:12]}, and {base} is not that file; give the "
            "run, or what `selftrans export` makes of it"
        )
    return base


def full_weights(path: Path, base: Path | None, config: RunConfig) -> Named:
    """The tensors of a complete model: those of `path`, or its adapters merged into `base`. ValueError if they do not fit."""
    if base is None:
        return load_file(path)
    if not config.lora.rank:
        raise ValueError(
            f"{path} holds adapters, and its settings have no lora.rank; was it written by another version?"
        )
    try:
        return merged(load_file(base), load_file(path), config.lora.factor)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be used: {first_line(error)}") from error


def weights_hash(path: Path, base: Path | None) -> str:
    """sha256 of the weights without headers; of adapters, together with the weights that they belong to."""
    own = checkpoint.weights_sha256(path)
    if base is None:
        return own
    return hashlib.sha256(f"{checkpoint.weights_sha256(base)} {own}".encode()).hexdigest()
