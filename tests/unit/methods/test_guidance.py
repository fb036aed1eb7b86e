"""The parts of a guidance: the frozen teacher, distances, the end of a term."""

import copy
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from selftrans.methods.guidance import (
    Frozen,
    Guidance,
    feature_error,
    projector,
    remaining,
)
from selftrans.methods.registry import METHODS, stages
from selftrans.models.sit import SiT
from selftrans.recipes import recipe
from selftrans.sampling.samplers import guided, ode
from tests.support.guidances import TIMES, data, frozen_stub, stage2
from tests.support.memory import freed
from tests.support.stub import Stub, handmade_draw


@pytest.mark.parametrize("in_place", [False, True])
def test_teacher_is_truncated_after_its_block_and_its_features_stay(in_place):
    torch.manual_seed(1)
    model = SiT((1, 8, 8), 10, width=16, depth=4, heads=2, patch=2)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    b = data(3, (1, 8, 8))
    t = torch.tensor([0.2, 0.5, 0.8])
    with torch.no_grad():
        full = model(b.z0, t, b.cond, taps=(2,))
    later, last = weakref.ref(model.blocks[2]), weakref.ref(model.final_layer)
    teacher = Frozen(model, 2, in_place=in_place)
    (feature,) = teacher(b.z0, t, b.cond)
    assert len(teacher.model.blocks) == 2 and teacher.model.final_layer is None
    if in_place:
        assert teacher.model is model and freed(later, last)
    else:  # the original model is unchanged
        assert len(model.blocks) == 4 and model.final_layer is not None
        assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())
        latents = ode(guided(model, b.cond, scale=2.0), b.z0, steps=2)
        assert latents.shape == b.z0.shape and latents.isfinite().all()
        nn.init.zeros_(model.blocks[0].mlp.fc1.weight)  # training it further does not change the teacher
        assert torch.equal(teacher(b.z0, t, b.cond)[0], feature)
    torch.testing.assert_close(feature, full.feats[2], rtol=0, atol=0)


def test_a_truncated_copy_takes_no_memory_for_the_later_blocks(monkeypatch):
    model = SiT((1, 8, 8), 10, width=16, depth=4, heads=2, patch=2)
    copied = []
    copy_parameter = nn.Parameter.__deepcopy__
    monkeypatch.setattr(
        nn.Parameter, "__deepcopy__", lambda self, memo: copied.append(self) or copy_parameter(self, memo)
    )
    kept = [p.shape for p in model.truncated(1).parameters()]
    assert [p.shape for p in copied] == kept and len(kept) < len(list(model.parameters()))


def test_teacher_moves_to_the_device_of_the_data():
    teacher, b = frozen_stub(), data(2)
    (feature,) = teacher(b.z0.to("meta"), torch.rand(2, device="meta"), b.cond.to("meta"))
    assert feature.device.type == "meta" and teacher.model.a.device.type == "meta"


def test_teacher_computes_in_its_dtype_and_gives_float32_targets():
    student = Stub()
    full, half = frozen_stub(), Frozen(Stub(abc=(1.25, 0.75, -0.5)), 3, dtype=torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in full.model.parameters()} == {torch.float32}
    d = handmade_draw(TIMES)
    d = d._replace(zt=d.zt.bfloat16())  # the stub, unlike SiT, does not cast its input
    targets = [stage2(student, teacher).guided_features(d) for teacher in (full, half)]
    assert {x.dtype for x in targets} == {torch.float32}
    torch.testing.assert_close(targets[1], targets[0], rtol=0.05, atol=0.2)
    model = SiT((1, 8, 8), 10, width=16, depth=2, heads=2, patch=2)
    teacher = Frozen(model, 2, dtype=torch.bfloat16)
    b = data(4, (1, 8, 8))
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    assert teacher(b.z0, torch.rand(4), b.cond)[0].dtype == torch.float32, "the residual sum is not rounded"


def test_precision_of_the_teacher_is_its_own_in_the_autocast_of_the_caller():
    torch.manual_seed(0)
    model, b, t = SiT((1, 8, 8), 10, width=16, depth=2, heads=2, patch=2), data(4, (1, 8, 8)), torch.rand(4)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    chosen, free = Frozen(model, 2, dtype=torch.float32), Frozen(model, 2)
    (expected,) = free(b.z0, t, b.cond)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,), (rounded,) = chosen(b.z0, t, b.cond), free(b.z0, t, b.cond)
    assert torch.equal(found, expected)
    assert not torch.equal(rounded, expected), "without a dtype the caller's autocast decides"


def test_guided_features_of_a_bf16_teacher_are_as_exact_as_autocast():
    torch.manual_seed(0)
    model = SiT((4, 8, 8), 10, width=64, depth=6, heads=2, patch=2)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.1 if "adaLN" in name else 0.02)
    b, t = data(8, (4, 8, 8)), torch.rand(8) * 0.3 + 0.4

    def features(teacher, reduced=False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=reduced):
            f_c, f_u = (f.float() + 0 for f in teacher(b.z0, t, b.cond, torch.full_like(b.cond, 10)))
        return f_u + 30 * (f_c - f_u)

    exact = features(Frozen(copy.deepcopy(model), 6))
    half = features(Frozen(copy.deepcopy(model), 6, dtype=torch.bfloat16), reduced=True)
    usual = features(Frozen(copy.deepcopy(model), 6), reduced=True)
    wrong, allowed = ((x - exact).norm() / exact.norm() for x in (half, usual))
    assert 0 < wrong < 2 * allowed and wrong < 0.02  # with the sum in bfloat16 it is 0.1 and more


