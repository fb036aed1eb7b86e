"""What an objective checks of its parts: its options, its guidances, and what a student and a guidance return.

Only types and shapes are read, so the host does not wait for a device. Shape legend: N batch, T tokens, D width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor

from selftrans.flow import PATHS, Loss, Path
from selftrans.methods.guidance import Guidance, Report
from selftrans.types import Backbone, Output

#: entries of a log line besides the terms of guidances
LOGGED = (
    *("stage", "step", "loss", "flow", "grad_norm", "lr", "held_out_loss", "trained_loss"),
    *("seconds", "tflops", "skipped", "skips", "changed"),
)


def check_options(path: Path, drop: float, cosine: float, contrastive: float, loss: Any) -> None:
    """ValueError for an option of `Objective` out of range, and for a term of the velocity with another loss."""
    if isinstance(path, str):
        raise ValueError(f"path {path!r} must be a Path: one of selftrans.PATHS, which are {', '.join(PATHS)}")
    if not 0 <= drop <= 1 or not 0 <= cosine < math.inf:
        raise ValueError(f"drop {drop} must be in [0, 1], and cosine {cosine} a number from 0")
    if not 0 <= contrastive < 1:
        raise ValueError(f"contrastive {contrastive} must be in [0, 1)")
    if callable(loss) and (cosine or contrastive):
        raise ValueError("cosine and contrastive are parts of the flow loss, which loss= replaces; add them there")
    if not callable(loss) and loss not in get_args(Loss):
        raise ValueError(f"loss {loss!r} is unknown; choose one of {', '.join(get_args(Loss))}, or give a function")


def checked_prediction(student: Backbone) -> Loss:
    """What a student says that it predicts, as the loss of it. ValueError for anything else than velocity and noise."""
    if student.predicts not in ("velocity", "noise"):
        raise ValueError(
            f"{type(student).__name__}.predicts is {student.predicts!r}; set it to velocity or noise, or give Objective(loss=)"
        )
    return student.predicts


def knows_times(guidance: Guidance) -> bool:
    """Whether a guidance that selects by a range of t takes how times are drawn; one that does not expects uniform times."""
    return not guidance.selects or guidance.acts_in.selects or type(guidance).use_times is not Guidance.use_times


def warn_of_second_dropping(student: Backbone, drop: float) -> None:
    """Warn where a module of the student drops labels itself, as `LabelEmbedder` of DiT does in training."""
    for name, part in student.named_modules():
        own = getattr(part, "dropout_prob", 0) if hasattr(part, "embedding_table") else 0
        if drop and own:
            warnings.warn(
                f"the student's {name} drops labels with probability {own:g}, besides the objective's {drop:g}; set its "
                "dropout_prob to 0, or give Objective(drop=0)",
                stacklevel=3,
            )


def checked_guidances(guidances: Iterable[Guidance], student: Backbone) -> list[Guidance]:
    """The guidances. ValueError unless each is a `Guidance` with a name that no other has, on blocks that the student has, and
    one of them trains the student's second output, if it has one."""
    if isinstance(guidances, Guidance):
        raise ValueError(f"guidances are a list, also of a single one: [{guidances.name}]")
    listed = list(guidances) if isinstance(guidances, Iterable) else None
    if listed is None or not all(isinstance(each, Guidance) for each in listed):
        found = repr(guidances).partition("\n")[0]
        raise ValueError(f"guidances are a list of Guidance objects, and () for none, not {found:.100}")
    names = [each.name for each in listed]
    for each in listed:
        kind = type(each).__name__
        if not each.name:
            raise ValueError(f"{kind} has no name: set one in the class, under which the log shows its term")
        if each.name in LOGGED:
            raise ValueError(f"{kind}.name '{each.name}' is that of another entry of the log")
        if wrong := [k for k in each.taps if not 1 <= k <= student.depth]:
            raise ValueError(
                f"guidance {each.name} reads block {wrong[0]}, but the student has blocks 1..{student.depth}; change the "
                "method's option for the block"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"guidances are called {', '.join(names)}; give each a name of its own")
    if student.early is not None and not any(each.trains_early for each in listed):
        raise ValueError(
            "model.early_block gives the student a second output, which this method does not train; omit it"
        )
    return listed


def checked_cells(student: Backbone) -> int:
    """How many numbers of a latent a token covers. ValueError where the student's `patchify` and `grid` disagree."""
    cells = math.prod(student.shape) // student.tokens
    # patchify may use weights, and those may be on the meta device
    like = next(student.parameters(), torch.empty(0))
    with torch.no_grad():
        cut = tuple(student.patchify(like.new_zeros(1, *student.shape)).shape)
    if cut != (1, student.tokens, cells):
        raise ValueError(
            f"{type(student).__name__}.patchify cuts a latent of {tuple(student.shape)} into {cut}; expected "
            f"(N, T, cells) = {(1, student.tokens, cells)}, by its grid {tuple(student.grid)}"
        )
    return cells


def check_output(out: Output, x: Tensor, student: Backbone, taps: tuple[int, ...], *, velocity: bool = True) -> None:
    """ValueError unless a student returned the velocity of latents x (N, C, *S) and the tokens (N, T, D) after each tap.

    T is known for latents of the model's own shape only. Without `velocity` any tensor is accepted.
    """
    name = type(student).__name__
    if not isinstance(out, Output):
        raise ValueError(f"{name}.forward must return an Output, not {type(out).__name__}")
    found = tuple(out.v.shape) if isinstance(out.v, Tensor) else out.v
    if not isinstance(out.v, Tensor) or (velocity and found != tuple(x.shape)):
        raise ValueError(
            f"{name} returned a velocity of shape {found}; expected that of its input, {tuple(x.shape)}; for a model that "
            "predicts something else give Objective(loss=)"
        )
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


def checked_loss(loss: Any) -> Tensor:
    """What a loss function of the caller's returned. ValueError unless it is a tensor without dimensions."""
    if not isinstance(loss, Tensor) or loss.dim():
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"loss= must return a tensor without dimensions (0-d), such as the mean, not {found}")
    return loss


def checked_term(name: str, returned: Any) -> tuple[Tensor, Report]:
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
