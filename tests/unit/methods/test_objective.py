"""The objective against arithmetic done here, on a backbone with three parameters."""

import math
import pickle
import weakref

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from selftrans.flow import COSINE, LINEAR
from selftrans.methods.guidance import Frozen
from selftrans.methods.objective import Objective
from selftrans.methods.timestep_range import TimestepRange
from selftrans.models.sit import SiT
from selftrans.types import Backbone, Batch, Conditions
from tests.support.guidances import RANGE, SHAPE, TIMES, Ridge, data, frozen_stub, stage1, stage2
from tests.support.memory import freed
from tests.support.stub import Stub, TextStub, handmade_draw, numbers

# ---- flow loss


def test_stub_is_a_backbone():
    assert isinstance(Stub(), Backbone) and isinstance(TextStub(), Backbone)


def test_flow_loss_equals_a_hand_computed_value():
    """z0 = 1, noise = 3, t = 1/2: z_t = 2, v = 2. The stub predicts 1·2 + 1·½ + 0.1·2 = 2.7, so the loss is 0.7² = 0.49."""
    d = handmade_draw([0.5], (1, 1, 1), num_classes=2)
    d = d._replace(z0=torch.ones(1, 1, 1, 1), noise=torch.full((1, 1, 1, 1), 3.0), dropped=torch.tensor([2]))
    d = d._replace(zt=torch.full((1, 1, 1, 1), 2.0), v=torch.full((1, 1, 1, 1), 2.0))
    loss, report = Objective(Stub((1, 1, 1), patch=1, num_classes=2, abc=(1.0, 1.0, 0.1))).losses(d, 0)
    assert loss.item() == pytest.approx(0.49, abs=1e-6) and report["flow"].item() == loss.item()
    assert set(report) == {"flow"}, "no guidance is vanilla"


def test_cosine_term_equals_a_hand_computed_value():
    """Predicted (z_t) 3, 4 and 0, 1 in the two channels of two pixels, true 4, 3 and 0, -2: cosines 24/25 and -1."""
    d = handmade_draw([0.5], (2, 1, 2), num_classes=2)
    v, true = torch.tensor([[[[3.0, 0.0]], [[4.0, 1.0]]]]), torch.tensor([[[[4.0, 0.0]], [[3.0, -2.0]]]])
    d = d._replace(zt=v, v=true, dropped=torch.tensor([2]))
    student = Stub((2, 1, 2), patch=1, num_classes=2, abc=(1.0, 0.0, 0.0))
    plain, _ = Objective(student).losses(d, 0)
    loss, report = Objective(student, cosine=0.5).losses(d, 0)
    expected = (0.04 + 2.0) / 2
    assert plain.item() == pytest.approx((1 + 1 + 0 + 9) / 4)
    assert report["flow/cosine"].item() == pytest.approx(expected, abs=1e-6)
    assert loss.item() == pytest.approx(plain.item() + 0.5 * expected) and report["flow"].item() == plain.item()


def test_contrastive_term_equals_a_hand_computed_value():
    """Predicted (z_t) 3 and 1, true 4 and -1: errors 1 and 4, to the velocity of the other sample 16 and 9."""
    d = handmade_draw([0.5, 0.25], (1, 1, 1), num_classes=2)
    zt, v = torch.tensor([3.0, 1.0]).view(2, 1, 1, 1), torch.tensor([4.0, -1.0]).view(2, 1, 1, 1)
    student = Stub((1, 1, 1), patch=1, num_classes=2, abc=(1.0, 0.0, 0.0))
    loss, report = Objective(student, contrastive=0.1).losses(d._replace(zt=zt, v=v), 0)
    assert report["flow"].item() == pytest.approx(2.5) and report["flow/contrastive"].item() == pytest.approx(12.5)
    assert loss.item() == pytest.approx(2.5 - 0.1 * 12.5)


