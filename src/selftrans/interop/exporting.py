"""A run's weights in one file, ours or in a published layout. How published files come in: `published`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import save_file

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import EXPORTED, Weights, find, restore
from selftrans.config import RunConfig
from selftrans.interop import sit_names as names
from selftrans.interop.published_file import LAYOUT
from selftrans.storage import atomic_write, write_json


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    weights: Weights = "ema",
    layout: Literal["selftrans", "sit", "repa"] = "selftrans",
    stage: str | None = None,
) -> Path:
    """Write a run's weights, heads left out, as `out`/model.safetensors with a config.json that describes it; returns the file.

    `selftrans`: what every command takes in place of a run. `sit`, `repa`: the tensors of those repositories' `SiT`
    class, positions included, in their time. ValueError when `out` holds anything but an earlier export.
    """
    out = Path(out)
    path = find(run, stage=stage, weights=weights)
    found = restore(path)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / EXPORTED).is_file())):
        raise ValueError(f"{out} holds something that is no export; choose another --out")
    if layout == "sit" and found.config.model.qk_norm:
        raise ValueError("the original SiT has no QK-norm, and this model has; use --layout repa")
    said = checkpoint.read_header(path)
    if layout == "selftrans":
        tensors, metadata, described = dict(found.model.state_dict()), {checkpoint.KEY: json.dumps(said)}, said
    else:
        tensors = names.give_back(found.model, flip=layout == "sit")
        metadata, described = {LAYOUT: layout, "format": "pt"}, _described(found.model, found.config, layout, said)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    try:
        with atomic_write(out / EXPORTED) as file:
            save_file(tensors, file.name, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{out / EXPORTED} could not be written ({error}); make room, or choose another --out") from error
    (out / EXPORTED).chmod(out.stat().st_mode & 0o666)
    write_json(out / "config.json", described)
    return out / EXPORTED


def _described(model: Any, config: RunConfig, layout: str, said: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the published `SiT` class, and what else one must know to use the weights."""
    sizes = config.model.sizes()
    time = {"sit": "t = 0 is noise, v = data - noise", "repa": "t = 0 is data, v = noise - data"}
    arguments = {
        "input_size": model.shape[1],
        "patch_size": model.patch,
        "in_channels": model.shape[0],
        "hidden_size": model.width,
        "depth": model.depth,
        "num_heads": sizes["heads"],
        "num_classes": model.num_classes,
    }
    of_repa = {"decoder_hidden_size": model.width, "z_dims": [], "encoder_depth": 1, "qk_norm": config.model.qk_norm}
    own = {"learn_sigma": False} if layout == "sit" else of_repa
    return {
        "layout": layout,
        "arguments": arguments | own,
        "path_type": config.train.path,
        "time": time[layout],
        **{key: said.get(key) for key in ("autoencoder", "stage", "step", "weights")},
    }
