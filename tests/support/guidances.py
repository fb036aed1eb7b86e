"""Small guidances of both stages for a stub student, and a random batch."""

import torch
from torch import nn

from selftrans.methods.guidance import Frozen, Guidance
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


class Ridge(Guidance):
    """A guidance outside the package: the mean square of the features of one block times a learned number."""

    def __init__(self, name="ridge", block=1, weight=0.5, until_step=None):
        super().__init__(weight, (block,), until_step=until_step)
        self.name = name
        self.strength = nn.Parameter(torch.tensor(2.0))
        self.seen = []

    def forward(self, draw, feats):
        self.seen.append(draw)
        assert tuple(feats) == self.taps or set(self.taps) < set(feats)
        return self.strength * feats[self.taps[0]].square().mean(), {"norm": feats[self.taps[0]].detach().norm()}