def test_contrastive_training_is_regression_to_a_shifted_and_larger_velocity():
    """Up to a constant the loss is (1 - c) mean |v' - (v - c u) / (1 - c)|², u the velocity of another sample: same gradient.

    The mean of u does not depend on z_t, so the best prediction is that of flow matching less c times the mean velocity of all
    data, over 1 - c.
    """
    c, n = 0.05, 6
    d = handmade_draw([0.1, 0.3, 0.5, 0.6, 0.7, 0.9], (2, 4, 4), num_classes=2)
    student = Stub((2, 4, 4), num_classes=2)
    Objective(student, contrastive=c).losses(d, 0)[0].backward()
    found = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    others = [d.v[(i - 1) % n] for i in range(n)]
    target = torch.stack([(v - c * u) / (1 - c) for v, u in zip(d.v, others, strict=True)])
    ((1 - c) * (student(d.zt, d.t, d.dropped).v - target).square().mean()).backward()
    expected = [p.grad for p in student.parameters() if p.grad is not None]
    assert found and len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_contrastive_needs_another_sample_and_a_loss_of_the_velocity():
    one = handmade_draw([0.5], (1, 1, 1), num_classes=2)
    with pytest.raises(ValueError, match="compares a sample with another one of its batch, which has one only"):
        Objective(Stub((1, 1, 1), patch=1, num_classes=2), contrastive=0.1).losses(one, 0)
    with pytest.raises(ValueError, match="contrastive is for a loss of the velocity, and this one is of the noise"):
        Objective(Stub(), loss="noise", contrastive=0.1)


def test_loss_of_the_noise_equals_a_hand_computed_value():
    """z_t = 2, t = 1/4, noise 3, v = 4: the stub predicts 1·2 + 1·¼ + 0.1·2 = 2.45, which points to the noise z_t + (1 - t) v =
    3.8375. On the linear path the true noise is then z_t + ¾·4 = 5, so the loss is 1.1625²."""
    d = handmade_draw([0.25], (1, 1, 1), num_classes=2)._replace(dropped=torch.tensor([2]))
    d = d._replace(zt=torch.full((1, 1, 1, 1), 2.0), v=torch.full((1, 1, 1, 1), 4.0))
    student = Stub((1, 1, 1), patch=1, num_classes=2, abc=(1.0, 1.0, 0.1))
    loss, report = Objective(student, loss="noise").losses(d, 0)
    assert loss.item() == pytest.approx(1.1625**2, abs=1e-6) and report["flow"].item() == loss.item()
    student.predicts = "noise"
    assert Objective(student).losses(d, 0)[0].item() == loss.item()
    assert Objective(student, loss="velocity").losses(d, 0)[0].item() == pytest.approx(1.55**2, abs=1e-6)


def test_unknown_loss_is_refused():
    with pytest.raises(
        ValueError, match=r"loss 'eps' is unknown; choose one of own, velocity, noise, or give a function"
    ):
        Objective(Stub(), loss="eps")


def test_unknown_prediction_is_refused():
    """It would be trained on the error of its noise."""
    student = Stub()
    student.predicts = "epsilon"
    with pytest.raises(ValueError, match=r"Stub.predicts is 'epsilon'; set it to velocity or noise, or give Objective"):
        Objective(student)
    Objective(student, loss="velocity")


def test_flow_loss_and_its_gradient_by_hand():
    d, student = handmade_draw(TIMES, dropped=(1, 4)), Stub()
    loss, _ = Objective(student).losses(d, 0)
    loss.backward()
    a, b, c = 0.5, -1.5, 0.25
    total, slopes, count = 0.0, np.zeros(3), 0
    for i in range(len(TIMES)):
        y = 7 if i in (1, 4) else d.cond[i].item()
        for z, v in zip(numbers(d.zt[i]).flat, numbers(d.v[i]).flat, strict=True):
            residual = a * z + b * TIMES[i] + c * y - v
            total, count = total + residual**2, count + 1
            slopes += 2 * residual * np.array([z, TIMES[i], y])
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    for p, slope in zip((student.a, student.b, student.c), slopes / count, strict=True):
        assert p.grad.item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("path", [LINEAR, COSINE], ids=lambda p: p.name)
@pytest.mark.parametrize("times", ["systematic", "uniform", "lognormal"])
def test_loss_follows_from_the_drawn_point_and_time(path, times):
    """From (z_t, t) of the student and z0, noise, target and loss are computed by hand."""
    student, b = Stub(), data(9)
    loss, _ = Objective(student, path=path, times=times, drop=0.5)(b, 0)
    (call,) = student.calls
    zt, t, y, z0 = (numbers(x) for x in (call["x"], call["t"], call["cond"], b.z0))
    t, y = t.reshape(-1, 1, 1, 1), y.reshape(-1, 1, 1, 1)
    if path is LINEAR:
        v = (zt - z0) / t
    else:
        noise = (zt - np.cos(np.pi * t / 2) * z0) / np.sin(np.pi * t / 2)
        v = np.pi / 2 * (np.cos(np.pi * t / 2) * noise - np.sin(np.pi * t / 2) * z0)
    assert loss.item() == pytest.approx(((0.5 * zt - 1.5 * t + 0.25 * y - v) ** 2).mean(), rel=1e-3)


