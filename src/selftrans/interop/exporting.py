"""A run's weights ⇒ one file, in selftrans's layout or in a published one. The reverse is `importing`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.adapted import ADAPTERS
from selftrans.checkpoints.load import EXPORTED, PIPELINE, PREFIX, Weights, find_asked, load_model
from selftrans.interop.published_file import AUTOENCODER, LAYOUT
from selftrans.models import registry as models
from selftrans.storage import atomic_directory, atomic_write, directory_lock, remove_stale_temporaries, sync
from selftrans.suggest import nearest

OURS = "selftrans"  #: the layout of one file, which every command accepts in place of a run
FOLDER = "pipeline"  #: the layout of a folder for diffusers (`sit_pipeline`), which every command accepts, too


def export_run(
    run: str | Path, out: str | Path, *, weights: Weights = "ema", layout: str = OURS, stage: str | None = None
) -> Path:
    """Write a run's weights, without heads, as `out`/model.safetensors with a config.json that describes it; returns the file.

    Every command accepts a file of layout `selftrans` in place of a run. The layout `pipeline` is a folder for
    `SiTPipeline.from_pretrained`, whose model_index.json is returned; every command accepts it, too. The other layouts
    belong to the model's family: tensor names and time convention of the published code. ValueError when `out` holds
    anything but an earlier export.
    """
    out = Path(out)
    path = find_asked(run, stage=stage, weights=weights)
    if layout == FOLDER:
        return _export_pipeline(path, out, stage)
    loaded = load_model(path, stage=stage)
    spec = models.find(loaded.config.model.name)
    names = {EXPORTED, *(each.folder for each in spec.layouts.values() if each.folder)}
    check_out(out, names, "an export")
    # adapters are merged, and names have no prefix, unlike in a pipeline
    header = {key: value for key, value in checkpoint.read_header(path).items() if key not in (ADAPTERS, PREFIX)}
    name = EXPORTED
    if layout == OURS:
        tensors, metadata, config = dict(loaded.model.state_dict()), {checkpoint.KEY: json.dumps(header)}, header
    else:
        if layout not in spec.layouts:
            raise ValueError(
                f"model {spec.name} has no layout '{layout}'{nearest(layout, [OURS, FOLDER, *spec.layouts])}"
            )
        published = spec.layouts[layout]
        if loaded.model.early is not None:
            warnings.warn(
                f"the second output of the model is left out: layout {layout} has no place for it", stacklevel=2
            )
            loaded.model.remove_early()
        arguments = published.arguments(loaded.model, loaded.config.model)
        config = {
            "layout": layout,
            "arguments": arguments,
            "path_type": loaded.config.train.path,
            "time": published.time,
            **{key: header.get(key) for key in ("autoencoder", "stage", "step", "weights")},
        }
        if published.folder:
            config, name = arguments, published.folder
        tensors = published.tensors(loaded.model)
        metadata = {LAYOUT: layout, AUTOENCODER: loaded.autoencoder, "format": "pt"}
    with folder_to_fill(out) as folder, described_by(folder / "config.json", config):
        checkpoint.write_tensors(folder / name, tensors, metadata)
    remove_earlier(out, names - {name})
    return out / name


@contextmanager
def folder_to_fill(out: Path) -> Iterator[Path]:
    """`out` if it exists, else a new folder that becomes `out` when the block ends, so that a failure leaves none.

    What a killed export left in an `out` that exists is removed, unless another process exports to it now.
    """
    if not out.exists():
        with atomic_directory(out) as folder:
            yield folder
        return
    with ExitStack() as held:
        with suppress(OSError, ImportError):  # in use, or no locks, so that it is not known
            held.enter_context(directory_lock(out))
            remove_stale_temporaries(out)
        yield out


@contextmanager
def described_by(path: Path, content: dict[str, Any]) -> Iterator[None]:
    """Write weights in the block and json about them to `path` such that both replace an earlier export, or none does.

    ValueError where one of them cannot be written.
    """
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2).encode())
        file.flush()
        sync(Path(file.name))  # a full disk is known before the weights are put in their place
        yield


def remove_earlier(out: Path, names: set[str]) -> None:
    """Remove these files of an earlier export in another layout: a reader could take them for those of this one."""
    for name in names:
        (out / name).unlink(missing_ok=True)


def check_out(out: Path, names: set[str], what: str) -> None:
    """ValueError unless `out` does not exist, is empty, or holds one of the files `names`, which an earlier export wrote.

    `what`: what `out` should be, for the message.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not any((out / n).is_file() for n in names))):
        raise ValueError(f"{out} exists and is not {what}; choose another --out, or remove it")


def _export_pipeline(file: Path, out: Path, stage: str | None) -> Path:
    """Write a folder for diffusers; an earlier one is replaced when the new one is complete."""
    from selftrans.interop.sit_pipeline import SiTPipeline, check_replaceable

    check_replaceable(out)
    pipeline = SiTPipeline.from_run(file, stage=stage)
    with atomic_directory(out, replace=True) as folder:
        pipeline.save_pretrained(folder)
    return out / PIPELINE
