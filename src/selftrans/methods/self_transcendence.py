"""Self-Transcendence (Sun et al., arXiv 2601.07773): a diffusion transformer guided by nothing but itself.

    Stage 1. The shallow block of a short run is guided by the structure of the VAE latents:
                 L = L_flow + lambda g(t) mean | W LN(P(h_s)) - patchify(target) |²
    Stage 2. That model, frozen, is the teacher of a new student. Classifier-free guidance is applied to its *features*:
                 f_g = f_u + w (f_c - f_u)        f_c = h_k(z_t, t, y),  f_u = h_k(z_t, t, null)
                 L = L_flow + lambda g(t) mean | P(h_s) - f_g |²

h_s is the student's hidden state after block s, P a small head, g(t) the timestep range (`TimestepRange`).
Both stages share the student's z_t and t; the student may see a dropped label, the teacher always sees the true one.
The settings, with the published values as defaults, are in `stage_settings.py`.
Shape legend: N batch, M samples in the range, T tokens, D width, (C, *S) latent.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from selftrans.flow import LINEAR, PATHS, Path, equal_snr_range
from selftrans.methods.contract import checked_cells
from selftrans.methods.conv_head import ConvHead
from selftrans.methods.guidance import (
    Frozen,
    Guidance,
    Report,
    check_tokens,
    feature_error,
    initialised,
    projector,
    remaining,
    spatial_norm,
    token_norm,
)
from selftrans.methods.label_part import LabelPart
from selftrans.methods.published_heads import published_heads
from selftrans.methods.spec import MethodSpec, Stage, TeacherSpec
from selftrans.methods.stage_settings import TEACHER_SETTINGS, Stage1, Stage2
from selftrans.methods.timestep_range import Gate, TimestepRange
from selftrans.sections import checked, fields_of
from selftrans.types import Backbone, Conditions, Draw, take_cond

if TYPE_CHECKING:
    from selftrans.config import RunConfig


class StructureGuidance(Guidance):
    """Stage 1: the shallow block predicts the target token by token.

    It reads the student's sizes and its `patchify`; the `Objective` that gets student and guidance trains the student.
    ValueError for settings that cannot work, and where `patchify` and `grid` disagree.
    """

    name = "structure"

    def __init__(self, student: Backbone, config: Stage1) -> None:
        config = checked(config, Stage1)
        acts_in = TimestepRange(config.timestep_range, config.range_mode)
        super().__init__(config.weight, (config.block,), acts_in=acts_in)
        self.config, self.patchify = config, student.patchify
        projection = projector(student.width, student.width, config.head_width)
        norm = nn.LayerNorm(student.width, elementwise_affine=False, eps=1e-6)
        to_cells = nn.Linear(student.width, checked_cells(student))
        self.head = initialised(nn.Sequential(projection, norm, to_cells))  # W LN(P(h))

    def forward(self, d: Draw, feats: dict[int, Tensor]) -> tuple[Tensor, Report]:
        picked = self.acts_in.gate(d)
        hidden = picked.take(feats[self.config.block])  # (M, T, D)
        target = self.patchify(picked.take(d.v if self.config.target == "velocity" else d.z0))  # (M, T, cells)
        error = (self.head(hidden).float() - target).square().mean(dim=(1, 2))  # (M,)
        return picked.mean(error), {"feature_norm": token_norm(hidden), "target_norm": token_norm(target)}

    def cost(self, n: int) -> dict[str, int]:
        return {"head": self.acts_in.computed(n), "teacher": 0}


class SelfGuidance(Guidance):
    """Stage 2: the student's block, or each of several, matches the teacher's guided features.

    Args:
        student: only its sizes are read; the `Objective` that gets student and guidance trains it.
        teacher: of the same latents, tokens, conditions and path; width and depth may differ. It must keep the blocks that
            `config` names, and `config.teacher_block` None means the last one that it keeps.
        config: its fields `teacher`, `teacher_weights`, `teacher_width`, `teacher_depth` and `teacher_lr` are for the commands,
            and not read here.
        path: that of the objective, by which `config.data_std` moves the range of times.
    Raises ValueError for settings that cannot work, and for a teacher that is not `Frozen` or does not fit.
    """

    name = "self"
    teacher: Frozen

    def __init__(self, student: Backbone, teacher: Frozen, config: Stage2, path: Path = LINEAR) -> None:
        config = checked(config, Stage2)
        given = TimestepRange(config.timestep_range, config.range_mode)  # checked as it was given
        acts_in = dataclasses.replace(given, span=equal_snr_range(given.span, config.data_std, path))
        check_tokens(student, teacher)
        students, teachers = matched_blocks(config, student.depth, teacher.block)
        super().__init__(config.weight, students, until_step=config.until_step, acts_in=acts_in)
        self.config, self.teacher = config, teacher
        self.teacher_taps = tuple(sorted(set(teachers)))
        self.target_index = [self.teacher_taps.index(k) for k in teachers]  # in `teacher_taps`, of each student block
        if config.target_norm == "spatial" and student.tokens < 2:
            raise ValueError(
                "stage2.target_norm spatial needs several tokens; set a smaller model.patch, or another norm"
            )
        self.grid_of = student.grid_of
        self.head, *more = [self._new_head(student, teacher) for _ in self.taps]
        self.more_heads = nn.ModuleList(more)  # of the second block and those after it
        self.labels = None
        if config.label_part != "keep":
            self.labels = LabelPart(student.conditions, student.tokens, teacher.width * len(self.teacher_taps))

    def _new_head(self, student: Backbone, teacher: Frozen) -> nn.Module:
        if self.config.head == "conv":
            return ConvHead(student.grid, student.width, teacher.width)
        return projector(student.width, teacher.width, self.config.head_width)

    def forward(self, d: Draw, feats: dict[int, Tensor]) -> tuple[Tensor, Report]:
        picked = self.acts_in.gate(d)
        hidden = [picked.take(feats[s]) for s in self.taps]  # (M, T, D) each
        guided = self._adjusted(self.guided_features(d, picked.rows), d, picked)
        targets = guided.split(self.teacher.width, dim=-1)  # (M, T, D of the teacher) each
        grid = (self.grid_of(d.zt.shape[2:]),) if self.config.head == "conv" else ()
        predictions = [head(h, *grid).float() for head, h in zip((self.head, *self.more_heads), hidden, strict=True)]
        pairs = zip(predictions, self.target_index, strict=True)
        errors = [feature_error(p, targets[i], self.config.target_norm) for p, i in pairs]  # (M,) each
        term = picked.mean(torch.stack(errors).mean(dim=0))
        share = remaining(d.step, self.until_step, self.config.fade)
        term = term * (share.to(term.dtype) if isinstance(share, Tensor) else share)
        norms = {"feature_norm": hidden, "target_norm": targets}
        return term, {name: torch.stack([token_norm(x) for x in found]).mean() for name, found in norms.items()}

    def null_rows(self, d: Draw) -> Tensor | None:
        if not self.config.null_rows:
            return None
        return self.acts_in.counts(d.t) & (torch.rand_like(d.t) < self.config.null_rows)

    def guided_features(self, d: Draw, rows: Tensor | None = None) -> Tensor:
        """f_g = f_u + w (f_c - f_u) for the given rows of the draw, (M, T, D) in float32, never with a gradient.

        Of several teacher blocks the features are side by side, (M, T, K D), in the order of `teacher_taps`.
        """
        zt, t, true, null = d.zt, d.t, d.cond, d.null
        if rows is not None:
            zt, t, true, null = zt[rows], t[rows], take_cond(true, rows), take_cond(null, rows)
        if self.config.scale == 1:  # f_g = f_c: the unconditional half would be multiplied by zero
            return self.teacher(zt, t, true, taps=self.teacher_taps)[0].float()
        f_c, f_u = (f.float() for f in self.teacher(zt, t, true, null, taps=self.teacher_taps))
        return f_u + self.config.scale * (f_c - f_u)

    def _adjusted(self, target: Tensor, d: Draw, picked: Gate) -> Tensor:
        """Guided features (M, T, K D) without the label's part and spatially normalised, if the settings ask for it."""
        if self.labels is not None:
            true = d.cond if picked.rows is None else take_cond(d.cond, picked.rows)
            kept = remaining(d.step, self.until_step, 1.0) if self.config.label_part == "decay" else 0.0
            target = self.labels(target, true, picked.gain > 0, kept)
        if self.config.target_norm == "spatial":
            target = spatial_norm(target, self.config.spatial_gamma)
        return target

    def cost(self, n: int) -> dict[str, int]:
        m = self.acts_in.computed(n)
        return {"head": m * len(self.taps), "teacher": m if self.config.scale == 1 else 2 * m}


