"""What a guidance is, and the parts that guidances are made of: the frozen teacher, the gate on t, heads, distances.

Guidance is composed: any subclass of `Guidance` can be handed to `Objective`.
Shape legend: N batch, M samples that a guidance looks at, T tokens, D width, (C, *S) latent.
"""

from __future__ import annotations

import contextlib
import math
import operator
from typing import Any, NamedTuple, Self, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selftrans.sections import Section
from selftrans.types import Backbone, Cond, Draw, cat_cond

Report = dict[str, Tensor]
#: per-sample gate on t: closed range and how it acts (see `gate`)
RANGE_MODES = ("select", "scale")


class Guidance(nn.Module):
    """One extra loss term on the student's features. Its parameters are its heads, trained with the student.

    Everything that the objective and the trainer ask of a guidance is declared here. A subclass sets `name`, `weight`, `taps`
    and implements `forward`; the other attributes have defaults.
    """

    name: str  #: prefix of its entries in the report, unlike any other's
    weight: float  #: lambda
    taps: tuple[int, ...]  #: student blocks whose features it reads (1-based)
    until_step: int | None  #: first step at which it no longer acts; None: never ends
    reads_features: bool  #: whether it wants `Batch.features`, the encoder features stored with the data
    teacher: Frozen | None  #: a frozen model that it runs, if any
    encoder_flops: int  #: operations of its external encoder for one sample
    selects: bool = False  #: whether it computes on the samples of a range of t alone, as many as the drawn times give
    trains_early: bool = False  #: whether it trains the student's second output (`Backbone.add_early`)

    def __init__(self, weight: float, taps: tuple[int, ...], *, until_step: int | None = None) -> None:
        super().__init__()
        self.weight, self.taps, self.until_step = weight, taps, until_step
        self.reads_features, self.teacher, self.encoder_flops = False, None, 0
        self.head: Any = None  #: what maps the student's tokens (N, T, D) to the target, if anything does

    def forward(self, d: Draw, feats: dict[int, Tensor]) -> tuple[Tensor, Report]:
        """The term before its weight, and what the log should show, all 0-d tensors."""
        raise NotImplementedError

    def null_rows(self, d: Draw) -> Tensor | None:
        """Samples (N,), true where the student gets the null condition, besides those dropped. Default None: no others.

        Called before the student, once in a step, after everything in the draw has been drawn.
        """
        return None

    def watch(self, average: Backbone) -> None:
        """Take the student's moving average, which the trainer updates in place. Default: it is not wanted."""

    def cost(self, n: int) -> dict[str, int]:
        """How many of n samples meet the head ("head") and pass through a teacher or encoder ("teacher") in one step."""
        return {"head": n if self.head is not None else 0, "teacher": 0}


class Frozen:
    """A frozen teacher: a plain object, so that it is never optimised, averaged, wrapped or saved.

    It keeps blocks 1..`block` of a copy of `model` (of `model` itself with `in_place`), in eval mode, and moves to the data's
    device by itself. `dtype` is that of its parameters and of its products (None: as they are); buffers and the residual sum
    along the blocks keep their precision, since guidance multiplies their rounding error by w. `source` says where its weights
    came from (path, sha256).
    """

    def __init__(
        self,
        model: Backbone,
        block: int,
        *,
        dtype: torch.dtype | None = None,
        source: dict[str, Any] | None = None,
        in_place: bool = False,
    ) -> None:
        try:
            number = operator.index(block)
        except TypeError:
            number = 0
        if not 1 <= number <= model.depth:
            raise ValueError(f"teacher block {block} is outside the teacher's 1..{model.depth}; change teacher_block")
        block = number
        if in_place:
            model.truncate(block)
            model.remove_early()
        else:
            model = model.truncated(block)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype=dtype)
        self.model: Backbone = model.requires_grad_(False).eval()
        self.block, self.width, self.dtype, self.source = block, model.width, dtype, source or {}

    @classmethod
    def live(cls, average: Backbone, block: int) -> Self:
        """A model that other code updates, as a teacher: neither copied nor truncated."""
        frozen = cls.__new__(cls)
        frozen.model = average.requires_grad_(False).eval()
        frozen.block, frozen.width, frozen.dtype, frozen.source = block, average.width, None, {}
        return frozen

    def __call__(self, zt: Tensor, t: Tensor, *conds: Cond, taps: tuple[int, ...] | None = None) -> list[Tensor]:
        """h_k(zt, t, cond) for each condition, in one forward pass of all of them: list of (N, T, D).

        `taps`: blocks up to `block`, whose features are put side by side, (N, T, K D); None: `block` alone.
        """
        taps = taps or (self.block,)
        if not conds or max(taps) > self.block:
            raise ValueError(
                f"the teacher has blocks 1 to {self.block}, and takes one condition at least; taps are {taps}"
            )
        if next(self.model.parameters()).device != zt.device:
            self.model.to(zt.device)
        many = len(conds)
        reduced = self.dtype not in (None, torch.float32)
        amp = torch.autocast(zt.device.type, dtype=self.dtype) if reduced else contextlib.nullcontext()
        with torch.no_grad(), amp:  # not inference mode: its tensors cannot take part in a loss
            out = self.model(torch.cat([zt] * many), torch.cat([t] * many), cat_cond(*conds), taps=taps, stop=True)
        features = out.feats[taps[0]] if len(taps) == 1 else torch.cat([out.feats[k] for k in taps], dim=-1)
        return list(features.chunk(many, dim=0))


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


