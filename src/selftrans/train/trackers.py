"""Trackers of accelerate: TensorBoard, Weights & Biases, Trackio and MLflow. None of them can stop a run.

A tracker that is not installed, cannot be started or fails later causes one warning; the others and log.jsonl continue.
RUN/trackers.json holds the id of the run at each tracker, so that a continued run is logged under the same id.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import secrets
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selftrans.config import RunConfig, settings_of
from selftrans.messages import first_line, printable
from selftrans.plain_json import recorded
from selftrans.storage import write_json

PROJECT = "selftrans"  #: project or experiment of the runs, unless the tracker's own variables say otherwise
RECORD = "trackers.json"
IDENTIFIER = re.compile(r"[\w-]{1,100}")


def _tensorboard(out: Path, known: str | None) -> tuple[Any, str]:
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker("tensorboard", str(out)), ""


def _wandb(out: Path, known: str | None) -> tuple[Any, str]:
    from accelerate.tracking import WandBTracker

    run = known or secrets.token_hex(4)
    return WandBTracker(PROJECT, name=out.name, id=run, resume="allow", dir=str(out)), run


def _trackio(out: Path, known: str | None) -> tuple[Any, str]:
    from accelerate.tracking import TrackioTracker

    run = known or f"{re.sub(r'[^A-Za-z0-9_-]', '-', out.name)[:60]}-{secrets.token_hex(4)}"
    return TrackioTracker(PROJECT, name=run, resume="allow"), run


def _mlflow(out: Path, known: str | None) -> tuple[Any, str]:
    from accelerate.tracking import MLflowTracker

    return MLflowTracker(PROJECT, run_id=known, run_name=out.name), ""


#: name -> makes accelerate's tracker, not started, for a run directory and the id of the run at it from an earlier start (None:
#: a new run); with the id of the run (empty: known only after the start)
KINDS: dict[str, Callable[[Path, str | None], tuple[Any, str]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}


def tracker_names(config: RunConfig) -> list[str]:
    """The trackers of a run: those of log.trackers, and TensorBoard unless log.tensorboard is off."""
    return [*dict.fromkeys([*(["tensorboard"] if config.log.tensorboard else []), *config.log.trackers])]


class Trackers:
    """The trackers of a run, used by its main process.

    Steps are counted per stage in TensorBoard, and over all stages elsewhere, where they must not go back.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._running: dict[str, Any] = {}
        self._before = 0  #: steps of earlier stages

    def start(self, config: RunConfig) -> None:
        """Start the trackers that a run asks for, with its settings where it is new to them."""
        known = _recorded(self.out)
        found = dict(known)
        for name in tracker_names(config):
            if importlib.util.find_spec(name) is None:
                _warn(f"tracker {name} is not installed (pip install {name}); the run continues without it")
                continue
            try:
                new = not (self.out / name).is_dir() if name == "tensorboard" else name not in known
                tracker, run = KINDS[name](self.out, known.get(name))
                tracker.start()
                self._running[name] = tracker
                if name != "tensorboard":
                    found[name] = run or str(tracker.active_run.info.run_id)
                if new:
                    _log_settings(name, tracker, config)
            except Exception as error:  # of a network, an account, a disk
                self._end(name, f"tracker {name} cannot be started ({first_line(error)}); the run continues without it")
        if found != known:
            try:
                write_json(self.out / RECORD, found)
            except (OSError, ValueError) as error:  # a full disk
                _warn(f"{first_line(error, 300)}; a continued run will be a new one at its trackers")

    def begin(self, steps_before: int) -> None:
        """Note that a stage begins, after this many steps of earlier ones."""
        self._before = steps_before

    def log(self, stage: str, values: dict[str, float], step: int, changed: Sequence[str] = ()) -> None:
        """Log values at this step of a stage, and as text the settings that were changed before it."""
        named = {f"{stage}/{key}": value for key, value in values.items()}
        text = {f"{stage}/changed": "; ".join(changed)} if changed else {}
        # MLflow's metrics are numbers
        self._each(step, lambda name, tracker, at: tracker.log(named if name == "mlflow" else named | text, step=at))

    def picture(self, stage: str, file: Path, step: int) -> None:
        """Show a preview, if its file was written."""
        if not self._running or not file.is_file():
            return
        from PIL import Image

        try:
            with Image.open(file, formats=["PNG"]) as opened:
                pixels = np.asarray(opened.convert("RGB"))  # (H, W, 3)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # damaged, or very large
            _warn(f"trackers do not get {file.name} ({first_line(error)})")
            return
        self._each(step, lambda name, tracker, at: _log_picture(name, tracker, f"{stage}/preview", pixels, file, at))

    def close(self) -> None:
        """End the trackers, also after an interruption of the run, so that they send or write their last values."""
        for name, tracker in [*self._running.items()]:
            try:
                tracker.finish()
            except Exception as error:
                _warn(f"tracker {name} did not end properly ({first_line(error)})")
        self._running.clear()

    def _each(self, step: int, do: Callable[[str, Any, int], None]) -> None:
        for name, tracker in [*self._running.items()]:
            try:
                do(name, tracker, step if name == "tensorboard" else self._before + step)
            except Exception as error:
                self._end(name, f"tracker {name} ends at step {step} ({first_line(error)}); log.jsonl continues")

    def _end(self, name: str, message: str) -> None:
        self._running.pop(name, None)  # a tracker that failed once is not used again
        _warn(message)


def _log_settings(name: str, tracker: Any, config: RunConfig) -> None:
    plain = json.loads(json.dumps({key: value for key, value, _ in settings_of(config)}, default=_plain))
    values = {key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in plain.items()}
    if name != "tensorboard":
        tracker.store_init_configuration(values)
        return
    from torch.utils.tensorboard.summary import hparams  # accelerate's would add a folder for each start

    for summary in hparams(values, {}):
        tracker.writer.file_writer.add_summary(summary)


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)


def _log_picture(name: str, tracker: Any, key: str, pixels: np.ndarray, file: Path, step: int) -> None:
    if name == "tensorboard":
        tracker.log_images({key: pixels[None]}, step=step, dataformats="NHWC")
    elif name == "wandb":
        tracker.log_images({key: [pixels]}, step=step)
    elif name == "trackio":
        import trackio

        tracker.log({key: trackio.Image(pixels)}, step=step)
    else:
        tracker.log_artifact(str(file), artifact_path=key)


def _recorded(out: Path) -> dict[str, str]:
    """What trackers.json holds; {} where it is missing or damaged."""
    known = lambda held: {str(name): run for name, run in held.items() if IDENTIFIER.fullmatch(run)}  # noqa: E731
    return recorded(out / RECORD, known, {})


def _warn(message: str) -> None:
    warnings.warn(printable(message, 400), stacklevel=4)