def matched_blocks(config: Stage2, depth: int, kept: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Guided blocks of a student of `depth` blocks, and for each of them the block of a teacher that keeps `kept` of its own.

    ValueError for blocks that the teacher does not keep.
    """
    half = max(1, depth // 2) if config.student_block is None else config.student_block
    students = config.student_blocks or (half,)
    last = kept if config.teacher_block is None else config.teacher_block
    teachers = config.teacher_blocks or (last,) * len(students)
    if not 1 <= min(teachers) <= max(teachers) <= kept:
        raise ValueError(
            f"stage2.teacher_blocks {teachers} are beyond the teacher's {kept} blocks; give Frozen(model, block) with the "
            "deepest of them"
        )
    return students, teachers


# ---- the stages of a run


def default_teacher_block(depth: int) -> int:
    """Two thirds of the depth: 8 of 12, 16 of 24, 18 of 28, as published."""
    return max(1, depth * 2 // 3)


def _stage1(config: RunConfig, steps: int, **more: Any) -> Stage:
    def guide(student: Backbone, teacher: None) -> Sequence[Guidance]:
        return [StructureGuidance(student, config.section(Stage1))]

    # stream 1: a teacher that shared the student's initial weights would be easier to match than an independent one
    return Stage("stage1", steps, guide, (Stage1,), stream=1, **more)


def _teacher_settings(config: RunConfig) -> dict[str, Any]:
    """Settings in which stage 1 differs from the run, for a teacher of another size. ValueError for a model without them."""
    stage2, recompute = config.section(Stage2), config.train.recompute
    if stage2.teacher is not None:
        return {}
    chosen = {setting: getattr(stage2, name) for name, setting in TEACHER_SETTINGS.items()}
    found = {setting: value for setting, value in chosen.items() if value is not None}
    known = {name for name, *_ in fields_of(config.model)}
    for name in [setting.removeprefix("model.") for setting in found if setting.startswith("model.")]:
        if name not in known:
            raise ValueError(f"stage2.teacher_{name} is for models with a model.{name}; {config.model.name} has none")
        if config.init.path is not None:
            raise ValueError(
                f"stage2.teacher_{name} does not go with init.path: stage 1 starts from these weights, too"
            )
    depth = stage2.teacher_depth
    if depth is not None and not isinstance(recompute, bool):  # only blocks that the teacher has can be recomputed
        found["train.recompute"] = (
            min(recompute, depth) if isinstance(recompute, int) else tuple(k for k in recompute if k <= depth)
        )
    return found


def _self_transcendence(config: RunConfig) -> list[Stage]:
    stage1, stage2 = config.section(Stage1), config.section(Stage2)

    def guide(student: Backbone, teacher: Frozen) -> Sequence[Guidance]:
        if stage2.label_part != "keep" and config.train.shard:
            raise ValueError("train.shard does not go with stage2.label_part: each process would have other means")
        return [SelfGuidance(student, teacher, stage2, PATHS[config.train.path])]

    steps = max(1, config.train.steps // 2) if stage1.steps is None else stage1.steps
    block = max(stage2.teacher_blocks) if stage2.teacher_blocks else stage2.teacher_block
    teacher = TeacherSpec(
        stage="stage1",
        block=default_teacher_block if block is None else lambda depth: block,
        weights=stage2.teacher_weights,
        given=stage2.teacher,
        option="stage2.teacher",
    )
    return [
        _stage1(config, steps, settings=_teacher_settings(config)),
        Stage("stage2", config.train.steps, guide, (Stage2,), teacher),
    ]


def _settle(config: RunConfig, conditions: Conditions) -> RunConfig:
    """Without conditions f_c = f_u: set w = 1, which gives the same features at half the cost, and no null rows."""
    stage2 = config.section(Stage2)
    for name, plain in (("scale", 1.0), ("null_rows", 0.0)) if conditions.kind == "none" else ():
        if getattr(stage2, name) != plain:
            warnings.warn(
                f"the data have no classes: stage2.{name} is {plain:g} in place of {getattr(stage2, name):g}, which needs "
                "conditions; there is nothing to change",
                stacklevel=5,
            )
            config = config.override({f"stage2.{name}": plain})
    return config


#: stage 1 alone, to train.steps
STRUCTURE = MethodSpec(
    "structure",
    "stage 1 only",
    lambda config: [_stage1(config, config.train.steps)],
    (Stage1,),
    published_heads=published_heads,
)
SELF_TRANSCENDENCE = MethodSpec(
    "self_transcendence", "Self-Transcendence", _self_transcendence, (Stage1, Stage2), _settle
)
