"""The training objective: one draw, one student forward, the flow loss, and each guidance's term added to it.

Shape legend: N batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selftrans.flow import LINEAR, PATHS, Path, check_times, draw
from selftrans.methods.guidance import Guidance, Report
from selftrans.types import Backbone, Batch, Draw, Output, check_backbone, check_latents, where_cond

#: entries of a log line besides the terms of guidances
LOGGED = ("stage", "step", "loss", "flow", "grad_norm", "lr", "seconds", "tflops", "skipped", "skips")


class Objective(nn.Module):
    """L = L_flow + sum of lambda * guidance term. Wrapped by DDP or FSDP, compiled, and called; never subclassed.

    Args:
        student: the backbone that is trained.
        guidances: terms added to the flow loss; none is plain flow matching (vanilla).
        path: `LINEAR` or `COSINE`; a teacher must have been trained on the same one.
        times: how t is drawn: "systematic" (evenly spaced over the batch, one random offset), "uniform", "lognormal",
            "lognormal_standard" or "logitnormal" (`flow.TIMES`).
        drop: probability in [0, 1] that the student gets the null condition in place of a sample's own.
        cosine: factor of 1 - cos between predicted and true velocity, over the channels of each latent pixel, which is added
            to the squared error (LightningDiT, 2501.01423, section 4).
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
        drop: float = 0.1,
        cosine: float = 0.0,
    ) -> None:
        super().__init__()
        check_backbone(student, "the student")
        _check_options(path, times, drop, cosine)
        guidances = _checked_guidances(guidances)
        self.student = student
        self.guidances = nn.ModuleList(guidances)
        self.path, self.times, self.drop, self.cosine = path, times, drop, cosine
        self._unchecked = True  # labels on a GPU are checked in the first call only, since the check takes kernels
        if student.early is not None and not any(guidance.trains_early for guidance in guidances):
            raise ValueError(
                "model.early_block gives the student a second output, which this method does not train; omit it"
            )
        for guidance in guidances:
            wrong = [k for k in guidance.taps if not 1 <= k <= student.depth]
            if wrong:
                raise ValueError(
                    f"guidance {guidance.name} reads block {wrong[0]}, but the student has blocks 1..{student.depth}; "
                    "change the method's option for the block"
                )

    if TYPE_CHECKING:  # nn.Module declares that a call returns Any

        def __call__(self, batch: Batch, step: int | Tensor) -> tuple[Tensor, Report]: ...

    def forward(self, batch: Batch, step: int | Tensor) -> tuple[Tensor, Report]:
        """Loss of a step (0-d, float32) and its parts, detached and still on the device. ValueError for labels outside the
        classes, latents of another shape, and a student or guidance that returns anything else than declared.

        `step` is the number of the training step, from 0: guidances end by it (`Guidance.until_step`).
        A `step` that is a 0-d tensor is not read: then every guidance acts, and the caller retires those that have ended.
        Labels on the CPU are checked in every call; on a GPU their values are checked in the first, by the device.
        """
        if not isinstance(batch, Batch):
            raise ValueError(f"a batch is selftrans.Batch(latents, labels), not a {type(batch).__name__}")
        check_latents(batch.z0, self.student.shape)
        self.student.conditions.check_labels(batch.cond, batch.z0.shape[0], on_device=self._unchecked)
        if not torch.compiler.is_compiling():
            self._unchecked = False
        null = self.student.null(batch.cond)
        return self.losses(draw(batch, null, path=self.path, times=self.times, drop=self.drop), step)

    def losses(self, d: Draw, step: int | Tensor) -> tuple[Tensor, Report]:
        """Loss and report of a draw that was already made (`flow.draw`)."""
        d = d._replace(step=step)
        active = [g for g in self.guidances if isinstance(step, Tensor) or g.until_step is None or step < g.until_step]
        for g in active:
            rows = g.null_rows(d)
            if rows is not None:
                d = d._replace(dropped=where_cond(rows, d.null, d.dropped))
        taps = tuple(sorted({k for g in active for k in g.taps}))
        out = self.student(d.zt, d.t, d.dropped, taps=taps)
        _check_output(out, d.zt, self.student, taps)
        assert out.v is not None
        loss = F.mse_loss(out.v.float(), d.v.float())
        report = {"flow": loss.detach()}
        if self.cosine:
            direction = 1 - F.cosine_similarity(out.v.float(), d.v.float(), dim=1).mean()  # over C of (N, C, *S)
            loss = loss + self.cosine * direction
            report["flow/cosine"] = direction.detach()
        for g in active:
            term, details = _checked_term(g.name, g(d, out.feats))
            loss = loss + g.weight * term
            report |= {g.name: term.detach()} | {f"{g.name}/{key}": value.detach() for key, value in details.items()}
        return loss, report

    def watch(self, average: Backbone) -> None:
        """Give the student's moving average to every guidance; those with it as teacher keep it.

        The average is a copy of the student, updated in place by your loop after each step. Call it once, before training.
        """
        for guidance in self.guidances:
            guidance.watch(average)

    def retire(self, step: int) -> bool:
        """Drop the guidances that have ended by `step`, heads and teachers with them; true if any was dropped.

        Without it, a guidance that has ended costs no time, but its heads and its teacher stay in memory and in `state_dict()`,
        and its heads get no gradient, which DDP refuses: retire, and wrap again. Before `load_state_dict`, retire at the step
        of the checkpoint.
        """
        staying = [g for g in self.guidances if g.until_step is None or step < g.until_step]
        ended = len(staying) < len(self.guidances)
        if ended:
            self.guidances = nn.ModuleList(staying)
        return ended


