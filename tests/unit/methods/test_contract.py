"""What an objective refuses: options out of range, wrong guidances, and what a student or a guidance may not return."""

import math

import pytest
import torch

from selftrans.methods.guidance import Guidance
from selftrans.methods.objective import Objective
from selftrans.types import Output
from tests.support.guidances import Ridge, data, frozen_stub, stage1, stage2
from tests.support.stub import Stub


def named(name):
    ridge = Ridge()
    ridge.name = name
    return ridge


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guidances": Ridge()}, r"guidances are a list, also of a single one: \[ridge\]$"),
        ({"guidances": None}, r"and \(\) for none, not None$"),
        ({"guidances": [Ridge]}, r"not \[<class '.*Ridge'>\]$"),
        ({"guidances": [Guidance(1.0, ())]}, "Guidance has no name: set one in the class"),
        ({"guidances": [named("loss")]}, "Ridge.name 'loss' is that of another entry of the log"),
        ({"guidances": [named("flow")]}, "Ridge.name 'flow' is that of another entry of the log"),
        ({"guidances": [named("changed")]}, "Ridge.name 'changed' is that of another entry of the log"),
        ({"path": "linear"}, "path 'linear' must be a Path: one of selftrans.PATHS, which are linear, cosine"),
        ({"times": "even"}, "times 'even' is unknown; choose one of systematic, uniform"),
        ({"drop": 1.5}, r"drop 1.5 must be in \[0, 1\]"),
        ({"drop": math.nan}, "drop nan must be"),
        ({"cosine": -1.0}, "cosine -1.0 a number from 0"),
        ({"contrastive": 1.0}, r"contrastive 1.0 must be in \[0, 1\)"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Objective(Stub(), **options)


class Altered(Stub):
    """A student whose output is changed by a function."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, *args, **options):
        return self.change(super().forward(*args, **options))


def with_register(out):
    """A token more, as of a model that returns its register tokens, too."""
    return Output(out.v, {k: torch.cat([h[:, :1], h], dim=1) for k, h in out.feats.items()})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda out: out.v, r"Altered\.forward must return an Output, not Tensor"),
        (lambda out: Output(None, out.feats), r"a velocity of shape None; expected that of its input, \(3, 2, 4, 4\)"),
        (lambda out: Output(out.v[:, :1], out.feats), r"a velocity of shape \(3, 1, 4, 4\); expected"),
        (lambda out: Output(out.v, {}), r"no features of block 2; feats must hold each block of taps \(1-based\)"),
        (with_register, r"shape \(3, 5, 8\) after block 2; expected \(N, T, D\) = \(3, 4, 8\): .* register tokens"),
        (lambda out: Output(out.v, {2: out.feats[2].flatten(1)}), r"shape \(3, 32\) after block 2; expected"),
        (lambda out: Output(out.v, {2: out.feats[2].mean()}), r"shape \(\) after block 2; expected"),
        (lambda out: Output(out.v, {2: [out.feats[2]]}), r"shape \(\) after block 2; expected"),
    ],
)
def test_output_of_another_shape_is_refused(change, message):
    """Of equal shapes for student and teacher, register tokens would be guided; a smaller velocity would be broadcast."""
    student = Altered(change)
    with pytest.raises(ValueError, match=message):
        Objective(student, [stage2(student, frozen_stub())])(data(3), 0)


@pytest.mark.parametrize(
    "returned, message",
    [
        (torch.tensor(1.0), "the guidance ridge must return its term and a dict for the log, not a Tensor"),
        ((torch.ones(4), {}), r"'term' of the guidance ridge must be .* \(0-d\), not of shape \(4,\)"),
        ((torch.tensor(1.0), {"norm": 2.0}), r"'norm' of the guidance ridge must be .* not a float"),
    ],
)
def test_wrong_returns_of_a_guidance_are_refused(returned, message, monkeypatch):
    monkeypatch.setattr(Ridge, "forward", lambda *_: returned)
    with pytest.raises(ValueError, match=message):
        Objective(Stub(), [Ridge()])(data(4), 0)


@pytest.mark.parametrize("block", [0, -1, 4])
def test_student_blocks_out_of_range_are_refused(block):
    student = Stub()
    for guidance in (stage1(student, block=block), Ridge(block=block)):
        with pytest.raises(ValueError, match=rf"reads block {block}, but the student has blocks 1..3"):
            Objective(student, [guidance])
    with pytest.raises(ValueError, match=rf"reads block {block}, but the student has blocks 1..3"):
        Objective(student, [stage2(student, frozen_stub(), student_block=block)])
