"""The training objective: one draw, one student forward, the flow loss, and each guidance's term added to it.

Guidance is composed, never inherited: any nn.Module with the fields of `Guidance` can be handed to `Objective`.
Shape legend: N batch, M samples that a guidance looks at, T tokens, D width, (C, H, W) latent.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selftrans.flow import LINEAR, Path, draw
from selftrans.types import Backbone, Batch, Cond, Draw, cat_cond

Report = dict[str, Tensor]
#: per-sample gate on t: closed range and how it acts (see `gate`)
RANGE_MODES = ("select", "scale")


class Guidance(Protocol):
    """One extra loss term on the student's features: an nn.Module, whose parameters are its heads."""

    name: str  #: prefix of its entries in the report, unlike any other's
    weight: float  #: lambda
    taps: tuple[int, ...]  #: student blocks whose features it reads
    until_step: int | None  #: first step at which it no longer acts; None = never ends

    def forward(self, d: Draw, feats: dict[int, Tensor], /) -> tuple[Tensor, Report]:
        """The term before its weight, and what the log should show, all 0-d tensors."""
        ...

    def cost(self, n: int) -> dict[str, int]:
        """How many of n samples meet the head ("head") and pass through a teacher ("teacher") in one step."""
        ...


class Frozen:
    """A frozen teacher: a plain object, so it is never optimised, averaged, wrapped or saved.

    It keeps blocks 1..`block` of `model` (with `cut`, in place, where the model knows `truncate`), in eval mode, and moves
    to the data by itself. `dtype` is that of its parameters and of its products (None: as they are); buffers and the sum
    along the blocks stay as they are, since guidance multiplies what rounding the sum leaves by w. `source` says where
    its weights came from (path, sha256).
    """

    def __init__(
        self,
        model: Backbone,
        block: int,
        *,
        dtype: torch.dtype | None = None,
        source: dict[str, Any] | None = None,
        cut: bool = True,
    ) -> None:
        if not 1 <= block <= model.depth:
            raise ValueError(
                f"teacher block {block} is outside the teacher's 1..{model.depth}; change stage2.teacher_block"
            )
        assert isinstance(model, nn.Module)
        if cut and hasattr(model, "truncate"):
            model.truncate(block)  # type: ignore[operator]
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype=dtype)
        self.model: Any = model.requires_grad_(False).eval()
        self.block, self.width, self.dtype, self.source = block, model.width, dtype, source or {}

    def __call__(self, zt: Tensor, t: Tensor, *conds: Cond) -> list[Tensor]:
        """h_k(zt, t, cond) for each condition, side by side in one forward pass: list of (N, T, D)."""
        if next(self.model.parameters()).device != zt.device:
            self.model.to(zt.device)
        many = len(conds)
        reduced = self.dtype not in (None, torch.float32)
        amp = torch.autocast(zt.device.type, dtype=self.dtype) if reduced else contextlib.nullcontext()
        with torch.inference_mode(), amp:
            out = self.model(zt.repeat(many, 1, 1, 1), t.repeat(many), cat_cond(*conds), taps=(self.block,), stop=True)
        return list(out.feats[self.block].chunk(many, dim=0))