# ---- conditions


def test_labels_are_dropped_for_the_student_and_never_for_the_teacher():
    student, teacher, b = Stub((1, 2, 2)), frozen_stub(shape=(1, 2, 2)), data(20_000, (1, 2, 2))
    Objective(student, [stage2(student, teacher)], drop=0.1)(b, 0)
    seen, calls_of_teacher = student.calls[0], teacher.model.calls[0]
    null = seen["cond"] == 7  # the null label of the model; b has labels 0..6
    assert scipy.stats.binomtest(int(null.sum()), 20_000, 0.1).pvalue > 1e-3
    assert torch.equal(seen["cond"][~null], b.cond[~null])
    label_of = dict(zip(map(tuple, seen["x"].flatten(1).tolist()), b.cond.tolist(), strict=True))
    half = len(calls_of_teacher["cond"]) // 2
    true = torch.tensor([label_of[tuple(x)] for x in calls_of_teacher["x"][:half].flatten(1).tolist()])
    assert torch.equal(calls_of_teacher["cond"][:half], true), (
        "the conditional half gets the true label, dropped or not"
    )
    assert (calls_of_teacher["cond"][half:] == 7).all(), "the other half gets the null label"


@pytest.mark.parametrize(("drop", "expected"), [(0.0, None), (1.0, 7)])
def test_drop_probabilities_of_zero_and_one(drop, expected):
    student, b = Stub(), data(32)
    Objective(student, drop=drop)(b, 0)
    assert torch.equal(student.calls[0]["cond"], b.cond if expected is None else torch.full_like(b.cond, expected))


@pytest.mark.parametrize("classes", [0, 1, 7, 1000])
def test_null_label_comes_from_the_model(classes, monkeypatch):
    model, seen = SiT((1, 4, 4), classes, width=8, depth=2, heads=2, patch=2), []
    embed = model.y_embedder.forward
    monkeypatch.setattr(model.y_embedder, "forward", lambda labels: seen.append(labels) or embed(labels))
    Objective(model, drop=1.0)(Batch(torch.randn(4, 1, 4, 4), torch.zeros(4, dtype=torch.long)), 0)
    assert seen[0].tolist() == [classes] * 4


def test_condition_of_several_tensors_is_passed_unchanged():
    """Text-like: tokens, mask and pooled vector. Value by hand with f_c − f_u = c · (meaning − 0)."""
    n, student = 12, TextStub()
    teacher = Frozen(TextStub(abc=(1.0, 0.0, 2.0)), 3)
    cond = {
        "tokens": torch.randn(n, 5, 3),
        "mask": torch.arange(5)[None, :] < torch.randint(1, 6, (n, 1)),
        "pooled": torch.randn(n, 4),
    }
    objective = Objective(student, [stage2(student, teacher, timestep_range=None, scale=5.0)], drop=0.5)
    objective.guidances[0].head = nn.Identity()
    loss, report = objective(Batch(torch.randn(n, *SHAPE), cond), 0)
    seen, calls_of_teacher = student.calls[0], teacher.model.calls[0]
    dropped = ~seen["cond"]["pooled"].any(dim=1)
    assert 0 < dropped.sum() < n
    for name, value in cond.items():
        assert torch.equal(seen["cond"][name][~dropped], value[~dropped])
        assert torch.equal(calls_of_teacher["cond"][name][:n], value)
    assert not calls_of_teacher["cond"]["tokens"][n:].any() and not calls_of_teacher["cond"]["pooled"][n:].any()
    assert calls_of_teacher["cond"]["mask"][n:].tolist() == [[True] + [False] * 4] * n
    zt, t, total = numbers(seen["x"]), numbers(seen["t"]), 0.0
    for i in range(n):
        kept = [j for j in range(5) if cond["mask"][i, j]]
        meaning = np.mean([numbers(cond["tokens"])[i, j].mean() for j in kept]) + numbers(cond["pooled"])[i].mean()
        guided = zt[i] + 5.0 * 2.0 * meaning  # f_u = 1·z + 0·t + 2·0
        total += ((0.5 * zt[i] - 1.5 * t[i] - guided) ** 2).mean() / n
    assert report["self"].item() == pytest.approx(total, rel=1e-4)
    assert loss.item() == pytest.approx(report["flow"].item() + 0.5 * total, rel=1e-4)