@pytest.mark.parametrize("block", [0, -1, 4])
def test_teacher_blocks_out_of_range_are_refused(block):
    with pytest.raises(ValueError, match=rf"teacher block {block} is outside the teacher's 1..3"):
        Frozen(Stub(), block)


@pytest.mark.parametrize(
    "other", [{"patch": 1}, {"shape": (2, 8, 8)}, {"shape": (1, 4, 4)}, {"shape": (2, 8, 8), "patch": 4}]
)
def test_teacher_of_other_latents_or_patches_is_refused(other):
    with pytest.raises(ValueError, match=r"the teacher reads latents .* as .* tokens, the student"):
        stage2(Stub(), frozen_stub(**other))


def test_heads_start_with_xavier_weights_and_zero_biases():
    head = projector(64, 48, hidden=256)
    layers = [module for module in head if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(64, 256), (256, 256), (256, 48)]
    for layer in layers:
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))  # Xavier, uniform
        assert 0.98 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()


@pytest.mark.parametrize("method", METHODS)
def test_heads_of_every_method_start_with_xavier_weights_and_zero_biases(method):
    config = recipe("digits").override({"method": method})
    student, teacher = (SiT((1, 8, 8), 10, width=16, depth=6, heads=2, patch=2) for _ in range(2))
    for stage in stages(config):
        encoder = SimpleNamespace(grid=(4, 4), width=24, flops=0, encode=None) if stage.encoder else None
        given = Frozen(teacher, stage.teacher.block(6)) if stage.teacher else encoder
        for guidance in stage.guide(student, given):
            heads = [module for module in guidance.modules() if hasattr(module, "weight") and module.weight is not None]
            heads = [
                module for module in heads if torch.is_tensor(module.weight)
            ]  # a guidance has a weight, too: a number
            assert bool(heads) is (guidance.head is not None)
            for head in heads:
                rows, columns = head.weight.shape
                bound = math.sqrt(6 / (rows + columns))
                assert 0.95 * bound < head.weight.abs().max() <= bound and not head.bias.any()


@pytest.mark.parametrize(("norm", "expected"), [("none", 5.0), ("layer", 1.0), ("cosine", 1 - 1 / math.sqrt(10))])
def test_feature_error_by_hand(norm, expected):
    """One sample, one token: prediction (0, 0) or, for the cosine, (1, 0); target (1, 3), normalised (-1, 1)."""
    prediction = torch.tensor([[[1.0 if norm == "cosine" else 0.0, 0.0]]])
    error = feature_error(prediction, torch.tensor([[[1.0, 3.0]]]), norm)
    assert error.shape == (1,) and error.item() == pytest.approx(expected, rel=1e-4)


def test_defaults_of_a_guidance():
    g = Guidance(0.5, (2,), until_step=3)
    assert (g.weight, g.taps, g.until_step) == (0.5, (2,), 3)
    assert (g.reads_features, g.teacher, g.encoder_flops, g.head) == (False, None, 0, None)
    assert g.cost(7) == {"head": 0, "teacher": 0} and g.watch(Stub()) is None
    g.head = nn.Identity()
    assert g.cost(7) == {"head": 7, "teacher": 0}
    with pytest.raises(NotImplementedError):
        g(handmade_draw(TIMES), {})


def test_teacher_of_another_guidance_may_be_any_module():
    g = Guidance(0.5, (2,))
    g.teacher = nn.Identity()
    assert isinstance(g.teacher, nn.Identity)


@pytest.mark.parametrize(
    ("until_step", "fraction", "values"),
    [
        (10, 0.5, {0: 1.0, 5: 1.0, 6: 0.8, 9: 0.2, 10: 0.0, 12: 0.0}),
        (8, 1.0, {0: 1.0, 2: 0.75, 6: 0.25}),
        (8, 0.0, {0: 1.0, 7: 1.0}),
        (None, 0.0, {0: 1.0, 10**9: 1.0}),
    ],
)
def test_remaining_share_by_hand(until_step, fraction, values):
    assert {step: remaining(step, until_step, fraction) for step in values} == pytest.approx(values)
    for step in values:  # the same number for a step that is on the device
        share = torch.as_tensor(remaining(torch.tensor(step), until_step, fraction), dtype=torch.float64)
        assert float(share) == remaining(step, until_step, fraction)


def test_block_of_a_teacher_may_be_an_integer_of_numpy():
    frozen = Frozen(Stub(), np.int64(1))
    assert type(frozen.block) is int and frozen.block == 1
    with pytest.raises(ValueError, match=r"teacher block 9 is outside the teacher's 1\.\."):
        Frozen(Stub(), np.int64(9))


@pytest.mark.parametrize("make", [Frozen, Frozen.live])
def test_teacher_that_is_no_backbone_or_has_no_such_block_is_refused(make):
    with pytest.raises(
        ValueError,
        match="is no complete backbone: 'AveragedModel' object has no attribute 'depth'; give the model that it wraps",
    ):
        make(AveragedModel(Stub()), 2)
    with pytest.raises(ValueError, match="is no complete backbone: 'dict' object has no attribute 'depth'; subclass"):
        make(dict(Stub().state_dict()), 2)
    with pytest.raises(ValueError, match=r"teacher block 4 is outside .* 1\.\.3"):
        make(Stub(), 4)


def test_taps_are_a_tuple():
    assert Guidance(1.0, [1, 2]).taps == (1, 2)
    with pytest.raises(
        ValueError, match=r"taps are the student's blocks \(1-based\) in a tuple, such as \(2,\), not 2"
    ):
        Guidance(1.0, 2)
