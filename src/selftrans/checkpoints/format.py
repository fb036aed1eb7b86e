"""Checkpoints: safetensors and json in one directory, written atomically, with the sha256 of each file; nothing is pickled.

    <stage>/checkpoints/step-00001000/
        student.safetensors  ema.safetensors  heads.safetensors  optimizer.safetensors  state.json
`state.json` holds the sha256 of the other files and of its own content. The headers of `student` and `ema` contain all that
is needed to build the model, so each of these files can be used alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from selftrans.messages import first_line
from selftrans.plain_json import UNREADABLE, from_plain, recorded
from selftrans.storage import (
    FREE_SPACE,
    atomic_directory,
    atomic_write,
    remove_stale_temporaries,
    sha256_file,
)

STATE = "state.json"
KEY = "selftrans"  #: header entry of a weights file: the result of `load.header`, as json


class Checkpoint(NamedTuple):
    """A valid checkpoint on disk: complete, its hashes checked."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.path / f"{name}.safetensors")


def weights_sha256(path: Path) -> str:
    """sha256 of the tensors in a safetensors file without its header: the same for equal weights of different runs."""
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")  # safetensors: length of the header, header, tensors
        file.seek(8 + header)
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one safetensors file atomically. ValueError, in one line, where it cannot be written."""
    try:
        with atomic_write(path) as file:
            _save_file(Path(file.name), tensors, metadata)
    except SafetensorError as error:
        raise ValueError(f"{path} could not be written ({error}); {FREE_SPACE}") from error


def _save_file(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, path, metadata=metadata)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files private, whatever the umask


def path_of_step(folder: Path, step: int) -> Path:
    """Directory of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def save(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], header: dict[str, Any]
) -> Path:
    """Write checkpoint `folder/step-...` atomically, replacing one of the same step; returns its path.

    Raises OSError when it cannot be written (a full disk); earlier checkpoints are unchanged.
    """
    final = path_of_step(folder, step)
    try:
        with atomic_directory(final, replace=True) as directory:
            hashes = {}
            for name, named in tensors.items():
                path = directory / f"{name}.safetensors"
                _save_file(path, named, {KEY: json.dumps(header | {"weights": name})})
                hashes[path.name] = sha256_file(path)
            record = {"step": step, "sha256": hashes} | state
            hashes[STATE] = _state_sha256(json.loads(json.dumps(record)))
            (directory / STATE).write_text(json.dumps(record, indent=2))
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write checkpoint {final} ({error})") from error
    return final


def _state_sha256(record: dict[str, Any]) -> str:
    """sha256 of the content of a state.json, without the entry that holds this hash."""
    content = record | {"sha256": {name: value for name, value in record["sha256"].items() if name != STATE}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of the checkpoint in `path`, verified; its `sha256` are those of the other files, which are not read.
    ValueError where it is missing or damaged."""
    try:
        state = json.loads((path / STATE).read_text())
        hashes = from_plain(dict[str, str], state["sha256"], "sha256")
        from_plain(int, state["step"], "step")
        if hashes.pop(STATE, None) != _state_sha256(state):
            raise ValueError("its sha256 is not the recorded one")
    except UNREADABLE as error:
        raise ValueError(f"{path / STATE} is missing or damaged ({error})") from error
    return state | {"sha256": hashes}


def read(path: Path) -> Checkpoint:
    """Read and verify the checkpoint in `path`. ValueError names the file that is missing or damaged."""
    state = read_state(path)
    for name, expected in state["sha256"].items():
        file = path / Path(name).name[:80]
        try:
            valid = file.is_file() and sha256_file(file) == expected
        except OSError:
            valid = False
        if not valid:
            raise ValueError(f"{file} is missing or damaged (its sha256 is not the recorded one)")
    return Checkpoint(path, state)


def steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in a folder, oldest first, not verified."""
    paths = [path for path in folder.glob("step-*") if path.is_dir() and re.fullmatch("step-[0-9]+", path.name)]
    return sorted((int(path.name[5:]), path) for path in paths)


def valid_checkpoints(folder: Path) -> Iterator[Checkpoint]:
    """Valid checkpoints from the newest to the oldest; each damaged one is skipped with a warning that names it."""
    for _, path in reversed(steps(folder)):
        try:
            yield read(path)
        except ValueError as error:
            warnings.warn(f"skipping a damaged checkpoint: {error}", stacklevel=2)


def newest(folder: Path) -> Checkpoint | None:
    """The newest valid checkpoint of a folder, or None."""
    return next(valid_checkpoints(folder), None)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of interrupted writes; the caller must hold the lock of the run."""
    remove_stale_temporaries(folder, "step-*")


def prune(folder: Path, step: int, keep: int, *, best: int = 0, every: int = 0) -> None:
    """Remove all checkpoints but the newest `keep` (0: remove none), the `best` with the lowest loss, and multiples of `every`.

    `step` is the one just written. Checkpoints of later steps are removed and do not count: the run continued from an earlier
    one, because they are damaged. The loss is `flow` in `state.json` (its hash is not checked): the mean flow loss of the steps
    that led to the checkpoint. Of each kind of loss, where it was changed (`train.loss`), so many are kept.
    """
    remove_unfinished(folder)
    if not keep:
        return
    existing = steps(folder)
    counted = [(number, path) for number, path in existing if number <= step]
    losses = dict[str, list[tuple[float, int]]]()
    for number, path in counted if best else ():
        if found := recorded(path / STATE, _kind_and_flow, None):
            losses.setdefault(found[0], []).append((found[1], -number))
    kept = {number for number, _ in counted[-keep:]}
    kept |= {-number for of_kind in losses.values() for _, number in sorted(of_kind)[:best]}
    kept |= {number for number, _ in counted if every and number % every == 0}
    for number, path in existing:
        if number not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _kind_and_flow(state: dict[str, Any]) -> tuple[str, float]:
    """Which flow loss a state.json has (`train.loss`), and its value."""
    return str(state.get("config", {}).get("train", {}).get("loss")), float(state["flow"])


def read_header(path: Path) -> dict[str, Any]:
    """The metadata of a weights file. ValueError when it is not a selftrans weights file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return dict(json.loads(metadata[KEY]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        reason = "no entry 'selftrans' in its header" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path} is not a selftrans weights file ({first_line(reason)}); expected student.safetensors or "
            "ema.safetensors of a checkpoint, or a run directory; checkpoints of other code are read by `selftrans import`"
        ) from error
