"""The adapters of a run ⇒ a folder in peft's format, which `peft.PeftModel.from_pretrained` loads onto the base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.adapted import START, frozen_weights
from selftrans.checkpoints.load import Weights, find
from selftrans.config import RunConfig, from_json
from selftrans.models.lora import A, B, pairs, whole
from selftrans.models.spec import Named
from selftrans.storage import FREE_SPACE, atomic_write, write_json

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"  #: peft's names
PREFIX = "base_model.model."  #: of every tensor in peft's files


def export_adapters(run: str | Path, out: str | Path, *, weights: Weights = "ema", stage: str | None = None) -> Path:
    """Write the adapters of a run, and what it trained in full, to the folder `out`; returns the weights file.

    The base model is what the run started from, RUN/init.safetensors. ValueError for a run without adapters, and when `out`
    holds anything but an earlier export of adapters.
    """
    out, path = Path(out), find(run, stage=stage, weights=weights)
    header = checkpoint.read_header(path)
    if frozen_weights(path, header) is None:
        raise ValueError(f"{path} holds a complete model, no adapters; leave out --adapters")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / WEIGHTS).is_file())):
        raise ValueError(f"{out} exists and is not an export of adapters; choose another --out")
    config, named = from_json(json.dumps(header["config"]), lenient=True), load_file(path)
    settings = _settings(config, named)
    tensors = {f"{PREFIX}{_published_name(name)}": tensor for name, tensor in named.items()}
    try:
        with atomic_write(out / WEIGHTS) as file:
            save_file(tensors, file.name, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{out / WEIGHTS} could not be written ({error}); {FREE_SPACE}") from error
    (out / WEIGHTS).chmod(out.stat().st_mode & 0o666)
    write_json(out / SETTINGS, settings)
    return out / WEIGHTS


def _published_name(name: str) -> str:
    """peft's files leave out the name of the adapter."""
    for part in (A, B):
        name = name.replace(part, part.removesuffix(".default"))
    return name


def _settings(config: RunConfig, named: Named) -> dict[str, Any]:
    """What adapter_config.json holds."""
    from peft import LoraConfig

    layers = sorted(name.removesuffix(".weight") for name in pairs(named))
    bare = [name for name in whole(named) if "." not in name]
    if bare:
        raise ValueError(
            f"{bare[0]} was trained in full, and belongs to no layer, for which peft has no place; export merged"
        )
    modules = sorted({name.rpartition(".")[0] for name in whole(named)})
    rank = config.lora.rank or 0
    described = LoraConfig(
        r=rank,
        lora_alpha=rank * config.lora.factor,  # type: ignore[arg-type]
        target_modules=layers,
        modules_to_save=modules or None,
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
        base_model_name_or_path=START,
    ).to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in described.items()}