# ---- the gate


def test_gate_selects_the_times_inside_of_drawn_batches():
    student = Stub((1, 2, 2))
    for n in (1, 5, 10, 33):
        for _ in range(20):
            ridge = Ridge()
            Objective(student, [ridge])(data(n, (1, 2, 2)), 0)
            span = TimestepRange(RANGE, "select")
            picked = span.gate(ridge.seen[0])
            inside = sum(np.float32(0.4) <= np.float32(t) <= np.float32(0.7) for t in ridge.seen[0].t.tolist())
            assert picked.gain.sum().item() == pytest.approx(inside / n, abs=1e-6)
            assert len(picked.rows) == span.computed(n)


# ---- composition


def test_guidances_add_up_and_share_one_draw():
    student, teacher, d = Stub(), frozen_stub(), handmade_draw(TIMES, dropped=(2,))
    first, second, third = stage1(student), stage2(student, teacher, weight=0.25), Ridge(weight=2.0)
    loss, report = Objective(student, [first, second, third]).losses(d, 0)
    alone = [Objective(student, [g]).losses(d, 0)[1] for g in (first, second, third)]
    for g, single in zip((first, second, third), alone, strict=True):
        assert report[g.name].item() == pytest.approx(single[g.name].item(), rel=1e-6)
    by_hand = report["flow"] + 0.5 * report["structure"] + 0.25 * report["self"] + 2.0 * report["ridge"]
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert len(student.calls) == 4 and student.calls[0]["taps"] == (1, 2), "one student forward serves all"
    assert student.calls[0]["stop"] is False


def test_teacher_and_student_get_the_same_point_and_time():
    student, teacher = Stub(), frozen_stub()
    Objective(student, [stage2(student, teacher, timestep_range=None)])(data(9), 0)
    seen, calls_of_teacher = student.calls[0], teacher.model.calls[0]
    for key in ("x", "t"):
        assert torch.equal(calls_of_teacher[key], torch.cat([seen[key], seen[key]]))
    assert calls_of_teacher["taps"] == (3,) and calls_of_teacher["stop"] is True, (
        "computation ends at the block of the teacher"
    )


def test_report_is_detached_scalars_under_known_keys():
    student = Stub()
    _, report = Objective(student, [stage1(student), stage2(student, frozen_stub())])(data(9), 0)
    heads = {f"{name}{end}" for name in ("structure", "self") for end in ("", "/feature_norm", "/target_norm")}
    assert set(report) == {"flow"} | heads
    assert all(x.dim() == 0 and not x.requires_grad and x.dtype == torch.float32 for x in report.values())


@pytest.mark.parametrize("given", [list, tuple, iter])
def test_guidance_outside_the_package_adds_its_term(given):
    student, ridge, d = Stub(), Ridge(block=1, weight=0.3, until_step=5), handmade_draw(TIMES)
    objective = Objective(student, given([ridge]))  # an iterator gives it once
    loss, report = objective.losses(d, 4)
    expected = 2.0 * ((0.5 * numbers(d.zt)) ** 2).mean()
    assert report["ridge"].item() == pytest.approx(expected, rel=1e-5) and "ridge/norm" in report
    assert loss.item() == pytest.approx(report["flow"].item() + 0.3 * expected, rel=1e-5)
    loss.backward()
    assert ridge.strength.grad.item() == pytest.approx(0.3 * expected / 2.0, rel=1e-5)
    assert set(objective.losses(d, 5)[1]) == {"flow"}


# ---- the end of guidance


def test_guidance_ends_at_its_step():
    student, teacher = Stub(), frozen_stub()
    objective = Objective(student, [stage2(student, teacher, until_step=3)])
    calls_of_teacher = []
    for step in range(5):
        objective.zero_grad(set_to_none=True)
        loss, report = objective(data(10), step)
        loss.backward()
        calls_of_teacher.append(len(teacher.model.calls))
        acts = step < 3
        assert ("self" in report) is acts
        assert all((p.grad is not None) is acts for p in objective.guidances[0].head.parameters())
        assert student.calls[-1]["taps"] == ((2,) if acts else ())
    assert calls_of_teacher == [1, 2, 3, 3, 3], "no teacher forward after the end"


