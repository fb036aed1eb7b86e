"""What a guidance is, and the parts that guidances are made of: the frozen teacher, heads, distances.

Guidance is composed: any subclass of `Guidance` can be handed to `Objective`.
Shape legend: N batch, M samples that a guidance computes, T tokens, D width, (C, *S) latent.
"""

from __future__ import annotations

import contextlib
import math
import operator
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selftrans.flow import Path, Times
from selftrans.methods.timestep_range import EVERYWHERE, TimestepRange
from selftrans.sections import Section
from selftrans.types import Backbone, Cond, Draw, cat_cond, check_backbone

Report = dict[str, Tensor]
Head = TypeVar("Head", bound=nn.Module)


class Guidance(nn.Module):
    """One extra loss term on the student's features. Its parameters are its heads, trained with the student.

    Everything that the objective and the trainer ask of a guidance is declared here. A subclass sets `name`, `weight`, `taps`
    and implements `forward`; the other attributes have defaults.
    A guidance whose teacher is the student's moving average takes it in `watch`, as `Frozen.live(average, block)`.
    """

    name: str = ""  #: prefix of its entries in the report, unique in an objective; a subclass sets it
    weight: float  #: lambda
    taps: tuple[int, ...]  #: student blocks whose features it reads (1-based)
    until_step: int | None  #: first step at which it no longer acts; None: never ends
    acts_in: TimestepRange  #: the range of t in which it acts; default: everywhere
    reads_features: bool = False  #: whether it wants `Batch.features`, the encoder features stored with the data
    teacher: Frozen | None  #: a frozen model that it runs, if any
    encoder_flops: int = 0  #: operations of its external encoder for one sample
    selects: bool = False  #: whether it computes only the samples in a range of t: how many depends on the drawn times
    trains_early: bool = False  #: whether it trains the student's second output (`Backbone.add_early`)

    def __init__(
        self,
        weight: float,
        taps: tuple[int, ...],
        *,
        until_step: int | None = None,
        acts_in: TimestepRange = EVERYWHERE,
    ) -> None:
        super().__init__()
        if not isinstance(taps, tuple | list):
            raise ValueError(f"taps are the student's blocks (1-based) in a tuple, such as (2,), not {taps!r}")
        self.weight, self.taps, self.until_step, self.acts_in = weight, tuple(taps), until_step, acts_in
        if acts_in.selects:  # a class without a range of its own may select otherwise
            self.selects = True
        self.teacher = None  # set here: an attribute of the class would hide a module of this name in a subclass
        #: maps the student's tokens (N, T, D) to the target; None without a head; an nn.ModuleList for several blocks
        self.head: Any = None

    if TYPE_CHECKING:  # nn.Module declares that a call returns Any

        def __call__(self, d: Draw, feats: dict[int, Tensor]) -> tuple[Tensor, Report]: ...

    def forward(self, d: Draw, feats: dict[int, Tensor]) -> tuple[Tensor, Report]:
        """The term before its weight, and what the log should show, all 0-d tensors on the device of the draw.

        feats: block -> (N, T, D) of each block in `taps`, with gradient, in the compute dtype: convert to float32 for an error.
        """
        raise NotImplementedError

    def acts(self, step: int | Tensor) -> bool:
        """Whether it acts at this step. A tensor is not read: then the caller has retired what has ended."""
        return isinstance(step, Tensor) or self.until_step is None or step < self.until_step

    def null_rows(self, d: Draw) -> Tensor | None:
        """Samples (N,), true where the student gets the null condition, besides those dropped. Default None: no others.

        Called before the student, once in a step, after everything in the draw has been drawn.
        """
        return None

    def use_times(self, times: Times, path: Path) -> None:
        """Take how the objective draws times, and its path. Default: `acts_in` counts its samples by them."""
        self.acts_in = self.acts_in.under(times, path)

    def watch(self, average: Backbone) -> None:
        """Take the student's moving average, which the trainer updates in place. Default: ignore it.

        Called once, before the first step: `self.teacher = Frozen.live(average, block)`. In a training loop of your own, call
        `Objective.watch`.
        """

    def cost(self, n: int) -> dict[str, int]:
        """How many of n samples pass through the head ("head"), and through a teacher or encoder ("teacher"), in one step.

        A sample whose true and null condition both pass through the teacher counts twice.
        """
        return {"head": n if self.head is not None else 0, "teacher": 0}


