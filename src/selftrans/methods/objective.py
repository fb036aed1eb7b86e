"""The training objective: one draw, one student forward, the flow loss, and each guidance's term added to it.

Shape legend: N batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selftrans.flow import LINEAR, PATHS, TIMES, Path, draw
from selftrans.methods.guidance import Guidance, Report
from selftrans.types import Backbone, Batch, Draw, check_latents, where_cond


class Objective(nn.Module):
    """L = L_flow + sum of lambda * guidance term. Wrapped by DDP or FSDP, compiled, and called; never subclassed.

    Args:
        student: the backbone that is trained.
        guidances: terms added to the flow loss; none is plain flow matching (vanilla).
        path, times, drop: probability path, timestep sampler (`flow.TIMES`), probability of the null condition.
        cosine: factor of 1 - cos between predicted and true velocity, over the channels of each latent pixel, which is added
            to the squared error (LightningDiT, 2501.01423, section 4).
    """

    student: Backbone
    guidances: Any  #: nn.ModuleList of Guidance

    def __init__(
        self,
        student: Backbone,
        guidances: Sequence[Guidance] = (),
        *,
        path: Path = LINEAR,
        times: str = "systematic",
        drop: float = 0.1,
        cosine: float = 0.0,
    ) -> None:
        super().__init__()
        _check(guidances, path, times, drop, cosine)
        self.student = student
        self.guidances = nn.ModuleList(guidances)
        self.path, self.times, self.drop, self.cosine = path, times, drop, cosine
        self._unchecked = True  # labels on a GPU are checked in the first call alone: it takes kernels
        names = [guidance.name for guidance in guidances]
        if len(set(names)) < len(names):
            raise ValueError(f"guidances are called {', '.join(names)}; give each a name of its own")
        if student.early is not None and not any(guidance.trains_early for guidance in guidances):
            raise ValueError(
                "model.early_block gives the student a second output, which this method does not train; omit it"
            )
        for guidance in guidances:
            wrong = [k for k in guidance.taps if not 1 <= k <= student.depth]
            if wrong:
                raise ValueError(
                    f"{guidance.name} reads block {wrong[0]}, but the student has blocks 1..{student.depth}"
                )

    def forward(self, batch: Batch, step: int | Tensor) -> tuple[Tensor, Report]:
        """Loss of a step (0-d, float32) and its parts, detached and still on the device. ValueError: labels of no class, and
        latents of another shape.

        A `step` that is a 0-d tensor is not read: then every guidance acts, and the caller retires those that have ended.
        Labels on the CPU are checked in every call; on a GPU their values are checked in the first, by the device.
        """
        check_latents(batch.z0, self.student.shape)
        self.student.conditions.check_labels(batch.cond, batch.z0.shape[0], on_device=self._unchecked)
        if not torch.compiler.is_compiling():
            self._unchecked = False
        null = self.student.null(batch.cond)
        return self.losses(draw(batch, null, path=self.path, times=self.times, drop=self.drop), step)

    def losses(self, d: Draw, step: int | Tensor) -> tuple[Tensor, Report]:
        """The same for a draw already made."""
        d = d._replace(step=step)
        active = [g for g in self.guidances if isinstance(step, Tensor) or g.until_step is None or step < g.until_step]
        for g in active:
            rows = g.null_rows(d)
            if rows is not None:
                d = d._replace(dropped=where_cond(rows, d.null, d.dropped))
        taps = tuple(sorted({k for g in active for k in g.taps}))
        out = self.student(d.zt, d.t, d.dropped, taps=taps)
        loss = F.mse_loss(out.v.float(), d.v.float())
        report = {"flow": loss.detach()}
        if self.cosine:
            direction = 1 - F.cosine_similarity(out.v.float(), d.v.float(), dim=1).mean()  # over C of (N, C, *S)
            loss = loss + self.cosine * direction
            report["flow/cosine"] = direction.detach()
        for g in active:
            term, details = g(d, out.feats)
            loss = loss + g.weight * term
            report |= {g.name: term.detach()} | {f"{g.name}/{key}": value for key, value in details.items()}
        return loss, report

    def watch(self, average: Backbone) -> None:
        """Show the student's moving average to every guidance; those that follow it keep it."""
        for guidance in self.guidances:
            guidance.watch(average)

    def retire(self, step: int) -> bool:
        """Drop the guidances that have ended by `step`, heads and teachers with them; true if any was dropped."""
        staying = [g for g in self.guidances if g.until_step is None or step < g.until_step]
        ended = len(staying) < len(self.guidances)
        if ended:
            self.guidances = nn.ModuleList(staying)
        return ended


def _check(guidances: Sequence[Guidance], path: Path, times: str, drop: float, cosine: float) -> None:
    """ValueError for an option of `Objective` out of range."""
    if isinstance(guidances, Guidance):
        raise ValueError(f"guidances are a list, of {guidances.name} alone too: [guidance]")
    if isinstance(path, str):
        raise ValueError(f"path {path!r} must be a Path: one of selftrans.PATHS, which are {', '.join(PATHS)}")
    if times not in TIMES:
        raise ValueError(f"times {times!r} is unknown; choose one of {', '.join(TIMES)}")
    if not 0 <= drop <= 1 or not 0 <= cosine < math.inf:
        raise ValueError(f"drop {drop} must be in [0, 1], and cosine {cosine} a number from 0")