def test_retire_keeps_the_student_and_frees_the_teacher():
    student, teacher = Stub(), frozen_stub()
    model, plain = weakref.ref(teacher.model), weakref.ref(teacher)
    objective = Objective(student, [stage2(student, teacher, until_step=3), stage1(student)])
    del teacher
    loss, _ = objective(data(10), 2)
    loss.backward()
    del loss
    before = {id(p) for p in student.parameters()}
    assert objective.retire(2) is False and len(objective.guidances) == 2 and model() is not None
    assert objective.retire(3) is True and [g.name for g in objective.guidances] == ["structure"]
    assert freed(model, plain), "nothing refers to the teacher"
    assert objective.retire(4) is False, "no further guidance ends"
    only = Objective(student, [stage2(student, frozen_stub(), until_step=0)])
    assert only.retire(0) is True
    assert set(only.state_dict()) == {"student.a", "student.b", "student.c"}
    assert {id(p) for p in only.parameters()} == before
    assert torch.isfinite(only(data(4), 1)[0])


# ---- the frozen teacher


def test_teacher_is_not_part_of_the_module():
    student, teacher = Stub(), frozen_stub()
    objective = Objective(student, [stage2(student, teacher)])
    theirs = {id(p) for p in teacher.model.parameters()}
    assert theirs and not theirs & {id(p) for p in objective.parameters()}
    assert id(teacher.model) not in {id(m) for m in objective.modules()}
    heads = {f"guidances.0.head.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert set(objective.state_dict()) == {"student.a", "student.b", "student.c"} | heads


def test_teacher_stays_frozen_and_in_eval_mode():
    student, teacher = Stub(), frozen_stub()
    objective = Objective(student, [stage2(student, teacher)])
    before = [p.clone() for p in teacher.model.parameters()]
    for mode in (True, False, True):
        objective.train(mode)
        objective(data(10), 0)[0].backward()
        assert not teacher.model.training and all(not m.training for m in teacher.model.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(teacher.model.parameters(), before, strict=True))
    assert student.calls[0]["graph"] and not any(call["graph"] for call in teacher.model.calls)


@pytest.mark.parametrize("w", [1.0, 3.0])
@pytest.mark.parametrize("norm", ["none", "layer", "cosine"])
def test_teacher_features_have_no_gradient(w, norm):
    student, d = Stub(), handmade_draw(TIMES)
    g = stage2(student, frozen_stub(), scale=w, target_norm=norm)
    target = g.guided_features(d)
    assert not target.requires_grad and not target.is_inference()
    Objective(student, [g]).losses(d, 0)[0].backward()
    assert all(p.grad.any() for p in g.head.parameters())


# ---- the complete step


def test_every_parameter_that_trains_gets_a_gradient():
    """Also in a batch without a sample in the range: DDP waits for a gradient of each head."""
    for even, t in ((False, [0.1, 0.2, 0.9]), (True, [0.1, 0.35, 0.8])):
        student = Stub()
        objective = Objective(student, [stage1(student), stage2(student, frozen_stub())])
        loss, report = objective.losses(handmade_draw(t, even=even), 0)
        loss.backward()
        assert report["structure"].item() == 0.0 and report["self"].item() == 0.0
        assert loss.item() == report["flow"].item() and math.isfinite(loss.item())
        for g in objective.guidances:
            assert all(p.grad is not None and not p.grad.any() for p in g.head.parameters())


def sit_objective(times="systematic", dtype=None):
    torch.manual_seed(2)
    shape, sizes = (1, 8, 8), {"width": 16, "heads": 2, "patch": 2}
    student, teacher = SiT(shape, 10, depth=4, **sizes), SiT(shape, 10, depth=3, **sizes)
    for p in [*student.parameters(), *teacher.parameters()]:
        nn.init.normal_(p, std=0.2)
    guidances = [stage1(student), stage2(student, Frozen(teacher, 2, dtype=dtype))]
    return Objective(student, guidances, times=times)


def test_step_with_even_times_reads_no_value_on_the_host(monkeypatch):
    """Reading a value on the host (item, bool, int, ...) raises; independent times show that this is detected."""

    def trap(name):
        def read(self, *args, **kwargs):
            raise AssertionError(f"Tensor.{name} makes the host wait for the device")

        return read

    def step(objective):
        loss, _ = objective(data(10, (1, 8, 8)), 0)
        loss.backward()

    even, independent = sit_objective(), sit_objective("uniform")
    with monkeypatch.context() as patch:
        patch.setattr(
            Conditions, "check_labels", lambda *_, **__: None
        )  # it reads values on the CPU only, as its test shows
        for name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "nonzero", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, trap(name))
        step(even)
        with pytest.raises(AssertionError, match="makes the host wait"):
            step(independent)


