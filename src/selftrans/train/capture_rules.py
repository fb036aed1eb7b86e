"""When a training step is captured: what makes it impossible, and what `train.capture auto` leaves launched besides.

`auto` is the default, so it must cost no run anything: it captures what is known to be right, where memory is plentiful, and
says why not only in `train --dry-run`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from selftrans.config import Train
from selftrans.messages import gigabytes
from selftrans.methods.guidance import Frozen
from selftrans.storage import write_json

if TYPE_CHECKING:
    from selftrans.train.trainer import Trainer

#: in a run's folder: a process could not go on with graphs, so that `auto` makes none there
ENDED = "not-captured.json"
#: packages whose layers are functions of their inputs; what others keep in Python from step to step would not be replayed
KNOWN = ("selftrans", "torch", "torchao", "diffusers", "transformers", "peft")


class NotCaptured(ValueError):
    """The step could not be recorded or replayed; one line, which says how the run continues.

    `reason`: with `train.capture auto`, why a new process can go on without graphs where this one cannot; "" otherwise.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


def obstacle(trainer: Trainer) -> str | None:
    """Why the steps of a stage cannot be captured, or None. Sorts out what is known before the first step."""
    train, kind = trainer.config.train, trainer.accelerator.device.type
    if kind not in ("cuda", "cpu"):
        return f"CUDA graphs need a CUDA GPU, this device is {kind}"
    if reason := obstacle_in_settings(train, trainer.accelerator.num_processes):
        return reason
    if trainer.objective.student.recompute and trainer.objective.student.random_blocks:
        return "train.recompute repeats blocks that may draw random numbers"
    if len(trainer.shards.parts) > 1:
        return "the data hold several sizes, and a graph has one shape"
    if not trainer.objective.even and any(g.selects for g in trainer.objective.guidances):
        times, shift = trainer.objective.times, trainer.objective.time_shift
        drawn = f"train.times {times}" + (f" and train.time_shift {shift:g}" if shift != 1 else "")
        return f"with {drawn} a range of t selects another number of samples in every step"
    return None


def obstacle_in_settings(train: Train, processes: int) -> str | None:
    """Why steps with these settings cannot be captured, whatever the model, the data and the device; None otherwise."""
    if processes > 1:
        return "it is for one process"
    if train.precision == "fp16":
        return "the gradient scaler of fp16 is not captured; use bf16"
    if train.optimizer != "adamw":
        return f"train.optimizer {train.optimizer} decides on the host whether a step is skipped"
    return None


def why_launched(trainer: Trainer) -> str | None:
    """Why `auto` launches the steps of a stage, as far as that is known before the first one; None where it does not.

    Besides an `obstacle`: AMD GPUs; code of other packages, whose Python would run in the recording alone (a graph would
    repeat a count or a number drawn by numpy); and a run that could not go on with graphs before.
    """
    if trainer.accelerator.device.type == "cpu":
        return "CUDA graphs need a CUDA GPU, this device is cpu"
    if reason := obstacle(trainer):
        return reason
    if torch.version.hip:
        return "graphs are not tested on AMD GPUs; train.capture on tries"
    for kind in map(type, _parts(trainer)):
        if kind.__module__.partition(".")[0] not in KNOWN:
            return f"{kind.__name__} is code of another package, which a graph may not repeat; train.capture on tries"
    if (trainer.directory.parent / ENDED).exists():
        return f"graphs ended an earlier process, as {ENDED} in the folder of the run says; remove it to try again"
    return None


def _parts(trainer: Trainer) -> Iterator[Any]:
    """What computes in a step: the modules of the objective, and the teacher or encoder, which are not among them."""
    yield from trainer.objective.modules()
    if trainer.teacher is not None:
        yield trainer.teacher
    if isinstance(trainer.teacher, Frozen):
        yield from trainer.teacher.model.modules()


def too_large(device: torch.device, peak: int) -> str | None:
    """Why graphs would keep too much of a GPU's memory between steps, or None.

    They keep what a step uses beyond what stays; `peak` is the most that a step has allocated, in bytes. Half of what is free
    between steps is the most that they get. So everything that has run in a step has memory left for it, and a preview half
    of what it would have without graphs.
    """
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # kept of the steps before, on a stream of their own: as good as free
    taken = peak - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0]
    if 2 * taken <= free:
        return None
    return f"graphs would keep {gigabytes(taken)}, more than half of the {gigabytes(free)} that are free between steps"


def description(trainer: Trainer) -> str:
    """How the steps that were taken on a GPU ran, and why not as graphs; "" on other devices, and with `off`."""
    if trainer.accelerator.device.type != "cuda" or trainer.config.train.capture == "off":
        return ""
    captured = trainer.captured
    if captured is not None and captured.replaying:
        return "replayed as CUDA graphs"
    reason = why_launched(trainer) if captured is None else captured.reason
    return f"launched one by one: {reason or 'too few steps were taken to record them'}"


@contextlib.contextmanager
def remembered(out: Path) -> Iterator[None]:
    """Around the training of a stage: where graphs of `auto` end the process, `out` gets a file that keeps the run launched.

    So the same command continues. `NotCaptured` says that; where the file cannot be written, it says what else to do, and has
    no `reason`.
    """
    try:
        yield
    except NotCaptured as error:
        if not error.reason:
            raise
        try:
            write_json(out / ENDED, {"reason": error.reason, "torch": torch.__version__})
        except (OSError, ValueError):
            error.reason = ""
            raise error from None
        raise NotCaptured(
            f"{error.reason}; the same command continues from the last checkpoint without graphs, because of {out / ENDED}",
            error.reason,
        ) from error