def _checked_guidances(guidances: Iterable[Guidance] | None) -> tuple[Guidance, ...]:
    """The guidances of an iterable. ValueError unless each is a `Guidance` with a name that no other has."""
    if isinstance(guidances, Guidance):
        raise ValueError(f"guidances are a list, also of a single one: [{guidances.name}]")
    if guidances is None:
        raise ValueError("guidances are a list of Guidance objects, not None; () for none")
    listed = tuple(guidances)
    for guidance in listed:
        if not isinstance(guidance, Guidance):
            found = repr(guidance) if isinstance(guidance, type) else type(guidance).__name__
            raise ValueError(f"guidances are a list of Guidance objects, not of {found}; () for none")
        if not guidance.name:
            raise ValueError(
                f"{type(guidance).__name__} has no name: set one in the class, under which the log shows its term"
            )
        if guidance.name in LOGGED:
            raise ValueError(f"{type(guidance).__name__}.name '{guidance.name}' is that of another entry of the log")
    names = [guidance.name for guidance in listed]
    if len(set(names)) < len(names):
        raise ValueError(f"guidances are called {', '.join(names)}; give each a name of its own")
    return listed


def _check_options(path: Path, times: str, drop: float, cosine: float) -> None:
    """ValueError for an option of `Objective` out of range."""
    if isinstance(path, str):
        raise ValueError(f"path {path!r} must be a Path: one of selftrans.PATHS, which are {', '.join(PATHS)}")
    check_times(times)
    if not 0 <= drop <= 1 or not 0 <= cosine < math.inf:
        raise ValueError(f"drop {drop} must be in [0, 1], and cosine {cosine} a number from 0")


def _check_output(out: Output, x: Tensor, student: Backbone, taps: tuple[int, ...]) -> None:
    """ValueError unless a student returned the velocity of latents x (N, C, *S) and the tokens (N, T, D) after each tap.

    T is known for latents of the model's own shape only. Only shapes are read, so the host does not wait for a device.
    """
    name = type(student).__name__
    if not isinstance(out, Output):
        raise ValueError(f"{name}.forward must return an Output, not {type(out).__name__}")
    found = tuple(out.v.shape) if isinstance(out.v, Tensor) else out.v
    if found != tuple(x.shape):
        raise ValueError(f"{name} returned a velocity of shape {found}; expected that of its input, {tuple(x.shape)}")
    own = tuple(x.shape[1:]) == tuple(student.shape)
    for k in taps:
        if k not in out.feats:
            raise ValueError(f"{name} returned no features of block {k}; feats must hold each block of taps (1-based)")
        feature = tuple(getattr(out.feats[k], "shape", ()))
        expected = (x.shape[0], student.tokens if own else (*feature, 0, 0)[1], student.width)
        if feature != expected:
            raise ValueError(
                f"{name} returned features of shape {feature} after block {k}; expected (N, T, D) = {expected}: the tokens "
                "of the latent alone, without class, text and register tokens"
            )


def _checked_term(name: str, returned: Any) -> tuple[Tensor, Report]:
    """What a guidance returned. ValueError unless it is its term (0-d) and 0-d tensors for the log, by name."""
    if not isinstance(returned, tuple | list) or len(returned) != 2 or not isinstance(returned[1], dict):
        raise ValueError(
            f"the guidance {name} must return its term and a dict for the log, not a {type(returned).__name__}"
        )
    for what, value in (("term", returned[0]), *returned[1].items()):
        if not isinstance(value, Tensor) or value.dim():
            found = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(f"'{what}' of the guidance {name} must be a tensor without dimensions (0-d), not {found}")
    return returned[0], returned[1]