def test_labels_outside_the_classes_are_refused():
    objective, latents = sit_objective(), torch.zeros(2, 1, 8, 8)
    for label, message in {10: r"label 10 \(the null label, which", 11: "label 11 is", -1: "label -1 is"}.items():
        with pytest.raises(ValueError, match=rf"^{message}.* out of range: the model has 10 classes, so .* 0 to 9$"):
            objective(Batch(latents, torch.tensor([3, label])), 0)
    objective(Batch(latents, torch.tensor([0, 9], dtype=torch.int32)), 0)
    for labels in (torch.tensor([3]), torch.tensor([3.0, 4.0]), torch.tensor([[3], [4]])):
        with pytest.raises(ValueError, match=r"labels must be whole numbers \(torch.long\) of shape \(2,\)"):
            objective(Batch(latents, labels), 0)


@pytest.mark.parametrize(
    "labels, found",
    [(None, "NoneType"), ([0, 1], "list"), (np.array([0, 1]), "ndarray"), (torch.zeros(2, dtype=torch.uint8), "uint8")],
)
def test_conditions_of_another_type_are_refused(labels, found):
    with pytest.raises(
        ValueError, match=rf"(a condition is a tensor of labels|labels must be whole numbers).*not {found}"
    ):
        sit_objective()(Batch(torch.zeros(2, 1, 8, 8), labels), 0)


