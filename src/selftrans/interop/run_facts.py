"""Facts for the model card from the files of a run: data, compute, measurements, samples.

Files of other weights than those of the card are left out, with a warning, so that a card has no numbers of other weights.
Shape legend: (H, W, C) picture with C of 1 or 3.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from selftrans.checkpoints.load import REPORT, LoadedModel
from selftrans.evaluate.plots import sample_sheet
from selftrans.interop.pipeline_parts import last_parts
from selftrans.messages import printable
from selftrans.plain_json import read_object
from selftrans.sample_config import beyond_defaults
from selftrans.sampling.run_settings import applicable_settings
from selftrans.sampling.sample_file import NPY, PNG

SHEET = 16  #: samples shown of a folder
EVALUATION = "evaluate.json"


class Sheet(NamedTuple):
    """A picture of samples, and what they depend on."""

    picture: np.ndarray  #: uint8 (H, W, C)
    made: str


def run_of(weights: Path) -> Path | None:
    """The run directory of a checkpoint's weights file; None for any other file."""
    folders = weights.absolute().parents
    return folders[3] if len(folders) > 3 and folders[1].name == "checkpoints" else None


def compute_of(run: Path | None, loaded: LoadedModel) -> dict[str, Any] | None:
    """What run.json says of stages and compute; None if it is not known for these weights."""
    report = (read_object(run / REPORT) if run else None) or {}
    stages = report.get("stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        return None
    if (stages[-1].get("stage"), stages[-1].get("steps")) != (loaded.stage, loaded.step):
        return None  # of an earlier checkpoint or stage: the sum would be wrong
    return {key: report.get(key) for key in ("student_tflops", "total_tflops", "total_seconds", "stages")}


def evaluations_of(run: Path | None, given: Sequence[Path], loaded: LoadedModel) -> list[dict[str, Any]]:
    """The reports of `selftrans evaluate` on these weights: `given`, or (none) that in the run.

    ValueError for a given file that is missing or no report; a warning for one on other weights.
    """
    files = list(given) or ([run / EVALUATION] if run and (run / EVALUATION).is_file() else [])
    reports = []
    for file in files:
        report = read_object(file)
        if report is None or not isinstance(report.get("metric"), str) or report["metric"] not in report:
            raise ValueError(f"{printable(file)} is no report of `selftrans evaluate`; give its evaluate.json")
        made = report.get("made")
        if not isinstance(made, dict) or not _of_weights(made, loaded):
            warnings.warn(
                f"{printable(file)} is left out: it does not say that its samples are of these weights", stacklevel=4
            )
            continue
        reports.append(report)
    return reports


def sheet_of(run: Path | None, samples: Path | None, loaded: LoadedModel) -> Sheet | None:
    """A sheet of samples: of the folder `samples` (`selftrans sample`), or (None) the preview of this step of the run.

    None, with a warning, where there is none of these weights. Raises ValueError for a folder that holds no samples.
    """
    if samples is not None:
        return _of_folder(samples, loaded)
    preview = run / loaded.stage / "previews" / f"step-{loaded.step:08d}.png" if run else None
    if preview is None or not preview.is_file() or loaded.weights != "ema":
        warnings.warn("the card has no samples: give --samples FOLDER, as `selftrans sample` makes it", stacklevel=4)
        return None
    sample = applicable_settings(dataclasses.replace(loaded.config.sample, decode_with=None), loaded.model)
    if sample.autoguidance is not None:  # which previews leave out, as they do `decode_with`
        sample = dataclasses.replace(sample, autoguidance=None, guidance_scale=1.0)
    made = json.loads(json.dumps(sample.settings())) | {
        "steps": loaded.config.log.preview_steps,
        "sampler": "Heun's method",
    }
    picture, _ = PNG.read(preview)
    return Sheet(picture, made_with(made))


def _of_folder(samples: Path, loaded: LoadedModel) -> Sheet | None:
    made = (read_object(samples / "samples.json") or {}).get("settings")
    files = sorted(samples.glob(f"[0-9]*{PNG.suffix}"))[:SHEET] or sorted(samples.glob(f"[0-9]*{NPY.suffix}"))[:SHEET]
    if not isinstance(made, dict) or not files:
        raise ValueError(f"{printable(samples)} holds no samples; give a folder made by `selftrans sample`")
    if not _of_weights(made, loaded):
        warnings.warn(f"{printable(samples)} is left out: its samples are not of these weights", stacklevel=5)
        return None
    images = [(PNG if files[0].suffix == PNG.suffix else NPY).read(file)[0] for file in files]
    if any(image.shape != images[0].shape for image in images):
        raise ValueError(f"{printable(samples)} holds samples of several sizes; give one of one size")
    return Sheet(sample_sheet(np.stack(images)), made_with(made))


def made_with(made: dict[str, Any]) -> str:
    """Settings of samples in words."""
    sampling = f"{made.get('steps')} steps of {made.get('sampler')}, guidance {made.get('guidance_scale')}"
    interval = made.get("guidance_interval")
    if made.get("guidance_scale") != 1 and interval not in (None, [0.0, 1.0]):
        sampling += f" for t in {interval}"
    parts = [sampling, *beyond_defaults(last_parts(made)), f"seed {made.get('seed')}"]
    return ", ".join(map(printable, parts))  # each part is shortened separately


def _of_weights(made: dict[str, Any], loaded: LoadedModel) -> bool:
    source = made.get("source")
    return isinstance(source, dict) and source.get("weights") == loaded.source["weights"]
