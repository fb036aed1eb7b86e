"""The parts of a pipeline: made from a run, and written to a folder without paths of this machine."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.adapted import ADAPTERS
from selftrans.checkpoints.load import IMPORTED, TEXT_ENCODER, LoadedModel, Weights, find, load_model
from selftrans.encoders.autoencoder import DiffusersAutoencoder, load_autoencoder
from selftrans.encoders.text import TOKENIZER_FILES, encoder_of, tokenizer_folder
from selftrans.interop.interpolant_scheduler import InterpolantScheduler
from selftrans.interop.interpolant_transformer import InterpolantTransformer
from selftrans.messages import first_line, printable
from selftrans.types import Conditions

TOKENIZER = "tokenizer"
#: files of a text encoder that are copied
COPIED = re.compile(r"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


def parts_of(source: str | Path, *, weights: Weights = "ema", stage: str | None = None) -> dict[str, Any]:
    """The arguments of `SiTPipeline` for a run, checkpoint, weights file, pipeline's folder, or model on the hub.

    ValueError as `load_model`, and where the autoencoder or a local text encoder is not there.
    """
    file = find(source, stage=stage, weights=weights)
    loaded = load_model(file, stage=stage)
    header = without_folders(checkpoint.read_header(file), loaded)
    decoder = load_autoencoder(loaded.autoencoder)
    parts: dict[str, Any] = {
        "transformer": InterpolantTransformer.of(loaded, header),
        "scheduler": _scheduler(file, loaded),
        "vae": decoder.model if isinstance(decoder, DiffusersAutoencoder) else None,
    }
    conditions = loaded.model.conditions
    if conditions.kind == "text" and Path(conditions.encoder).is_dir():
        encoder = encoder_of(conditions)
        parts |= {"text_encoder": encoder.model, "tokenizer": encoder.tokenizer}
    return parts


def _scheduler(file: Path, loaded: LoadedModel) -> InterpolantScheduler:
    """The scheduler in the folder of the weights' pipeline, else one with the run's settings."""
    folder = file.parent.parent / "scheduler"
    if (folder / "scheduler_config.json").is_file():
        try:
            return InterpolantScheduler.from_pretrained(folder)
        except Exception as error:  # diffusers raises many types for what is in the file
            raise ValueError(f"{printable(folder)} holds no scheduler of selftrans ({first_line(error)})") from error
    sample = loaded.config.sample
    return InterpolantScheduler(sample.sampler, loaded.config.train.path, sample.time_shift)


def without_folders(header: dict[str, Any], loaded: LoadedModel) -> dict[str, Any]:
    """A header of complete weights with the last part of each path of this machine in place of the path.

    Settings of sampling that a pipeline does not have are reset, with a warning.
    """
    kept = {key: value for key, value in header.items() if key != ADAPTERS}  # they are merged
    sample = loaded.config.sample
    reset: dict[str, Any] = {}
    if sample.autoguidance is not None:
        reset |= {"autoguidance": None, "guidance_scale": 1.0}
    if sample.decode_with is not None:
        reset |= {"decode_with": None}
    for name in sorted({*reset} - {"guidance_scale"}):
        warnings.warn(f"sample.{name} is left out: a pipeline has one model and one VAE", stacklevel=4)
    prompts = kept["config"]["sample"].get("prompts")
    for name in ("config", "autoencoder", "conditions", IMPORTED, "init"):
        if name in kept:
            kept[name] = last_parts(kept[name])
    kept["config"]["sample"] |= reset | {"prompts": prompts}
    return kept


def last_parts(value: Any) -> Any:
    """A json value in which every absolute path is replaced by its last part."""
    if isinstance(value, dict):
        return {key: last_parts(each) for key, each in value.items()}
    if isinstance(value, list):
        return [last_parts(each) for each in value]
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith("~")):
        folder, comma, more = value.partition(", ")  # a report says "FOLDER, decoded by NAME"
        return Path(folder).name + comma + more
    return value


def save_vae(vae: Any, folder: Path) -> None:
    """Write a VAE as safetensors; nothing for None."""
    if vae is not None:
        vae.register_to_config(_name_or_path=Path(vae.config.get("_name_or_path", "")).name)
        vae.save_pretrained(folder, safe_serialization=True)


def copy_text_encoder(conditions: Conditions, folder: Path) -> bool:
    """Copy the text encoder and its tokeniser into a pipeline's folder, if it is a folder of this machine; returns whether.

    Files are copied byte by byte, so that the sha256 stays that of the data. Encoders of the hub and of packages stay names.
    """
    source = Path(conditions.encoder)
    if conditions.kind != "text" or not conditions.encoder or not source.is_dir():
        return False
    tokens = tokenizer_folder(source)
    chosen = [(path, TEXT_ENCODER) for path in source.iterdir() if COPIED.fullmatch(path.name)]
    chosen += [(path, TOKENIZER) for path in tokens.iterdir() if path.name in TOKENIZER_FILES]
    for path, part in sorted(chosen):
        (folder / part).mkdir(parents=True, exist_ok=True)
        if (folder / part / path.name).resolve() != path.resolve():
            shutil.copyfile(path, folder / part / path.name)
    return True
