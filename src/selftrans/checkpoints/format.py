"""Checkpoints: safetensors and json in one folder, written beside, fsynced, renamed, hashed; nothing is pickled.

    <stage>/checkpoints/step-00001000/
        student.safetensors  ema.safetensors  heads.safetensors  optimizer.safetensors  state.json
`state.json` is written last and holds the sha256 of the others and of itself. `student` and `ema` carry in their headers
what is needed to build the model again, so either file is usable on its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from selftrans.storage import line, sync

STATE = "state.json"
KEY = "selftrans"  #: header entry of a weights file: json of stage, step, config, shape, num_classes


class Checkpoint(NamedTuple):
    """A whole checkpoint on disk, its hashes checked."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.path / f"{name}.safetensors")


def sha256(path: Path) -> str:
    """Hash of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(path: Path) -> str:
    """Hash of a file's tensors alone: the same weights trained again, at another time or for longer, have the same."""
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")  # safetensors: length of the header, header, tensors
        file.seek(8 + header)
        return hashlib.file_digest(file, "sha256").hexdigest()


def at(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def save(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], header: dict[str, Any]
) -> Path:
    """Write checkpoint `folder/step-...` whole or not at all. OSError (a full disk) leaves what was there."""
    final = at(folder, step)
    beside = folder / f".step-{step:08d}.{os.getpid()}"
    try:
        shutil.rmtree(beside, ignore_errors=True)  # of a killed process that had this one's number, as in a container
        beside.mkdir(parents=True)
        hashes = {}
        for name, named in tensors.items():
            path = beside / f"{name}.safetensors"
            metadata = {KEY: json.dumps(header | {"weights": name})}
            save_file({key: value.detach().cpu().contiguous() for key, value in named.items()}, path, metadata=metadata)
            path.chmod(beside.stat().st_mode & 0o666)  # safetensors makes them private, whatever the umask says
            sync(path)
            hashes[path.name] = sha256(path)
        record = {"step": step, "sha256": hashes} | state
        hashes[STATE] = _seal(json.loads(json.dumps(record)))
        (beside / STATE).write_text(json.dumps(record, indent=2))
        sync(beside / STATE)
        sync(beside)
        if final.exists():
            shutil.rmtree(final)
        os.replace(beside, final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise OSError(f"could not write checkpoint {final} ({error})") from error
    return final


def _seal(record: dict[str, Any]) -> str:
    """Hash of what a state.json says, this hash left out."""
    said = record | {"sha256": {name: value for name, value in record["sha256"].items() if name != STATE}}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read(path: Path) -> Checkpoint:
    """The checkpoint in `path`. ValueError names the file that is missing or damaged."""
    try:
        state = json.loads((path / STATE).read_text())
        hashes = state["sha256"]
        assert isinstance(state["step"], int) and isinstance(hashes, dict)
        if hashes.pop(STATE, None) != _seal(state):
            raise ValueError("its sha256 is not the recorded one")
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise ValueError(f"{path / STATE} is missing or damaged ({error})") from error
    for name, expected in hashes.items():
        file = path / Path(name).name[:80]
        try:
            sound = file.is_file() and sha256(file) == expected
        except OSError:
            sound = False
        if not sound:
            raise ValueError(f"{file} is missing or damaged (its sha256 is not the recorded one)")
    return Checkpoint(path, state)


def steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in a folder, oldest first, unchecked."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and re.fullmatch("step-[0-9]+", path.name)]
    return sorted((int(path.name[5:]), path) for path in found)


def whole(folder: Path) -> Iterator[Checkpoint]:
    """Checkpoints from the newest to the oldest; a damaged one is named in a warning and passed over."""
    for _, path in reversed(steps(folder)):
        try:
            yield read(path)
        except ValueError as error:
            warnings.warn(f"passing over a damaged checkpoint: {error}", stacklevel=2)


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a folder, if it holds any."""
    return next(whole(folder), None)


def sweep(folder: Path) -> None:
    """Remove what interrupted writes left behind; for the one process that may write there."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, step: int, keep: int, *, best: int = 0, every: int = 0) -> None:
    """Remove checkpoints but the newest `keep` (0: all stay), the `best` of lowest loss, and multiples of `every` steps.

    `step` is the one just written. What lies beyond it was passed over as damaged when the run continued: it counts for
    nothing and goes. The loss is what `state.json` holds under `flow`: the mean flow loss of the steps that led to the
    checkpoint.
    """
    sweep(folder)
    if not keep:
        return
    held = steps(folder)
    found = [(reached, path) for reached, path in held if reached <= step]
    losses = sorted((loss, -reached) for reached, path in found if (loss := _flow(path)) is not None) if best else []
    stay = {-reached for _, reached in losses[:best]} | {reached for reached, _ in found[-keep:]}
    stay |= {reached for reached, _ in found if every and reached % every == 0}
    for reached, path in held:
        if reached not in stay:
            shutil.rmtree(path, ignore_errors=True)


def _flow(path: Path) -> float | None:
    """Flow loss of a checkpoint, its hashes unchecked; None where it says nothing."""
    try:
        flow = json.loads((path / STATE).read_text()).get("flow")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return float(flow) if isinstance(flow, int | float) else None


def read_header(path: Path) -> dict[str, Any]:
    """What a weights file says of itself. ValueError when it is no selftrans weights file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return dict(json.loads(metadata[KEY]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        reason = "no entry 'selftrans' in its header" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path} is not a selftrans weights file ({line(reason)}); expected student.safetensors or ema.safetensors of a "
            "checkpoint, or a run directory; others' checkpoints go through `selftrans import` first"
        ) from error