class Frozen:
    """A frozen teacher: a plain object, so that it is never optimised, averaged, wrapped or saved.

    It keeps blocks 1..`block` of a copy of `model` (of `model` itself with `in_place`), in eval mode, and moves to the data's
    device by itself. `dtype` is that of its parameters and of its products (None: parameters stay as they are, and products
    follow the caller's autocast); buffers and the residual sum along the blocks keep their precision, since guidance multiplies
    their rounding error by w. `source` says where its weights came from (path, sha256). ValueError for a block (1-based) that
    the model does not have, and for a model that is no `Backbone`.
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
        check_backbone(model, "the teacher")
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
        """A model that other code updates, as a teacher: neither copied nor truncated. Its parameters no longer require
        gradients, and it is in eval mode. ValueError as for `Frozen`."""
        check_backbone(average, "the moving average")
        if not 1 <= block <= average.depth:
            raise ValueError(f"teacher block {block} is outside the moving average's 1..{average.depth}")
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
        # not inference mode: its tensors cannot take part in a loss
        with torch.no_grad(), self._precision(zt.device.type):
            out = self.model(torch.cat([zt] * many), torch.cat([t] * many), cat_cond(*conds), taps=taps, stop=True)
        features = out.feats[taps[0]] if len(taps) == 1 else torch.cat([out.feats[k] for k in taps], dim=-1)
        return list(features.chunk(many, dim=0))

    def _precision(self, device: str) -> contextlib.AbstractContextManager[object]:
        """Products in `dtype`, whatever the caller's autocast; without a `dtype` as the caller has them."""
        if self.dtype in (torch.bfloat16, torch.float16):
            return torch.autocast(device, dtype=self.dtype)
        if self.dtype is None or not torch.amp.is_autocast_available(device):
            return contextlib.nullcontext()
        return torch.autocast(device, enabled=False)


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
    if not teacher.model.conditions.fits(student.conditions):
        raise ValueError(
            f"the teacher knows {teacher.model.conditions}, the student {student.conditions}; train one on the student's data"
        )


def remaining(step: int | Tensor, until_step: int | None, fraction: float) -> float | Tensor:
    """A factor: 1, and during the last `fraction` of the steps before `until_step` a linear fall to 0.

    For a `step` that is a tensor on a device the factor is 0-d float64 on it, and the host does not wait.
    """
    if until_step is None or not fraction:
        return 1.0
    if isinstance(step, Tensor):
        return ((until_step - step).double() / (fraction * until_step)).clamp(0.0, 1.0)
    return min(1.0, max(0.0, (until_step - step) / (fraction * until_step)))


def check_term(section: Section, weight: float, head_width: int = 1) -> None:
    """ValueError unless lambda is a number from 0 and the head has a width."""
    if not 0 <= weight < math.inf:
        raise ValueError(f"{section.key}.weight must be a number from 0, not {weight:g}")
    if head_width < 1:
        raise ValueError(f"{section.key}.head_width must be at least 1, not {head_width}")


def projector(width: int, out: int, hidden: int = 2048) -> nn.Sequential:
    """P: three linear layers with SiLU between (REPA's projector), freshly initialised."""
    return initialised(
        nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out))
    )


def initialised(head: Head) -> Head:
    """The head with the backbones' initialisation, as in REPA and the release of Self-Transcendence: Xavier, zero bias.

    torch's default would start its weights about 2.4 times smaller, and its output 4 to 5 times.
    """
    for parameter in head.parameters():
        (nn.init.xavier_uniform_ if parameter.dim() > 1 else nn.init.zeros_)(parameter)
    return head


def feature_error(prediction: Tensor, target: Tensor, norm: str) -> Tensor:
    """Per-sample distance (M,) of features (M, T, D), mean over tokens (and channels).

    norm: "cosine", 1 - cosine of each token; "layer", squared error to LayerNorm(target); any other, squared error to target.
    """
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
