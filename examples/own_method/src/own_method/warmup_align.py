"""A method with two stages. `warmup`: a block learns smoothed data. `align`: a new student is aligned with that model.

    warmup  L = L_flow + lambda mean | W h_s(z_t, t, y) - patchify(smooth(z0)) |²
    align   L = L_flow + lambda mean (1 - cos(P h_s(z_t, t, y), h_k(z_t', t', y)))     t' = max(0, t - cleaner)

h_k is a deeper block of the frozen warmup model, for the same data and noise at a time with less noise.
"""

from __future__ import annotations

from own_method.align_settings import Align
from own_method.guidances import Coarse, Follow
from selftrans.config import RunConfig
from selftrans.flow import PATHS
from selftrans.methods.guidance import Frozen, Guidance
from selftrans.methods.spec import MethodSpec, Stage, TeacherSpec
from selftrans.types import Backbone


def stages(config: RunConfig) -> list[Stage]:
    """The stages in the order in which they are trained."""
    align, path = config.section(Align), PATHS[config.train.path]

    def warm_up(student: Backbone, teacher: None) -> list[Guidance]:
        return [Coarse(student, align)]

    def follow(student: Backbone, teacher: Frozen) -> list[Guidance]:
        return [Follow(student, teacher, align, path)]

    steps = align.steps or max(1, config.train.steps // 2)
    teacher = TeacherSpec("warmup", align.deeper_block, "ema", given=align.teacher, option="align.teacher")
    return [
        # stream 1: other initial weights and noise than the student's, under the same seed
        Stage("warmup", steps, warm_up, (Align,), stream=1),
        Stage("align", config.train.steps, follow, (Align,), teacher),
    ]


WARMUP_ALIGN = MethodSpec("warmup_align", "warm-up and align", stages, (Align,))
