"""A run's weights in one file, ours or in a published layout. How published files come in: `importing`."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import EXPORTED, Weights, find, load_model
from selftrans.interop.published_file import LAYOUT
from selftrans.models import registry as models
from selftrans.storage import atomic_write, write_json
from selftrans.suggest import nearest

OURS = "selftrans"  #: the layout that every command takes in place of a run


def export_run(
    run: str | Path, out: str | Path, *, weights: Weights = "ema", layout: str = OURS, stage: str | None = None
) -> Path:
    """Write a run's weights, heads left out, as `out`/model.safetensors with a config.json that describes it; returns the file.

    `selftrans`: what every command takes in place of a run. Other layouts are those of the model's family: the tensors of
    their repositories' classes, in their time. ValueError when `out` holds anything but an earlier export.
    """
    out = Path(out)
    path = find(run, stage=stage, weights=weights)
    found = load_model(path)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / EXPORTED).is_file())):
        raise ValueError(f"{out} holds something that is no export; choose another --out")
    said = checkpoint.read_header(path)
    if layout == OURS:
        tensors, metadata, described = dict(found.model.state_dict()), {checkpoint.KEY: json.dumps(said)}, said
    else:
        spec = models.find(found.config.model.name)
        if layout not in spec.layouts:
            raise ValueError(f"model {spec.name} has no layout '{layout}'{nearest(layout, [OURS, *spec.layouts])}")
        theirs = spec.layouts[layout]
        described = {
            "layout": layout,
            "arguments": theirs.arguments(found.model, found.config.model),
            "path_type": found.config.train.path,
            "time": theirs.time,
            **{key: said.get(key) for key in ("autoencoder", "stage", "step", "weights")},
        }
        tensors, metadata = theirs.tensors(found.model), {LAYOUT: layout, "format": "pt"}
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    try:
        with atomic_write(out / EXPORTED) as file:
            save_file(tensors, file.name, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{out / EXPORTED} could not be written ({error}); make room, or choose another --out") from error
    (out / EXPORTED).chmod(out.stat().st_mode & 0o666)
    write_json(out / "config.json", described)
    return out / EXPORTED