class Gate(NamedTuple):
    """Which samples a guidance looks at, and what each one's error counts in the batch's term."""

    rows: Tensor | None  #: (M,) positions in the batch; None = all, in order
    gain: Tensor  #: (M,) the term is sum(gain * per-sample error)

    def take(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x[self.rows]

    def mean(self, error: Tensor) -> Tensor:
        """Term of a per-sample error (M,)."""
        return (self.gain * error).sum(dim=0)


def capacity(n: int, timestep_range: tuple[float, float]) -> int:
    """Most systematic times of a batch of n that lie in [a, b]: ceil(n (b - a)), at least one.

    Where n (b - a) is whole, one more lies inside only if the offset hits an edge to the last bit (once in millions of
    steps); it is left out then.
    """
    a, b = timestep_range
    return min(n, max(1, math.ceil(n * (b - a) - 1e-6)))


def gate(d: Draw, timestep_range: tuple[float, float] | None, mode: str) -> Gate:
    """The three timestep modes.

    None: every sample counts 1 / N. `select`: a sample counts 1 / N if a <= t <= b, else nothing, and only the selected
    ones are computed. `scale`: every sample counts (fraction of the batch inside [a, b]) / N, which is what the authors'
    released code computes (a mask of shape (N, 1, 1, 1) times a loss of shape (N,)).
    """
    n = d.t.shape[0]
    if timestep_range is None:
        return Gate(None, torch.full_like(d.t, 1 / n))
    a, b = timestep_range
    inside = (a <= d.t) & (d.t <= b)
    if mode == "scale":
        return Gate(None, (inside.float().mean(dim=0) / n).expand(n))
    assert mode == "select"
    if d.even:  # static shape, no host synchronisation: at most one row is padding, and its gain is zero
        rows = torch.argsort(inside.int(), dim=0, descending=True, stable=True)[: capacity(n, timestep_range)]
    else:  # at least one row, so that heads always take part in the backward pass of every process
        rows = torch.argsort(inside.int(), dim=0, descending=True, stable=True)[: max(1, int(inside.sum(dim=0)))]
    return Gate(rows, inside[rows].float() / n)


def selected(n: int, timestep_range: tuple[float, float] | None, mode: str) -> int:
    """How many of n samples `gate` lets through (expected, for independent times)."""
    return n if timestep_range is None or mode == "scale" else capacity(n, timestep_range)


def check_gate(timestep_range: tuple[float, float] | None, mode: str) -> None:
    """ValueError unless the range is increasing within [0, 1] and the mode is known."""
    if mode not in RANGE_MODES:
        raise ValueError(f"range_mode '{mode}' is unknown; choose one of {', '.join(RANGE_MODES)}")
    if timestep_range is not None and not 0 <= timestep_range[0] < timestep_range[1] <= 1:
        raise ValueError(f"timestep_range {timestep_range} must be two increasing numbers in [0, 1], or None")


def check_tokens(student: Backbone, teacher: Frozen) -> None:
    """ValueError unless student and teacher cut the same latents into the same tokens (widths may differ)."""
    theirs, ours = (teacher.model.shape, teacher.model.patch), (student.shape, student.patch)
    if tuple(theirs[0]) != tuple(ours[0]) or theirs[1] != ours[1]:
        raise ValueError(
            f"the teacher reads latents {theirs[0]} in patches of {theirs[1]}, the student {ours[0]} in patches of {ours[1]}; "
            "train a teacher with the student's latents and patch size"
        )
    known = [getattr(model, "num_classes", None) for model in (teacher.model, student)]
    if None not in known and known[0] != known[1]:
        raise ValueError(
            f"the teacher knows {known[0]} classes, the student {known[1]}; train a teacher on the student's data"
        )


def projector(width: int, out: int, hidden: int = 2048) -> nn.Sequential:
    """P: three linear layers with SiLU between (REPA's projector)."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)
    )


def feature_error(prediction: Tensor, target: Tensor, norm: str) -> Tensor:
    """Per-sample distance (M,) of features (M, T, D): squared error, the same to LayerNorm(target), or 1 - cosine."""
    if norm == "cosine":
        return (1 - F.cosine_similarity(prediction, target, dim=-1)).mean(dim=1)
    if norm == "layer":
        target = F.layer_norm(target, target.shape[-1:])
    return (prediction - target).square().mean(dim=(1, 2))


def token_norm(x: Tensor) -> Tensor:
    """Mean Euclidean norm of tokens (..., T, D), for the log."""
    return x.detach().float().norm(dim=-1).mean()


class Objective(nn.Module):
    """L = L_flow + sum of lambda * guidance term. Wrapped by DDP or FSDP, compiled, and called; never subclassed.

    Args:
        student: the backbone that is trained.
        guidances: terms added to the flow loss; none is plain flow matching (vanilla).
        path, times, drop: probability path, timestep sampler (`flow.TIMES`), probability of the null condition.
    """

    student: Any  #: a Backbone that is an nn.Module
    guidances: Any  #: nn.ModuleList of Guidance

    def __init__(
        self,
        student: Backbone,
        guidances: Sequence[Guidance] = (),
        *,
        path: Path = LINEAR,
        times: str = "systematic",
        drop: float = 0.1,
    ) -> None:
        super().__init__()
        assert isinstance(student, nn.Module)
        self.student = student
        self.guidances = nn.ModuleList(guidances)  # type: ignore[arg-type]
        self.path, self.times, self.drop = path, times, drop
        names = [guidance.name for guidance in guidances]
        if len(set(names)) < len(names):
            raise ValueError(f"guidances are called {', '.join(names)}; give each a name of its own")
        for guidance in guidances:
            wrong = [k for k in guidance.taps if not 1 <= k <= student.depth]
            if wrong:
                raise ValueError(
                    f"{guidance.name} reads block {wrong[0]}, but the student has blocks 1..{student.depth}"
                )

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, Report]:
        """Loss of a step (0-d, float32) and its parts, detached and still on the device."""
        null = self.student.null(batch.cond)
        return self.losses(draw(batch, null, path=self.path, times=self.times, drop=self.drop), step)

    def losses(self, d: Draw, step: int) -> tuple[Tensor, Report]:
        """The same for a draw already made."""
        active = [g for g in self.guidances if g.until_step is None or step < g.until_step]
        taps = tuple(sorted({k for g in active for k in g.taps}))
        out = self.student(d.zt, d.t, d.dropped, taps=taps)
        loss = F.mse_loss(out.v.float(), d.v.float())
        report = {"flow": loss.detach()}
        for g in active:
            term, details = g(d, out.feats)
            loss = loss + g.weight * term
            report |= {g.name: term.detach()} | {f"{g.name}/{key}": value for key, value in details.items()}
        return loss, report

    def watch(self, average: Any) -> None:
        """Hand the student's moving average, a Backbone, to the guidances that want it (those with a `watch`)."""
        for guidance in self.guidances:
            if hasattr(guidance, "watch"):
                guidance.watch(average)

    def retire(self, step: int) -> bool:
        """Drop the guidances that have ended by `step`, heads and teachers with them; true if any was dropped."""
        staying = [g for g in self.guidances if g.until_step is None or step < g.until_step]
        ended = len(staying) < len(self.guidances)
        if ended:
            self.guidances = nn.ModuleList(staying)
        return ended