@pytest.mark.parametrize(
    "latents, message",
    [
        (torch.zeros(2, 3, 8, 8), r"must be \(N, 1, 8, 8\) with N at least 1 \(sides may differ\), not \(2, 3, 8, 8\)"),
        (torch.zeros(2, 8, 8), r"not \(2, 8, 8\)"),
        (torch.zeros(0, 1, 8, 8), r"with N at least 1 .*, not \(0, 1, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "latents must be a tensor of floats, not uint8; scale pixels"),
        (np.zeros((2, 1, 8, 8)), "a tensor of floats, not ndarray"),
    ],
)
def test_latents_of_another_shape_or_type_are_refused(latents, message):
    with pytest.raises(ValueError, match=message):
        sit_objective()(Batch(latents, torch.zeros(len(latents), dtype=torch.long)), 0)


def test_teacher_that_is_not_frozen_is_refused():
    student = SiT((1, 8, 8), 10, width=16, depth=3, heads=2, patch=2)
    with pytest.raises(ValueError, match=r"the teacher must be frozen, not a SiT: give Frozen\(model, block\)"):
        stage2(student, student)
    frozen = Frozen(student, 2)
    for taps, conds in (((3,), (torch.zeros(1, dtype=torch.long),)), (None, ())):
        with pytest.raises(ValueError, match="the teacher has blocks 1 to 2, and takes one condition at least"):
            frozen(torch.zeros(1, 1, 8, 8), torch.zeros(1), *conds, taps=taps)


@pytest.mark.parametrize("path", [LINEAR, COSINE])
def test_pickled_objective_gives_the_same_loss(path):
    objective, b = sit_objective(), data(4, (1, 8, 8))
    objective.path = path
    again = pickle.loads(pickle.dumps(objective))
    losses = []
    for each in (objective, again):
        torch.manual_seed(0)
        losses.append(each(b, 0)[0])
    assert again is not objective and torch.equal(*losses)


def test_step_with_even_times_runs_on_meta_tensors():
    """Tensors without data: any operation that depends on a value fails."""
    with torch.device("meta"):
        student, teacher = (SiT((1, 8, 8), 10, width=16, depth=3, heads=2, patch=2) for _ in range(2))
        guidances = [stage1(student), stage2(student, Frozen(teacher, 2))]
        b = Batch(torch.empty(10, 1, 8, 8), torch.empty(10, dtype=torch.long))
        loss, _ = Objective(student, guidances)(b, 0)
        loss.backward()
        assert loss.device.type == "meta" and student.x_embedder.proj.weight.grad is not None
        with pytest.raises((RuntimeError, NotImplementedError)):
            Objective(student, guidances, times="uniform")(b, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_step_with_even_times_never_synchronises_a_gpu():
    objective = sit_objective().cuda()
    b = Batch(*(x.cuda() for x in data(10, (1, 8, 8))[:2]))
    objective(b, 0)[0].backward()  # the first call moves the teacher
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective(b, 1)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["teacher fp32", "teacher bf16"])
def test_autocast_keeps_losses_and_errors_in_float32(dtype):
    plain, mixed, b = sit_objective(), sit_objective(dtype=dtype), data(16, (1, 8, 8))
    outputs = []
    mixed.student.register_forward_hook(lambda _, __, out: outputs.append(out.v))
    d = handmade_draw(np.linspace(0.03, 0.97, 16).tolist(), (1, 8, 8), num_classes=10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, report = mixed.losses(d, 0)
        by_hand = ((numbers(outputs[0]) - numbers(d.v)) ** 2).mean()
        assert outputs[0].dtype == torch.bfloat16 and report["flow"].item() == pytest.approx(by_hand, rel=1e-6)
        assert math.isfinite(mixed(b, 0)[0].item())
    loss.backward()
    assert loss.dtype == torch.float32 and {x.dtype for x in report.values()} == {torch.float32}
    gradients = [p.grad for p in mixed.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
    for name, value in plain.losses(d, 0)[1].items():
        assert report[name].item() == pytest.approx(value.item(), rel=0.1)


def test_error_of_a_bf16_head_is_computed_in_float32():
    student, d, kept = Stub(), handmade_draw(TIMES), []
    guidance = stage1(student, timestep_range=None)
    guidance.head.register_forward_hook(lambda _, __, out: kept.append(out))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = Objective(student, [guidance]).losses(d, 0)[1]
    assert kept[0].dtype == torch.bfloat16
    target = numbers(d.v).reshape(7, 2, 2, 2, 2, 2).transpose(0, 2, 4, 1, 3, 5).reshape(7, 4, 8)
    assert report["structure"].item() == pytest.approx(((numbers(kept[0]) - target) ** 2).mean(), rel=1e-6)


def test_labels_on_a_device_are_checked_by_it_in_the_first_call_alone(monkeypatch):
    """On a GPU the check starts kernels; the trainer's labels have been checked where the data were opened."""
    seen, objective, batch = [], sit_objective(), data(10, (1, 8, 8))
    monkeypatch.setattr(Conditions, "check_labels", lambda *_, **options: seen.append(options["on_device"]))
    for _ in range(3):
        objective(batch, 0)
    assert seen == [True, False, False]


def test_step_on_the_device_is_not_read_and_every_guidance_acts():
    objective, losses = sit_objective(), []
    for step in (3, torch.tensor(3)):
        torch.manual_seed(0)
        losses.append(objective(data(10, (1, 8, 8)), step))
    assert torch.equal(losses[0][0], losses[1][0]) and losses[0][1].keys() == losses[1][1].keys()


@pytest.mark.parametrize("batch", [(torch.zeros(1, *SHAPE), torch.zeros(1)), [torch.zeros(1, *SHAPE)]], ids=type)
def test_batch_of_another_type_is_refused(batch):
    with pytest.raises(ValueError, match=rf"selftrans.Batch\(latents, labels\), not a {type(batch).__name__}"):
        Objective(Stub())(batch, 0)


def test_student_that_is_no_backbone_is_refused():
    with pytest.raises(
        ValueError,
        match=r"the student is no complete backbone: 'AveragedModel' .* 'depth'; give the model that it wraps",
    ):
        Objective(AveragedModel(Stub()))
    with pytest.raises(
        ValueError, match=r"the student is no complete backbone: 'Linear' .* 'depth'; subclass selftrans.Backbone"
    ):
        Objective(nn.Linear(2, 2))
    incomplete = Stub()
    del incomplete.grid
    with pytest.raises(
        ValueError, match="the student is no complete backbone: 'Stub' object has no attribute 'grid'; subclass"
    ):
        Objective(incomplete)


def test_values_for_the_log_keep_no_graph(monkeypatch):
    monkeypatch.setattr(
        Ridge, "forward", lambda self, d, feats: (feats[self.taps[0]].mean(), {"x": feats[self.taps[0]].sum()})
    )
    _, report = Objective(Stub(), [Ridge()])(data(4), 0)
    assert not report["ridge/x"].requires_grad and report["ridge/x"].dim() == 0


# ---- a draw and a loss of the caller's


def test_times_and_noise_of_the_caller_by_hand():
    """z0 = 1, noise = 3: at t = 1/4 the point is 1.5, at t = 1 it is the noise; v = 2."""
    z0, noise, t = torch.ones(2, 1, 1, 1), torch.full((2, 1, 1, 1), 3.0), torch.tensor([0.25, 1.0], dtype=torch.float64)
    objective = Objective(Stub((1, 1, 1), patch=1, num_classes=2, abc=(1.0, 1.0, 0.0)), drop=0)
    d = objective.draw(Batch(z0, torch.tensor([0, 1])), t=t, noise=noise)
    assert d.zt.flatten().tolist() == [1.5, 3.0] and d.v.flatten().tolist() == [2.0, 2.0]
    assert d.t.dtype == torch.float32 and not d.even and d.noise is noise
    loss, _ = objective(d, 0)  # the stub predicts 1.5 + 0.25 and 3 + 1
    assert loss.item() == pytest.approx((0.25**2 + 2.0**2) / 2)
    cosine = Objective(Stub((1, 1, 1), patch=1, num_classes=2), path=COSINE, drop=1)
    d = cosine.draw(Batch(z0, torch.tensor([0, 1])), t=torch.full((2,), 0.5), noise=noise)
    assert d.zt.flatten().tolist() == pytest.approx([4 / math.sqrt(2)] * 2) and d.dropped.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"t": torch.tensor([1, 0, 1])},
            r"times must be floats of shape \(3,\) in \[0, 1\], .* not int64 of shape \(3,\)",
        ),
        ({"t": 0.5}, "not a float$"),
        ({"t": torch.rand(3, 1)}, r"not float32 of shape \(3, 1\)"),
        ({"t": torch.tensor([0.0, 20.0, 999.0])}, "of which 0 is data and 1 is noise, not 0 to 999"),
        ({"noise": torch.zeros(3, 1, 4, 4)}, r"noise must have the latents' shape \(3, 2, 4, 4\), not \(3, 1, 4, 4\)"),
    ],
)
def test_times_and_noise_of_another_shape_or_range_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Objective(Stub()).draw(data(3), **given)


