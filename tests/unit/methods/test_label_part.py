"""The label's part of a target against means computed in loops, and its state in a run that is continued."""

import math

import numpy as np
import pytest
import torch

from selftrans.methods.guidance import Frozen
from selftrans.methods.label_part import LabelPart
from selftrans.methods.objective import Objective
from selftrans.methods.registry import stages
from selftrans.methods.self_transcendence import SelfGuidance, Stage2
from selftrans.recipes import recipe
from selftrans.train.memory_use import memory_use
from selftrans.types import Conditions
from tests.support.guidances import frozen_stub, stage2
from tests.support.stub import Stub, TextStub, handmade_draw, numbers

LABELS = Conditions("labels", 3)


def batches(count=4, rows=6, tokens=2, width=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        target, labels = torch.randn(rows, tokens, width, generator=g), torch.randint(3, (rows,), generator=g)
        yield target, labels, torch.rand(rows, generator=g) < 0.8


def test_targets_lose_their_label_mean_of_earlier_batches_and_keep_the_overall_mean():
    """All earlier valid targets are kept here in lists, and averaged anew for every batch."""
    part, earlier, kept = LabelPart(LABELS, 2, 3), [], 0.25
    for target, labels, valid in batches():
        result = part(target, labels, valid, kept)
        for i, y in enumerate(labels.tolist()):
            own = [x for x, label in earlier if label == y]
            removed = np.mean(own, axis=0) - np.mean([x for x, _ in earlier], axis=0) if own else 0.0
            np.testing.assert_allclose(numbers(result[i]), numbers(target[i]) - 0.75 * removed, rtol=1e-5, atol=1e-6)
        earlier += [(numbers(x), y) for x, y, v in zip(target, labels.tolist(), valid.tolist(), strict=True) if v]
    for y in range(3):
        own = [x for x, label in earlier if label == y]
        np.testing.assert_allclose(numbers(part.mean[y]), np.mean(own, axis=0), rtol=1e-5, atol=1e-6)
        assert part.count[y] == len(own)
    np.testing.assert_allclose(numbers(part.mean[3]), np.mean([x for x, _ in earlier], axis=0), rtol=1e-5, atol=1e-6)


def test_additive_label_code_is_removed_exactly():
    """f_g = a(picture) + b(label): with a of mean zero per label, a + mean of b remains, without a label part."""
    code = torch.tensor([-30.0, 10.0, 80.0]).view(3, 1, 1).expand(3, 2, 4)
    labels = torch.arange(3).repeat_interleave(4)
    content = torch.randn(6, 2, 4).repeat_interleave(2, dim=0) * torch.tensor([1.0, -1.0]).repeat(6)[:, None, None]
    part, valid = LabelPart(LABELS, 2, 4), torch.ones(12, dtype=torch.bool)
    torch.testing.assert_close(part(content + code[labels], labels, valid, 0.0), content + code[labels])
    torch.testing.assert_close(part(content + code[labels], labels, valid, 0.0), content + 20.0, rtol=1e-5, atol=1e-4)


def test_one_class_has_no_label_part():
    part, valid = LabelPart(Conditions("labels", 1), 2, 3), torch.ones(6, dtype=torch.bool)
    for target, _, _ in batches():
        result = part(target, torch.zeros(6, dtype=torch.long), valid, 0.0)
        torch.testing.assert_close(result, target, rtol=1e-5, atol=1e-6)


def test_targets_that_are_not_finite_do_not_change_the_means():
    part, labels = LabelPart(LABELS, 2, 3), torch.tensor([0, 1])
    target = torch.ones(2, 2, 3)
    target[0, 1, 2] = math.inf
    part(target, labels, torch.ones(2, dtype=torch.bool), 0.0)
    assert part.count.tolist() == [0, 1, 0, 1] and torch.isfinite(part.mean).all()


@pytest.mark.parametrize(("label_part", "step", "kept"), [("remove", 0, 0.0), ("decay", 2, 0.8), ("decay", 10, 0.0)])
def test_term_of_stage_2_has_the_target_without_the_label_part(label_part, step, kept):
    """The stub teacher's features hold c (1 - w) 7 + c w y, so its label code is exactly additive."""
    student, d = Stub(), handmade_draw([0.5] * 14)
    d = d._replace(cond=torch.arange(14) % 7, zt=d.zt[:7].repeat(2, 1, 1, 1), t=torch.full((14,), 0.5))
    settings = {"label_part": label_part, "until_step": 10, "timestep_range": None}
    g = stage2(student, frozen_stub(), **settings)
    g.head = torch.nn.Identity()
    g(d._replace(step=step), {2: torch.zeros(14, 4, 8)})
    term, _ = g(d._replace(step=step), {2: torch.zeros(14, 4, 8)})
    f_g = numbers(g.guided_features(d))
    means = np.array([(f_g[y] + f_g[y + 7]) / 2 for y in range(7)])
    targets = [f_g[i] - (1 - kept) * (means[i % 7] - f_g.mean(axis=0)) for i in range(14)]
    assert term.item() == pytest.approx(np.mean(np.square(targets)), rel=1e-5)


def test_padding_does_not_change_the_means():
    d = handmade_draw([0.3, 0.9, 0.5, 0.1, 0.75], even=True)  # one inside; the capacity is two
    g = stage2(Stub(), frozen_stub(), label_part="remove")
    g(d, {2: torch.zeros(5, 4, 8)})
    assert g.labels.count[-1] == 1 and g.labels.count[d.cond[2]] == 1


def test_no_value_is_read_on_the_host(monkeypatch):
    def trap(self, *_, **__):
        raise AssertionError("makes the host wait for the device")

    part, (target, labels, valid) = LabelPart(LABELS, 2, 3), next(batches())
    with monkeypatch.context() as patch:
        for name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "nonzero", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, trap)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            part(target, labels, valid, 0.0)
    np.testing.assert_allclose(numbers(part.mean[3]), numbers(target[valid]).mean(axis=0), rtol=1e-5, atol=1e-6)


def test_memory_of_the_means_is_announced():
    student = Stub()
    plain, removing = (Objective(student, [stage2(student, frozen_stub(), label_part=p)]) for p in ("keep", "remove"))
    before, after = (memory_use(each, student, None)["weights"] for each in (plain, removing))
    assert after - before == 4 * 8 * 4 * 8 + 4 * 8, (
        "the means of 7 labels and of all, T = 4 and D = 8, and their counts"
    )


@pytest.mark.parametrize("conditions", [Conditions("none"), Conditions("text", tokens=3, width=2)])
def test_data_without_labels_are_refused(conditions):
    student, teacher = (TextStub() if conditions.kind == "text" else Stub() for _ in range(2))
    student.conditions = teacher.conditions = conditions
    with pytest.raises(
        ValueError, match=r"stage2\.label_part needs labels, the data have .*; set stage2\.label_part keep"
    ):
        SelfGuidance(student, Frozen(teacher, 3), Stage2(student_block=2, head_width=4, label_part="remove"))


def test_other_numbers_of_tokens_are_refused():
    part = LabelPart(LABELS, 2, 3)
    with pytest.raises(ValueError, match="has means of 2 tokens, and this batch has 5; give data of one size"):
        part(torch.zeros(1, 5, 3), torch.tensor([0]), torch.ones(1, dtype=torch.bool), 0.0)


def test_means_are_not_sharded():
    config = recipe("digits").override({"stage2.label_part": "remove", "train.shard": True})
    with pytest.raises(ValueError, match=r"train\.shard does not go with stage2\.label_part"):
        stages(config)[1].guide(Stub(), Frozen(Stub(), 3))
