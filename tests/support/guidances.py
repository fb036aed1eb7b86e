"""Small guidances of both stages for a stub student, and a random batch."""

import torch

from selftrans.methods.guidance import Frozen
from selftrans.methods.self_transcendence import SelfGuidance, Stage1, Stage2, StructureGuidance
from selftrans.types import Batch
from tests.support.stub import Stub

RANGE = (0.4, 0.7)
#: two inside, two exactly on the edges, three outside
TIMES = [0.1, 0.4, 0.55, 0.7, 0.9, 0.39, 0.41]
SHAPE = (2, 4, 4)


def data(n, shape=SHAPE, classes=7):
    g = torch.Generator().manual_seed(3)
    return Batch(torch.randn(n, *shape, generator=g), torch.randint(classes, (n,), generator=g))


def stage1(student, **options):
    return StructureGuidance(student, Stage1(**{"block": 2, "head_width": 8, **options}))


def stage2(student, teacher, **options):
    return SelfGuidance(student, teacher, Stage2(**{"student_block": 2, "head_width": 8, "scale": 3.0, **options}))


def frozen_stub(**options):
    return Frozen(Stub(abc=(1.25, 0.75, -0.5), **options), 3)
