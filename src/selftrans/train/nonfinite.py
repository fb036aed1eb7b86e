"""Non-finite steps: an update whose loss or gradient is not finite is skipped, counted and reported, never applied.

A step is checked on the device; the host reads the result when a line is logged or a checkpoint is written.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from selftrans.checkpoints import format as checkpoint
from selftrans.messages import plural
from selftrans.train.fsdp import any_rank, local

GROWTH = 10.0  #: growth of a feature norm that is warned about
LISTED = 100  #: skipped steps of one log line that are listed with their rows


class NonFiniteSteps:
    """Checks every step of a stage.

    Args:
        most: skipped updates in a row that end the training.
        rows: step (0-based) -> positions in the data of the batch of all processes, which are logged for a skipped step.
    """

    def __init__(self, most: int, rows: Callable[[int], np.ndarray]) -> None:
        self.most, self.rows = most, rows
        self.skipped = 0  #: updates skipped so far
        self.in_a_row = 0  #: updates skipped in a row, up to the last step that was read
        self.norms: dict[str, float] = {}  #: feature norm at the first log line, or when last warned about
        self._unread: list[tuple[int, Tensor]] = []
        self._unreported: list[dict[str, Any]] = []
        self._warned_at = 0  #: `in_a_row` at the last warning

    def note(self, step: int, checked: Tensor) -> None:
        """Keep what `check_step` found of this 0-based step, until `sync` reads it."""
        self._unread.append((step, checked))

    def sync(self, stage: str) -> None:
        """Wait for the device and count. FloatingPointError (one line) when `most` updates in a row, or more, were skipped."""
        if not self._unread:
            return
        seen = torch.stack([values for _, values in self._unread]).tolist()
        steps, self._unread = [step for step, _ in self._unread], []
        found, ending, before = [], None, self.in_a_row
        for step, (bad, loss, norm) in zip(steps, seen, strict=True):
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if bad:
                skip = {"step": step + 1, "loss": f"{loss:g}", "grad_norm": f"{norm:g}"}
                found.append(skip | {"rows": self.rows(step).tolist()})
            if ending is None and self.in_a_row >= self.most:  # more: a run that continues with a smaller limit
                row = f"{plural(self.in_a_row, 'update')} in a row, up to step {step + 1} of {stage}"
                ending = f"{row}, had no finite gradient (loss {loss:g}, its norm {norm:g})"
        self.skipped += len(found)
        self._unreported = (self._unreported + found)[:LISTED]
        if ending:
            raise FloatingPointError(ending)
        if not before:
            self._warned_at = 0
        # while a checkpoint waits for a finite step, this runs after every step: warn only when `in_a_row` has doubled
        if found and (not self.in_a_row or self.in_a_row >= 2 * self._warned_at):
            self._warned_at, one = self.in_a_row, found[0]
            warnings.warn(
                f"{len(found)} of the last {plural(len(steps), 'update')} of {stage} skipped, first at step {one['step']} "
                f"(loss {one['loss']}, gradient norm {one['grad_norm']}); {self.skipped} in all; log.jsonl lists their rows",
                stacklevel=2,
            )

    def pop_report(self) -> dict[str, Any]:
        """Entries of a log line: `skipped`, the number so far, and `skips`, those since the last line. {} without any."""
        unreported, self._unreported = self._unreported, []
        return ({"skipped": self.skipped} if self.skipped else {}) | ({"skips": unreported} if unreported else {})

    def check_norms(self, values: dict[str, float], step: int) -> None:
        """Warn when the norm of guided features has grown tenfold, and again at each further tenfold."""
        for name, value in values.items():
            if not name.endswith("_norm") or name == "grad_norm":
                continue
            before = self.norms.setdefault(name, value)
            if before > 0 and value > GROWTH * before:
                self.norms[name] = value
                warnings.warn(
                    f"{name} has grown from {before:.3g} to {value:.3g} at step {step}: the scale of the features "
                    "grows; a smaller guidance weight or a normalised target bounds it",
                    stacklevel=2,
                )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; call `sync` before."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "norms": self.norms, "unreported": self._unreported}

    def load(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = int(state.get("skipped", 0)), int(state.get("in_a_row", 0))
        self.norms, self._unreported = dict(state.get("norms", {})), list(state.get("unreported", []))


def check_step(losses: list[Tensor], norm: Tensor, accelerator: Accelerator) -> Tensor:
    """(3,) on the device: 1 for a step that is not finite, else 0, the same in all processes; its loss; `norm`.

    `losses`: of the micro-batches. `norm`: of the gradient before clipping.
    """
    loss = torch.stack(losses).mean(dim=0)
    bad = (~(torch.isfinite(loss) & torch.isfinite(norm))).float()
    if accelerator.num_processes > 1:
        bad = accelerator.reduce(bad, reduction="sum").clamp(max=1)
    return torch.stack([bad, loss.float(), norm.float()])


def with_remedy(error: FloatingPointError, checkpoints: Path) -> FloatingPointError:
    """The error with the last valid checkpoint and what to change."""
    found = checkpoint.newest(checkpoints)
    remedy = "a lower train.lr (or the stage's own) or guidance weight, or train.precision bf16 or fp32"
    if found is None:
        return FloatingPointError(f"{error}, before the first checkpoint in {checkpoints}; use {remedy}")
    return FloatingPointError(
        f"{error}; the last good checkpoint is {found.path}; to continue from there: {remedy}, and --train.allow-changes True"
    )


def check_weights(parameters: list[Tensor], where: str) -> None:
    """FloatingPointError unless all weights are finite. Else their checkpoint could replace a valid one."""
    # a process may have no rows of a small sharded tensor
    parts = [part for p in parameters if (part := local(p.detach())).numel()]
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(parts, ord=float("inf"))])
    if bool(any_rank(~torch.isfinite(norms.sum(dim=0)), parameters)):
        raise FloatingPointError(f"the weights are no longer finite at {where}")
