"""The adapters of a run ⇒ a folder in peft's format, or one that diffusers loads onto its own transformers.

peft: `PeftModel.from_pretrained(base_model, folder)`. diffusers: `pipeline.load_lora_weights(folder)`, or
`transformer.load_lora_adapter(folder)`.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.adapted import START, frozen_weights
from selftrans.checkpoints.load import Weights, find_asked
from selftrans.config import RunConfig, from_object
from selftrans.interop.exporting import check_out, described_by, folder_to_fill, remove_earlier
from selftrans.messages import printable
from selftrans.models.lora import A, B, pairs, trained_in_full
from selftrans.models.spec import Named
from selftrans.suggest import nearest

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"  #: peft's names
PREFIX = "base_model.model."  #: of every tensor in peft's files
PIPELINE_WEIGHTS = "pytorch_lora_weights.safetensors"  #: diffusers' name
#: prefixes of names: of diffusers' module in a backbone, and of the transformer in a pipeline
INSIDE, TRANSFORMER = "net.", "transformer."
FORMATS = ("peft", "diffusers")


def export_adapters(
    run: str | Path, out: str | Path, *, weights: Weights = "ema", stage: str | None = None, layout: str = "peft"
) -> Path:
    """Write the adapters of a run, and what it trained in full, to the folder `out`; returns the weights file.

    The base model is RUN/init.safetensors, from which the run started. `layout` is one of `FORMATS`; diffusers' is for its own
    transformers, and cannot hold tensors that were trained in full. ValueError for a run without adapters, for adapters that
    the layout cannot hold, and when `out` holds anything but an earlier export of adapters.
    """
    if layout not in FORMATS:
        raise ValueError(f"adapters have no layout '{layout}'{nearest(layout, FORMATS)}")
    out, path = Path(out), find_asked(run, stage=stage, weights=weights)
    header = checkpoint.read_header(path)
    if stage not in (None, header["stage"]):
        raise ValueError(f"{path} holds weights of {printable(header['stage'])}, not of {stage}; leave out --stage")
    if frozen_weights(path, header) is None:
        raise ValueError(f"{path} holds a complete model, no adapters; leave out --adapters")
    check_out(out, {WEIGHTS, PIPELINE_WEIGHTS}, "an export of adapters")
    config, named = from_object(header["config"], lenient=True), load_file(path)
    if layout == "diffusers":
        name, settings, tensors = PIPELINE_WEIGHTS, None, for_diffusers(named, config.lora.factor)
    else:
        name, settings = WEIGHTS, _settings(config, named)
        tensors = {f"{PREFIX}{_published_name(key)}": tensor for key, tensor in named.items()}
    names = {WEIGHTS, PIPELINE_WEIGHTS, SETTINGS}
    with folder_to_fill(out, names) as folder, described_by(folder / SETTINGS, settings) if settings else nullcontext():
        checkpoint.write_tensors(folder / name, tensors, {"format": "pt"})
    remove_earlier(out, names - {name} - (set() if settings is None else {SETTINGS}))
    return out / name


def for_diffusers(named: Named, factor: float) -> Named:
    """Adapters under diffusers' names, with B multiplied by alpha / rank, since its loader assumes alpha = rank.

    ValueError for a model that is not one of diffusers, and for tensors that were trained in full.
    """
    if extra := sorted(trained_in_full(named)):
        raise ValueError(f"{extra[0]} was trained in full: diffusers' adapter files cannot hold it; export merged")
    if not all(name.startswith(INSIDE) for name in named):
        raise ValueError("this model is no transformer of diffusers; use --layout peft")
    return {
        f"{TRANSFORMER}{_published_name(name).removeprefix(INSIDE)}": tensor * factor if B in name else tensor
        for name, tensor in named.items()
    }


def _published_name(name: str) -> str:
    """peft's files leave out the name of the adapter."""
    for part in (A, B):
        name = name.replace(part, part.removesuffix(".default"))
    return name


def _settings(config: RunConfig, named: Named) -> dict[str, Any]:
    """What adapter_config.json holds."""
    from peft import LoraConfig

    layers = sorted(name.removesuffix(".weight") for name in pairs(named))
    bare = [name for name in trained_in_full(named) if "." not in name]
    if bare:
        raise ValueError(
            f"{bare[0]} was trained in full and belongs to no layer: peft's files cannot hold it; export merged"
        )
    modules = sorted({name.rpartition(".")[0] for name in trained_in_full(named)})
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