def test_a_loss_of_the_caller_takes_the_place_of_the_flow_loss():
    student, d = Stub(), handmade_draw(TIMES)
    seen = []
    own = Objective(student, [stage1(student)], loss=lambda v, d: seen.append((v, d)) or (v - d.z0).abs().mean())
    loss, report = own(d, 0)
    v = student(d.zt, d.t, d.dropped).v
    assert torch.equal(seen[0][0], v) and torch.equal(seen[0][1].noise, d.noise)
    assert report["flow"].item() == pytest.approx((v - d.z0).abs().mean().item())
    assert loss.item() == pytest.approx((report["flow"] + 0.5 * report["structure"]).item())


def test_a_loss_of_the_caller_is_one_number_and_has_no_cosine_term():
    for wrong, found in (
        (lambda v, d: v.square().mean(dim=(1, 2, 3)), r"a tensor of shape \(4,\)"),
        (lambda v, d: 1, "int"),
    ):
        with pytest.raises(
            ValueError, match=rf"loss= must return a tensor without dimensions .* not {found}|not a {found}"
        ):
            Objective(Stub(), loss=wrong)(data(4), 0)
    for term in ("cosine", "contrastive"):
        with pytest.raises(ValueError, match="cosine and contrastive are parts of the flow loss, which loss= replaces"):
            Objective(Stub(), loss=lambda v, d: v.mean(), **{term: 0.5})


def test_output_with_other_channels_needs_a_loss_of_the_caller():
    class Variance(Stub):
        def forward(self, *args, **options):
            out = super().forward(*args, **options)
            return out._replace(v=torch.cat([out.v, out.v], dim=1))

    with pytest.raises(
        ValueError, match=r"velocity of shape \(4, 4, 4, 4\); .* predicts something else give Objective\(loss=\)"
    ):
        Objective(Variance())(data(4), 0)
    loss, _ = Objective(Variance(), loss=lambda v, d: v.chunk(2, dim=1)[0].square().mean())(data(4), 0)
    assert loss.isfinite()


def test_a_loss_of_the_caller_needs_an_output():
    class Nothing(Stub):
        def forward(self, *args, **options):
            return super().forward(*args, **options)._replace(v=None)

    with pytest.raises(ValueError, match="Nothing returned a velocity of shape None"):
        Objective(Nothing(), loss=lambda v, d: v.mean())(data(4), 0)