def within(t: Tensor, timestep_range: tuple[float, float]) -> Tensor:
    """Which times (N,) lie in the closed range [a, b]."""
    a, b = timestep_range
    return (a <= t) & (t <= b)


def selective(timestep_range: tuple[float, float] | None, mode: str) -> TypeGuard[tuple[float, float]]:
    """Whether `gate` lets through the samples inside the range alone."""
    return timestep_range is not None and mode == "select"


def counted(t: Tensor, timestep_range: tuple[float, float] | None, mode: str) -> Tensor:
    """Which samples (N,) count in the term of `gate`, by their times."""
    return within(t, timestep_range) if selective(timestep_range, mode) else torch.ones_like(t, dtype=torch.bool)


def gate(d: Draw, timestep_range: tuple[float, float] | None, mode: str) -> Gate:
    """The three timestep modes.

    None: every sample counts 1 / N. `select`: a sample counts 1 / N if a <= t <= b, else nothing, and only the selected
    ones are computed. `scale`: every sample counts (fraction of the batch inside [a, b]) / N, which is what the authors'
    released code computes (a mask of shape (N, 1, 1, 1) times a loss of shape (N,)).
    """
    n = d.t.shape[0]
    if timestep_range is None:
        return Gate(None, torch.full_like(d.t, 1 / n))
    inside = within(d.t, timestep_range)
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
    return capacity(n, timestep_range) if selective(timestep_range, mode) else n


def check_gate(timestep_range: tuple[float, float] | None, mode: str) -> None:
    """ValueError unless the range is increasing within [0, 1] and the mode is known."""
    if mode not in RANGE_MODES:
        raise ValueError(f"range_mode '{mode}' is unknown; choose one of {', '.join(RANGE_MODES)}")
    if timestep_range is not None and not 0 <= timestep_range[0] < timestep_range[1] <= 1:
        raise ValueError(f"timestep_range {timestep_range} must be two increasing numbers in [0, 1], or None")


def ineffective_range_mode(timestep_range: tuple[float, float] | None) -> dict[str, str]:
    """What `Section.ineffective` says of a range mode."""
    return {} if timestep_range else {"range_mode": "without a timestep_range every sample counts"}


def check_tokens(student: Backbone, teacher: Frozen) -> None:
    """ValueError unless the teacher is frozen, and student and teacher cut the same latents into the same tokens (widths may
    differ)."""
    if not isinstance(teacher, Frozen):
        raise ValueError(f"the teacher must be frozen, not a {type(teacher).__name__}: give Frozen(model, block)")
    theirs, ours = (teacher.model.shape, teacher.model.grid), (student.shape, student.grid)
    if tuple(map(tuple, theirs)) != tuple(map(tuple, ours)):
        raise ValueError(
            f"the teacher reads latents {theirs[0]} as {theirs[1]} tokens, the student {ours[0]} as {ours[1]}; "
            "train a teacher with the student's latents and patch size"
        )
    if teacher.model.conditions != student.conditions:
        raise ValueError(
            f"the teacher knows {teacher.model.conditions}, the student {student.conditions}; train one on the student's data"
        )


def remaining(step: int | Tensor, until_step: int | None, fraction: float) -> float | Tensor:
    """1, and during the last `fraction` of the steps before `until_step` a linear fall to 0; a function of the step alone.

    0-d float64 on the device for a `step` that is a tensor there, without reading it.
    """
    if until_step is None or not fraction:
        return 1.0
    if isinstance(step, Tensor):
        return ((until_step - step).double() / (fraction * until_step)).clamp(0.0, 1.0)
    return min(1.0, max(0.0, (until_step - step) / (fraction * until_step)))


def check_term(section: Section, weight: float, head_width: int = 1) -> None:
    """ValueError unless lambda is a number from 0 and the head has a width."""
    if not 0 <= weight < math.inf or head_width < 1:
        raise ValueError(f"{section.key}.weight must be a number from 0 and {section.key}.head_width at least 1")


def projector(width: int, out: int, hidden: int = 2048) -> nn.Sequential:
    """P: three linear layers with SiLU between (REPA's projector), freshly initialised."""
    return initialised(
        nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out))
    )


def initialised(head: nn.Sequential) -> nn.Sequential:
    """The head with the backbones' initialisation, as in REPA and the release of Self-Transcendence: Xavier, zero bias.

    torch's default would start its weights about 2.4 times smaller, and its output 4 to 5 times.
    """
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return head


def feature_error(prediction: Tensor, target: Tensor, norm: str) -> Tensor:
    """Per-sample distance (M,) of features (M, T, D): squared error, the same to LayerNorm(target), or 1 - cosine."""
    if norm == "cosine":
        return (1 - F.cosine_similarity(prediction, target, dim=-1)).mean(dim=1)
    if norm == "layer":
        target = F.layer_norm(target, target.shape[-1:])
    return (prediction - target).square().mean(dim=(1, 2))


def spatial_norm(x: Tensor, gamma: float) -> Tensor:
    """(x - gamma mean) / std of features (M, T, D), mean and std over the tokens of a sample (iREPA, 2512.10794)."""
    return (x - gamma * x.mean(dim=1, keepdim=True)) / (x.std(dim=1, keepdim=True) + 1e-6)


def token_norm(x: Tensor) -> Tensor:
    """Mean Euclidean norm of tokens (..., T, D), for the log."""
    return x.detach().float().norm(dim=-1).mean()
