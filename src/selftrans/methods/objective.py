"""The training objective: one draw, one student forward, the flow loss, and each guidance's term added to it.

Shape legend: N batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from selftrans.flow import LINEAR, Loss, Path, column, draw, noise_per_velocity, times_of
from selftrans.methods.contract import (
    check_options,
    check_output,
    checked_guidances,
    checked_loss,
    checked_prediction,
    checked_term,
    knows_times,
    warn_of_second_dropping,
)
from selftrans.methods.guidance import Guidance, Report
from selftrans.types import Backbone, Batch, Draw, check_backbone, check_latents, where_cond


class Objective(nn.Module):
    """L = L_flow + sum of lambda * guidance term. Wrapped by DDP or FSDP, compiled, and called; never subclassed.

    Args:
        student: the backbone that is trained.
        guidances: terms added to the flow loss; none is plain flow matching (vanilla).
        path: `LINEAR` or `COSINE`; a teacher must have been trained on the same one.
        times: how t is drawn: "systematic" (evenly spaced over the batch, one random offset), "systematic_logitnormal",
            "uniform", "lognormal", "lognormal_standard" or "logitnormal" (`flow.TIMES`).
        time_shift: k, which moves drawn times t to k t / (1 + (k - 1) t); 1: none (`flow.shifted`).
        drop: probability in [0, 1] that the student gets the null condition in place of a sample's own.
        cosine: factor of 1 - cos between predicted and true velocity, over the channels of each latent pixel, which is added
            to the squared error (LightningDiT, 2501.01423, section 4).
        contrastive: factor in [0, 1) of the squared error to the velocity of another sample of the batch, which is subtracted
            (Contrastive Flow Matching, 2506.05350; there 0.05). It needs batches of two or more.
        loss: whose squared error the flow loss is: "velocity"; "noise", the error of the noise that the velocity points to; or
            "own", that of what the student predicts (`Backbone.predicts`). A function takes the student's output and the `Draw`
            and returns your own loss (0-d) in place of the flow loss, also as `flow` in the report. The output may then have
            other channels than the latents, such as a predicted variance, and may be a prediction of the noise.
    Raises ValueError for an option out of range, guidances of equal names or of blocks that the student does not have, and a
    student that is no `Backbone`.
    """

    student: Backbone
    guidances: Any  #: nn.ModuleList of Guidance

    def __init__(
        self,
        student: Backbone,
        guidances: Iterable[Guidance] = (),
        *,
        path: Path = LINEAR,
        times: str = "systematic",
        time_shift: float = 1.0,
        drop: float = 0.1,
        cosine: float = 0.0,
        contrastive: float = 0.0,
        loss: Loss | Callable[[Tensor, Draw], Tensor] = "own",
    ) -> None:
        super().__init__()
        check_backbone(student, "the student")
        check_options(path, drop, cosine, contrastive, loss)
        law = times_of(times, time_shift)
        warn_of_second_dropping(student, drop)
        self.student = student
        self.guidances = nn.ModuleList(checked_guidances(guidances, student))
        self.path, self.times, self.time_shift, self.drop = path, times, time_shift, drop
        self.cosine, self.contrastive = cosine, contrastive
        self.loss = checked_prediction(student) if loss == "own" else loss
        if contrastive and self.loss == "noise":
            raise ValueError(
                "contrastive is for a loss of the velocity, and this one is of the noise; give loss velocity"
            )
        for guidance in self.guidances:
            guidance.use_times(law, path)
        #: whether a range of t holds a number of drawn times that is bounded, and known to the guidances that select by one
        uniform = times == "systematic" and time_shift == 1
        self.even = law.even and (uniform or all(map(knows_times, self.guidances)))
        self._unchecked = True  # labels on a GPU are checked in the first call only, since the check takes kernels

    if TYPE_CHECKING:  # nn.Module declares that a call returns Any

        def __call__(self, batch: Batch | Draw, step: int | Tensor) -> tuple[Tensor, Report]: ...

    def forward(self, batch: Batch | Draw, step: int | Tensor) -> tuple[Tensor, Report]:
        """Loss of a step (0-d, float32) and its parts, detached and still on the device. ValueError for labels outside the
        classes, latents of another shape, and a student or guidance that returns anything else than declared.

        A `Draw` that was already made (`draw`) is used as it is.
        `step` is the number of the training step, from 0: guidances end by it (`Guidance.until_step`).
        A `step` that is a 0-d tensor is not read: then every guidance acts, and the caller retires those that have ended.
        Labels on the CPU are checked in every call; on a GPU their values are checked in the first, by the device.
        """
        return self.losses(batch if isinstance(batch, Draw) else self.draw(batch), step)

    def draw(self, batch: Batch, *, t: Tensor | None = None, noise: Tensor | None = None) -> Draw:
        """Time, noise, point on the path and dropped conditions of a step, by the options of this objective.

        Args:
            t: times (N,) of your own in [0, 1], of which 0 is data. noise: of your own, in the shape of the latents.
        ValueError as in a call, and for times and noise of another shape.
        """
        self.check(batch)
        if not torch.compiler.is_compiling():
            self._unchecked = False
        null = self.student.null(batch.cond)
        d = draw(
            batch, null, path=self.path, times=self.times, time_shift=self.time_shift, drop=self.drop, t=t, noise=noise
        )
        return d._replace(even=d.even and self.even)

    def check(self, batch: Batch) -> None:
        """ValueError for labels outside the classes, and latents that are not those of the student."""
        if not isinstance(batch, Batch):
            raise ValueError(f"a batch is selftrans.Batch(latents, labels), not a {type(batch).__name__}")
        check_latents(batch.z0, self.student.shape)
        self.student.conditions.check_labels(batch.cond, batch.z0.shape[0], on_device=self._unchecked)

    def losses(self, d: Draw, step: int | Tensor) -> tuple[Tensor, Report]:
        """Loss and report of a draw. In a loop of your own call the objective itself: DDP and compilation wrap that call."""
        d = d._replace(step=step)
        active = [g for g in self.guidances if g.acts(step)]
        for g in active:
            rows = g.null_rows(d)
            if rows is not None:
                d = d._replace(dropped=where_cond(rows, d.null, d.dropped))
        taps = tuple(sorted({k for g in active for k in g.taps}))
        out = self.student(d.zt, d.t, d.dropped, taps=taps)
        check_output(out, d.zt, self.student, taps, velocity=isinstance(self.loss, str))
        assert out.v is not None
        loss = self.flow_loss(out.v, d)
        report = {"flow": loss.detach()}
        if self.cosine:
            direction = 1 - F.cosine_similarity(out.v.float(), d.v.float(), dim=1).mean()  # over C of (N, C, *S)
            loss = loss + self.cosine * direction
            report["flow/cosine"] = direction.detach()
        if self.contrastive:
            error = F.mse_loss(out.v.float(), another_velocity(d))
            loss = loss - self.contrastive * error
            report["flow/contrastive"] = error.detach()
        for g in active:
            term, details = checked_term(g.name, g(d, out.feats))
            loss = loss + g.weight * term
            report |= {g.name: term.detach()} | {f"{g.name}/{key}": value.detach() for key, value in details.items()}
        if len(active) < len(self.guidances) and dist.is_available() and dist.is_initialized():
            loss = loss + self._zero_of_ended(active)
        return loss, report

    def flow_loss(self, v: Tensor, d: Draw) -> Tensor:
        """Mean squared error (0-d) of the velocity, or of the noise that it points to; or the loss of the caller."""
        if not isinstance(self.loss, str):
            return checked_loss(self.loss(v, d))
        if self.loss == "velocity":
            return F.mse_loss(v.float(), d.v.float())
        factor = column(noise_per_velocity(self.path, d.t), d.v)
        return (factor * (v.float() - d.v.float())).square().mean()

    def _zero_of_ended(self, active: list[Guidance]) -> Tensor | float:
        """0 with a gradient of zeros for the heads of guidances that have ended: DDP refuses parameters without a gradient."""
        heads = [p for g in self.guidances if g not in active for p in g.parameters() if p.requires_grad]
        plain = [p for p in heads if type(p.data) is Tensor]  # FSDP2, which has DTensors, needs no gradient
        return sum(0 * p.flatten()[:1].sum().float() for p in plain)  # one number of each gives it a gradient

    def watch(self, average: Backbone) -> None:
        """Give the student's moving average to every guidance; those with it as teacher keep it.

        The average is a copy of the student, updated in place by your loop after each step. Call it once, before training.
        """
        for guidance in self.guidances:
            guidance.watch(average)

    def retire(self, step: int) -> bool:
        """Drop the guidances that have ended by `step`, heads and teachers with them; true if any was dropped.

        Without it, a guidance that has ended runs neither head nor teacher, but both stay in memory and the head in
        `state_dict()`, and DDP still reduces its gradients, which are zero; after retiring, DDP must be wrapped again. Before
        `load_state_dict`, retire at the step of the checkpoint.
        """
        staying = [g for g in self.guidances if g.acts(step)]
        ended = len(staying) < len(self.guidances)
        if ended:
            self.guidances = nn.ModuleList(staying)
        return ended


def another_velocity(d: Draw) -> Tensor:
    """The velocity (N, C, *S) of another sample for each sample: of the next one, since the order of a batch is random.

    ValueError for a batch of one sample.
    """
    if len(d.v) < 2:
        raise ValueError(
            "contrastive compares a sample with another one of its batch, which has one only; use larger batches"
        )
    return d.v.roll(1, dims=0).float()
