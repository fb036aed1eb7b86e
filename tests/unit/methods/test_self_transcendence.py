"""Both stages against their formulas in loops, selection against a masked computation, and use as a library."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from selftrans import (
    PATHS,
    Batch,
    Draw,
    Frozen,
    Objective,
    SelfGuidance,
    SiT,
    Stage1,
    Stage2,
    StructureGuidance,
    flow,
)
from selftrans.methods.registry import stages
from selftrans.methods.self_transcendence import SELF_TRANSCENDENCE, default_teacher_block
from selftrans.models.sit import SIT_SIZES
from selftrans.recipes import recipe
from selftrans.types import Conditions
from tests.support.stub import (
    Stub,
    TextStub,
    gains_by_hand,
    handmade_draw,
    layer_norm_by_hand,
    mlp_by_hand,
    numbers,
    patches_by_hand,
)

RANGE = (0.4, 0.7)
MODES = [(RANGE, "select"), (RANGE, "scale"), (None, "select")]
TIMES = [0.1, 0.4, 0.55, 0.7, 0.9, 0.3]
STUDENT, TEACHER = (0.5, -1.5, 0.25), (1.25, 0.75, -0.5)  # a, b, c of the stubs


def structure(student, **options):
    return StructureGuidance(student, Stage1(**{"head_width": 5, **options}))


def guidance(student, teacher, **options):
    return SelfGuidance(student, teacher, Stage2(**{"student_block": 2, "head_width": 5, **options}))


def frozen(block=3, **options):
    return Frozen(Stub(abc=TEACHER, **options), block)


def random_parameters(head):
    """Draw all parameters of a head at random, biases too, so that a missing bias is detected; returns them as arrays."""
    for p in head.parameters():
        nn.init.normal_(p, std=0.5)
    return [numbers(p) for p in head.parameters()]


def student_feature(d, i, wide=1):
    """h_2 of the stub student for sample i, (T, D), by hand."""
    a, b, _ = STUDENT
    return np.tile(a * patches_by_hand(numbers(d.zt[i]), 2), (1, wide)) + b * TIMES[i]


# ---- stage 1


def patchify(x, patch):
    """Tokens (N, T, C patch²) of latents (N, C, H, W), by SiT."""
    return SiT(tuple(x.shape[1:]), 0, width=8, depth=1, heads=1, patch=patch).patchify(x)


def test_patchify_orders_patches_by_row_and_values_by_channel_row_column():
    image = torch.arange(32).view(1, 2, 4, 4).float()
    assert patchify(image, 2).tolist() == [
        [
            [0, 1, 4, 5, 16, 17, 20, 21],
            [2, 3, 6, 7, 18, 19, 22, 23],
            [8, 9, 12, 13, 24, 25, 28, 29],
            [10, 11, 14, 15, 26, 27, 30, 31],
        ]
    ]
    assert patches_by_hand(image[0].numpy(), 2).tolist() == patchify(image, 2)[0].tolist()
    assert patchify(image, 1).shape == (1, 16, 2) and patchify(image, 4).shape == (1, 1, 32)


def test_patchify_matches_the_tokens_of_the_backbone():
    """Token k of a SiT sees exactly the pixels of patch k."""
    model = SiT((2, 4, 4), 3, width=8, depth=1, heads=2, patch=2)
    quiet, image = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
    image[0, 1, 1, 2] = 1.0  # row 1, column 2: the second token
    changed = (model.x_embedder(image) - model.x_embedder(quiet)).abs().sum(dim=-1)[0] > 0
    assert changed.tolist() == [False, True, False, False]
    assert (patchify(image, 2).abs().sum(dim=-1)[0] > 0).tolist() == changed.tolist()


@pytest.mark.parametrize("target", ["velocity", "latent"])
@pytest.mark.parametrize(("span", "mode"), MODES)
def test_stage_1_by_hand(target, span, mode):
    """lambda g(t) mean | W LN(P(h)) − patchify(target) |²"""
    student, d = Stub(), handmade_draw(TIMES, dropped=(2,))
    g = structure(student, target=target, timestep_range=span, range_mode=mode, weight=0.7)
    parameters = random_parameters(g.head)
    assert len(parameters) == 8, "P has three layers, W one, LN none"
    w, b = parameters[6:]
    term = 0.0
    for i, gain in enumerate(gains_by_hand(TIMES, span, mode)):
        truth = patches_by_hand(numbers((d.noise if target == "velocity" else 2 * d.z0)[i] - d.z0[i]), 2)
        errors = []
        for h, goal in zip(student_feature(d, i), truth, strict=True):
            predicted = w @ layer_norm_by_hand(mlp_by_hand(parameters, h), eps=1e-6) + b
            errors += [(x - y) ** 2 for x, y in zip(predicted, goal, strict=True)]
        term += gain * np.mean(errors)
    loss, report = Objective(student, [g]).losses(d, 0)
    assert report["structure"].item() == pytest.approx(term, rel=1e-5)
    assert loss.item() == pytest.approx(report["flow"].item() + 0.7 * term, rel=1e-5)


def test_stage_1_reports_norms_of_feature_and_target():
    student, d = Stub(), handmade_draw(TIMES)
    _, report = Objective(student, [structure(student, timestep_range=None)]).losses(d, 0)
    feature = [math.sqrt((h**2).sum()) for i in range(6) for h in student_feature(d, i)]
    target = [math.sqrt((v**2).sum()) for i in range(6) for v in patches_by_hand(numbers(d.v[i]), 2)]
    assert report["structure/feature_norm"].item() == pytest.approx(np.mean(feature), rel=1e-5)
    assert report["structure/target_norm"].item() == pytest.approx(np.mean(target), rel=1e-5)


# ---- stage 2


def guided_by_hand(d, i, w, wide=1):
    """f_u + w (f_c − f_u) of the stub teacher at its third block; its null label is 7."""
    a, b, c = TEACHER
    base = np.tile(a * patches_by_hand(numbers(d.zt[i]), 2), (1, wide)) + b * TIMES[i]
    f_c, f_u = base + c * d.cond[i].item(), base + c * 7
    return f_u + w * (f_c - f_u)


def distance_by_hand(predicted, goal, norm):
    if norm == "cosine":
        return 1 - (predicted @ goal) / (math.sqrt(predicted @ predicted) * math.sqrt(goal @ goal))
    if norm == "layer":
        goal = layer_norm_by_hand(goal, eps=1e-5)
    return ((predicted - goal) ** 2).mean()


@pytest.mark.parametrize("norm", ["none", "layer", "cosine"])
@pytest.mark.parametrize(("span", "mode"), MODES)
@pytest.mark.parametrize("wide", [1, 2], ids=["same width", "wider teacher"])
def test_stage_2_by_hand(norm, span, mode, wide):
    """lambda g(t) mean | P(h) − f_g |²"""
    student, d = Stub(), handmade_draw(TIMES, dropped=(2, 3))
    options = {"timestep_range": span, "range_mode": mode, "target_norm": norm, "scale": 3.0, "weight": 0.7}
    g = guidance(student, frozen(wide=wide), **options)
    parameters = random_parameters(g.head)
    assert [p.shape for p in parameters[4:]] == [(8 * wide, 5), (8 * wide,)], "the head maps to the teacher's width"
    term = 0.0
    for i, gain in enumerate(gains_by_hand(TIMES, span, mode)):
        goals = guided_by_hand(d, i, 3.0, wide)
        pairs = zip(student_feature(d, i), goals, strict=True)
        term += gain * np.mean([distance_by_hand(mlp_by_hand(parameters, h), goal, norm) for h, goal in pairs])
    loss, report = Objective(student, [g]).losses(d, 0)
    assert report["self"].item() == pytest.approx(term, rel=2e-5)
    assert loss.item() == pytest.approx(report["flow"].item() + 0.7 * term, rel=2e-5)


def test_stage_2_reports_norms_of_feature_and_guided_target():
    student, d = Stub(), handmade_draw(TIMES)
    _, report = Objective(student, [guidance(student, frozen(), timestep_range=None, scale=3.0)]).losses(d, 0)
    feature = [math.sqrt((h**2).sum()) for i in range(6) for h in student_feature(d, i)]
    target = [math.sqrt((f**2).sum()) for i in range(6) for f in guided_by_hand(d, i, 3.0)]
    assert report["self/feature_norm"].item() == pytest.approx(np.mean(feature), rel=1e-5)
    assert report["self/target_norm"].item() == pytest.approx(np.mean(target), rel=1e-5)


@pytest.mark.parametrize("w", [0.0, 1.0, 1.5, 30.0])
def test_guided_features_equal_classifier_free_guidance(w):
    d, teacher = handmade_draw(TIMES, dropped=(0, 1)), frozen()
    f_g = guidance(Stub(), teacher, scale=w).guided_features(d)
    for i in range(6):
        np.testing.assert_allclose(numbers(f_g[i]), guided_by_hand(d, i, w), rtol=1e-4, atol=1e-4)
    assert teacher.model.calls[0]["x"].shape[0] == (6 if w == 1 else 12), "w = 1 needs no unconditional half"
    assert len(teacher.model.calls) == 1, "both halves pass in one call"
    if w == 0:
        unconditional = Frozen(Stub(abc=TEACHER), 3)(d.zt, d.t, torch.full((6,), 7))[0]
        torch.testing.assert_close(f_g, unconditional.clone(), rtol=0, atol=0)


def test_guided_features_of_rows_equal_those_rows_of_all():
    d, g = handmade_draw(TIMES), guidance(Stub(), frozen())
    rows = torch.tensor([4, 0, 3])
    torch.testing.assert_close(g.guided_features(d, rows), g.guided_features(d)[rows], rtol=0, atol=0)


def test_teacher_may_have_another_width_and_depth():
    student = SiT((1, 8, 8), 10, width=16, depth=4, heads=2, patch=2)
    teacher = SiT((1, 8, 8), 10, width=24, depth=7, heads=3, patch=2)
    objective = Objective(student, [guidance(student, Frozen(teacher, 5))])
    loss, _ = objective(Batch(torch.randn(8, 1, 8, 8), torch.arange(8)), 0)
    loss.backward()
    assert math.isfinite(loss.item()) and objective.guidances[0].head[-1].out_features == 24


# ---- selection


def both_stages():
    student = Stub()
    return [structure(student), guidance(student, frozen(), scale=3.0)]


def term_and_gradients(g, d, feature):
    """The term, and its gradients in the student's features and each parameter of the head."""
    feature = feature.clone().requires_grad_()
    term, _ = g(d, {2: feature})
    return term.detach(), torch.autograd.grad(term, [feature, *g.head.parameters()])


@pytest.mark.parametrize("even", [False, True])
def test_samples_outside_the_range_do_not_affect_term_or_gradients(even):
    """With even times the capacity is two: two inside (0.5 and 0.7), then one and a row of padding, then one again."""
    for times in ([0.3, 0.9, 0.5, 0.1, 0.7], [0.25, 0.85, 0.45, 0.05, 0.65], [0.39, 0.99, 0.59, 0.19, 0.79]):
        d, guidances = handmade_draw(times, even=even), both_stages()
        feature = torch.randn(5, 4, 8)
        outside = [i for i, t in enumerate(times) if not np.float32(0.4) <= np.float32(t) <= np.float32(0.7)]
        other = {name: getattr(d, name).clone() for name in ("z0", "noise", "zt", "v", "cond")}
        for name in ("z0", "noise", "zt", "v"):
            other[name][outside] += 100.0
        other["cond"][outside] = (other["cond"][outside] + 1) % 7
        changed = feature.clone()
        changed[outside] -= 50.0
        for g in guidances:
            term, gradients = term_and_gradients(g, d, feature)
            same, again = term_and_gradients(g, d._replace(**other), changed)
            assert torch.equal(term, same) and term > 0
            assert all(torch.equal(x, y) for x, y in zip(gradients[1:], again[1:], strict=True)), "heads"
            assert torch.equal(gradients[0], again[0]) and not gradients[0][outside].any(), "features"
            inside = [i for i in range(5) if i not in outside]
            assert all(gradients[0][i].any() for i in inside)


def test_sample_inside_the_range_affects_the_term():
    d, guidances = handmade_draw([0.3, 0.9, 0.5, 0.1, 0.7], even=True), both_stages()
    feature = torch.randn(5, 4, 8)
    changed = feature.clone()
    changed[2] += 1.0
    assert all(term_and_gradients(g, d, feature)[0] != term_and_gradients(g, d, changed)[0] for g in guidances)


def test_padding_passes_the_head_with_a_gain_of_zero():
    d = handmade_draw([0.3, 0.9, 0.5, 0.1, 0.75], even=True)  # one inside; two are computed
    for g in both_stages():
        rows = []
        g.head.register_forward_hook(lambda _, args, __, rows=rows: rows.append(args[0].shape[0]))
        term, (feature, *_) = term_and_gradients(g, d, torch.ones(5, 4, 8))
        assert rows == [2]
        assert [i for i in range(5) if feature[i].any()] == [2]
        alone = d._replace(**{k: v[[2]] for k, v in d._asdict().items() if torch.is_tensor(v)})
        one, _ = term_and_gradients(g, alone, torch.ones(1, 4, 8))
        assert term.item() == pytest.approx(one.item() / 5, rel=1e-6), "a fifth of the error of that sample"


def test_only_selected_samples_pass_the_teacher():
    for even in (True, False):
        student, teacher = Stub(), frozen()
        times = ((torch.randperm(10) + 0.5) / 10).tolist()
        Objective(student, [guidance(student, teacher)]).losses(handmade_draw(times, even=even), 0)
        assert len(teacher.model.calls[0]["x"]) == 2 * 3
    g = guidance(Stub(), frozen())
    assert g.cost(10) == {"head": 3, "teacher": 6}
    assert guidance(Stub(), frozen(), scale=1.0).cost(10) == {"head": 3, "teacher": 3}
    assert guidance(Stub(), frozen(), range_mode="scale").cost(10) == {"head": 10, "teacher": 20}
    assert structure(Stub()).cost(10) == {"head": 3, "teacher": 0}


def plain_loss(student, head1, head2, teacher, d, w, weight):
    """Both stages computed for all samples, with a mask on the error of each: the formulas written directly."""
    out = student(d.zt, d.t, d.dropped, taps=(1, 2))
    mask = torch.tensor([float(np.float32(0.4) <= np.float32(t) <= np.float32(0.7)) for t in d.t.tolist()])
    loss = ((out.v - d.v) ** 2).mean()
    p, (w4, b4) = head1[:6], head1[6:]
    hidden = mlp(p, out.feats[1])
    hidden = (hidden - hidden.mean(dim=-1, keepdim=True)) / (
        hidden.var(dim=-1, keepdim=True, unbiased=False) + 1e-6
    ).sqrt()
    target = torch.tensor(np.array([patches_by_hand(v.numpy(), student.patch) for v in d.v]))
    loss = loss + weight * (mask * ((hidden @ w4.T + b4 - target) ** 2).mean(dim=(1, 2))).mean()
    with torch.no_grad():
        f_c, f_u = (teacher(d.zt, d.t, cond, taps=(2,)).feats[2] for cond in (d.cond, d.null))
    error = ((mlp(head2, out.feats[2]) - (f_u + w * (f_c - f_u))) ** 2).mean(dim=(1, 2))
    return loss + weight * (mask * error).mean()


def mlp(p, x):
    for w, b in ((p[0], p[1]), (p[2], p[3])):
        x = x @ w.T + b
        x = x * torch.sigmoid(x)
    return x @ p[4].T + p[5]


@pytest.mark.parametrize("times", ["systematic", "uniform"])
@pytest.mark.parametrize("n", [3, 10, 13])
def test_selection_has_the_gradient_of_a_masked_computation_over_all_samples(times, n):
    shape, sizes = (1, 8, 8), {"depth": 3, "heads": 2, "patch": 2}
    for seed in range(3):
        torch.manual_seed(seed)
        student, full = SiT(shape, 10, width=16, **sizes), SiT(shape, 10, width=24, **sizes)
        for p in [*student.parameters(), *full.parameters()]:
            nn.init.normal_(p, std=0.2)
        teacher = SiT(shape, 10, width=24, **sizes)
        teacher.load_state_dict(full.state_dict())
        first = structure(student, block=1)
        second = guidance(student, Frozen(teacher, 2), scale=5.0)
        objective = Objective(student, [first, second])
        batch = Batch(torch.randn(n, *shape), torch.randint(10, (n,)))
        d = flow.draw(batch, student.null(batch.cond), times=times, drop=0.3)
        loss, _ = objective.losses(d, 0)
        parameters = list(objective.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        plain = plain_loss(student, [*first.head.parameters()], [*second.head.parameters()], full, d, 5.0, 0.5)
        plain_gradients = torch.autograd.grad(plain, parameters)
        torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
        for x, y in zip(gradients, plain_gradients, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * y.abs().max().item() + 1e-7)


# ---- defaults


def test_defaults_are_the_published_ones():
    one, two = Stage1(), Stage2()
    assert (one.block, one.target, one.weight, one.timestep_range, one.range_mode) == (
        2,
        "velocity",
        0.5,
        RANGE,
        "select",
    )
    assert (two.scale, two.weight, two.timestep_range, two.range_mode) == (30.0, 0.5, RANGE, "select")
    assert (two.until_step, two.target_norm, two.teacher_weights) == (100_000, "none", "raw")
    assert one.head_width == two.head_width == 2048
    layers = [m for m in structure(Stub(), head_width=2048).head.modules() if isinstance(m, nn.Linear)]
    assert [m.out_features for m in layers] == [2048, 2048, 8, 8]
    layers = [m for m in guidance(Stub(), frozen(), head_width=2048).head.modules() if isinstance(m, nn.Linear)]
    assert [m.out_features for m in layers] == [2048, 2048, 8]


@pytest.mark.parametrize(
    ("name", "depth", "student_block", "teacher_block"),
    [
        ("SiT-S/2", 12, 6, 8),
        ("SiT-B/2", 12, 6, 8),
        ("SiT-L/2", 24, 12, 16),
        ("SiT-XL/2", 28, 14, 18),
        (None, 24, 12, 16),
    ],
)
def test_default_blocks_are_the_published_ones(name, depth, student_block, teacher_block):
    """The last row is the 24-block MMDiT, of which only the depth is used."""
    student, teacher = Stub(), Stub()
    student.depth = teacher.depth = depth
    assert name is None or SIT_SIZES[name]["depth"] == depth
    assert default_teacher_block(depth) == teacher_block
    g = SelfGuidance(student, Frozen(teacher, default_teacher_block(depth)), Stage2(head_width=4))
    assert g.taps == (student_block,)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_default_blocks_exist_in_the_smallest_models(depth):
    assert 1 <= default_teacher_block(depth) <= depth
    student = Stub()
    student.depth = depth
    (block,) = SelfGuidance(student, frozen(), Stage2(head_width=4)).taps
    assert 1 <= block <= depth


# ---- use as a library


def test_both_stages_in_an_own_training_loop_reduce_the_loss():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # (1797, 1, 8, 8) in [-1, 1]
    labels = torch.tensor(digits.target)

    def train(model, guidances, steps=40):
        objective = Objective(model, guidances)
        optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3, weight_decay=0.0)
        flows = []
        for step in range(steps):
            rows = torch.randint(len(images), (32,))
            loss, report = objective(Batch(images[rows], labels[rows]), step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            flows.append(report["flow"].item())
        return flows

    def build():
        return SiT((1, 8, 8), 10, width=32, depth=4, heads=4, patch=2)

    first, second = build(), build()
    runs = [train(first, [StructureGuidance(first, Stage1(block=1, head_width=64))])]
    teacher = Frozen(first, block=3)
    runs.append(train(second, [SelfGuidance(second, teacher, Stage2(scale=5.0, target_norm="layer", head_width=64))]))
    for flows in runs:
        assert np.mean(flows[-10:]) < 0.7 * np.mean(flows[:3])
    v = second(images[:2], torch.full((2,), 0.5), labels[:2]).v
    assert v.shape == (2, 1, 8, 8) and torch.isfinite(v).all()


def test_layer_normalised_targets_have_unit_variance():
    """The target is torch's LayerNorm of the guided features, without weights."""
    d, student, teacher = handmade_draw(TIMES), Stub(), frozen()
    g = guidance(student, teacher, target_norm="layer", timestep_range=None, scale=30.0)
    g.head = nn.Identity()
    feature = torch.zeros(6, 4, 8)
    term, _ = g(d, {2: feature})
    target = F.layer_norm(g.guided_features(d), (8,))
    assert term.item() == pytest.approx(target.square().mean().item(), rel=1e-6)
    assert term.item() == pytest.approx(1.0, rel=1e-3), "the error of a zero prediction is the variance, for every w"


def test_guidance_depends_on_draw_and_features_only():
    """No hidden state: the same draw and features give the same term."""
    d, guidances = handmade_draw(TIMES), both_stages()
    assert isinstance(d, Draw)
    feature = torch.randn(6, 4, 8)
    for g in guidances:
        assert torch.equal(g(d, {2: feature})[0], g(d, {2: feature})[0])


# ---- null_rows


@pytest.mark.parametrize(("span", "mode"), MODES)
def test_null_rows_of_one_give_every_guided_sample_the_null_condition(span, mode):
    student, d = Stub(), handmade_draw(TIMES, dropped=(0,))
    Objective(student, [guidance(student, frozen(), timestep_range=span, range_mode=mode, null_rows=1.0)]).losses(d, 0)
    guided = [gain > 0 for gain in gains_by_hand(TIMES, span, mode)]
    expected = [7 if i == 0 or guided[i] else d.cond[i].item() for i in range(6)]
    assert student.calls[0]["cond"].tolist() == expected


def test_fraction_of_null_rows_follows_the_next_random_numbers():
    """After the draw of the step, and only where the option is used: the default consumes no random number."""
    b = Batch(torch.randn(2000, 2, 4, 4), torch.randint(7, (2000,)))
    seen, states = {}, {}
    for fraction in (0.0, 0.25):
        student, teacher = Stub(), frozen()
        objective = Objective(student, [guidance(student, teacher, null_rows=fraction)])
        torch.manual_seed(5)
        objective(b, 0)
        seen[fraction], states[fraction] = student.calls[0]["cond"], torch.get_rng_state()
        assert not (teacher.model.calls[0]["cond"][: len(teacher.model.calls[0]["cond"]) // 2] == 7).any()
    torch.manual_seed(5)
    d = flow.draw(b, torch.full((2000,), 7))
    assert torch.equal(seen[0.0], d.dropped) and torch.equal(states[0.0], torch.get_rng_state())
    inside = (d.t >= 0.4) & (d.t <= 0.7)
    hidden = inside & (torch.rand(2000) < 0.25)
    assert torch.equal(seen[0.25], torch.where(hidden, 7, d.dropped)) and 100 < hidden.sum() < 200


def test_null_rows_work_with_captions():
    student, d = TextStub(), handmade_draw(TIMES)
    captions = {"tokens": torch.randn(6, 3, 2), "mask": torch.ones(6, 3, dtype=torch.bool), "pooled": torch.randn(6, 4)}
    d = d._replace(cond=captions, null=student.null(captions), dropped=captions)
    teacher = Frozen(TextStub(abc=TEACHER), 3)
    Objective(student, [guidance(student, teacher, null_rows=1.0)]).losses(d, 0)
    seen = student.calls[0]["cond"]
    for name, given in captions.items():
        for i, t in enumerate(TIMES):
            expected = d.null[name][i] if 0.4 <= t <= 0.7 else given[i]
            assert torch.equal(seen[name][i], expected)


# ---- fade


def test_term_fades_before_it_ends():
    """until_step 10, the last half of it: weight 1 at step 5, 0.8 at step 6, 0.2 at step 9, no term at step 10."""
    student, d = Stub(), handmade_draw(TIMES)
    objective = Objective(student, [guidance(student, frozen(), fade=0.5, until_step=10, weight=0.7)])
    full = objective.losses(d, 0)[1]["self"].item()
    for step, share in ((5, 1.0), (6, 0.8), (9, 0.2)):
        loss, report = objective.losses(d, step)
        assert report["self"].item() == pytest.approx(share * full, rel=1e-5)
        assert loss.item() == pytest.approx(report["flow"].item() + 0.7 * share * full, rel=1e-5)
    assert set(objective.losses(d, 10)[1]) == {"flow"}


# ---- spatial normalisation and the convolutional head


@pytest.mark.parametrize("gamma", [0.6, 1.0])
def test_spatially_normalised_targets_by_hand(gamma):
    """(x − gamma mean) / (std + 1e-6) per sample and channel over its tokens, std with T − 1, then the squared error."""
    d, teacher = handmade_draw(TIMES), frozen()
    g = guidance(Stub(), teacher, target_norm="spatial", spatial_gamma=gamma, timestep_range=None, scale=3.0)
    g.head = nn.Identity()
    term, _ = g(d, {2: torch.full((6, 4, 8), 0.5)})
    errors = []
    for i in range(6):
        for channel in guided_by_hand(d, i, 3.0).T:
            mean, std = sum(channel) / 4, math.sqrt(sum((x - sum(channel) / 4) ** 2 for x in channel) / 3)
            errors += [(0.5 - (x - gamma * mean) / (std + 1e-6)) ** 2 for x in channel]
    assert term.item() == pytest.approx(np.mean(errors), rel=1e-4)


def test_spatial_normalisation_needs_several_tokens():
    student, teacher = (Stub(patch=4) for _ in range(2))
    with pytest.raises(ValueError, match=r"stage2\.target_norm spatial needs several tokens"):
        guidance(student, Frozen(teacher, 3), target_norm="spatial")


def test_term_of_a_convolutional_head_equals_torch_on_the_picture_of_tokens():
    d, student, teacher = handmade_draw(TIMES), Stub(), frozen(wide=2)
    g = guidance(student, teacher, head="conv", timestep_range=None, scale=3.0)
    _, report = Objective(student, [g]).losses(d, 0)
    tokens = torch.tensor(np.array([student_feature(d, i) for i in range(6)]), dtype=torch.float32)  # (6, 4, 8)
    picture = tokens.transpose(1, 2).reshape(6, 8, 2, 2)
    predicted = F.conv2d(picture, g.head.conv.weight, g.head.conv.bias, padding=1).flatten(2).transpose(1, 2)
    goals = torch.tensor(np.array([guided_by_hand(d, i, 3.0, 2) for i in range(6)]))
    assert report["self"].item() == pytest.approx((predicted - goals).square().mean().item(), rel=1e-5)


def test_convolutional_head_takes_latents_of_another_size():
    """Of 2 x 8 tokens for a model of 4 x 4: the same number, on another grid."""
    student = SiT((1, 8, 8), 10, width=16, depth=2, heads=2, patch=2)
    g = SelfGuidance(student, Frozen(student, 2), Stage2(student_block=1, head="conv", timestep_range=None))
    grids = []
    g.head.register_forward_hook(lambda _, args, __: grids.append(args[1]))
    Objective(student, [g]).losses(handmade_draw([0.5], (1, 4, 16)), 0)
    assert grids == [(2, 8)]


# ---- the range in signal-to-noise


def test_range_moves_with_the_deviation_of_the_data():
    """std 0.75: [0.4, 0.7] becomes [1/3, 7/11], so 0.35 counts and 0.65 does not."""
    d, student = handmade_draw([0.32, 0.35, 0.63, 0.65]), Stub()
    feature = torch.randn(4, 4, 8)
    _, (gradient, *_) = term_and_gradients(guidance(student, frozen(), data_std=0.75), d, feature)
    assert [bool(row.any()) for row in gradient] == [False, True, True, False]
    assert guidance(student, frozen(), data_std=0.75).cost(100) == {
        "head": 31,
        "teacher": 62,
    }  # 100 (7/11 - 1/3) = 30.3


# ---- several blocks


def test_several_blocks_by_hand():
    """The mean of one term for each block: h_1 follows the teacher's second block, h_2 its third."""
    d, student = handmade_draw(TIMES), Stub()
    blocks = {"student_block": None, "student_blocks": (1, 2), "teacher_blocks": (2, 3)}
    g = guidance(student, frozen(), **blocks, timestep_range=None, scale=3.0)
    heads = [random_parameters(head) for head in (g.head, *g.more_heads)]
    _, report = Objective(student, [g]).losses(d, 0)
    a, b, _ = TEACHER
    errors = []
    for i, t in enumerate(TIMES):
        patches = patches_by_hand(numbers(d.zt[i]), 2)
        second = a * patches + b * t  # without the label: f_c = f_u
        for parameters, hidden, goals in zip(
            heads, (0.5 * patches, student_feature(d, i)), (second, guided_by_hand(d, i, 3.0)), strict=True
        ):
            pairs = zip(hidden, goals, strict=True)
            errors.append(np.mean([distance_by_hand(mlp_by_hand(parameters, h), goal, "none") for h, goal in pairs]))
    assert report["self"].item() == pytest.approx(np.mean(errors), rel=2e-5)
    assert g.taps == (1, 2) and g.cost(10) == {"head": 20, "teacher": 20}
    assert len(g.teacher.model.calls) == 1, "one pass for all blocks"


def test_one_teacher_block_serves_several_of_the_student():
    d, student = handmade_draw(TIMES), Stub()
    several = guidance(student, frozen(), student_blocks=(1, 2), timestep_range=None)
    term, _ = several(d, feats := {1: torch.randn(6, 4, 8), 2: torch.randn(6, 4, 8)})
    apart = []
    for block, head in ((1, several.head), (2, several.more_heads[0])):
        one = guidance(student, frozen(), student_block=block, timestep_range=None)
        one.head = head
        apart.append(one(d, {block: feats[block]})[0].item())
    assert term.item() == pytest.approx(np.mean(apart), rel=1e-6)


def test_label_means_of_several_blocks_are_separate():
    d, student = handmade_draw(TIMES), Stub()
    blocks = {"student_blocks": (1, 2), "teacher_blocks": (2, 3), "timestep_range": None}
    g = guidance(student, frozen(), **blocks, label_part="remove")
    g(d, {1: torch.randn(6, 4, 8), 2: torch.randn(6, 4, 8)})
    torch.testing.assert_close(g.labels.mean[-1], g.guided_features(d).mean(dim=0))
    assert g.labels.mean.shape == (8, 4, 16)


def test_teacher_keeps_the_deepest_of_its_blocks():
    config = recipe("digits").override({"stage2.student_blocks": (1, 2), "stage2.teacher_blocks": (3, 2)})
    assert stages(config)[1].teacher.block(6) == 3
    with pytest.raises(ValueError, match=r"stage2\.teacher_blocks \(2, 3\) are beyond the teacher's 2 blocks"):
        guidance(Stub(), frozen(block=2), student_blocks=(1, 2), teacher_blocks=(2, 3))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Stage1(target="latents"), r"stage1\.target should be one of 'velocity', 'latent', not 'latents'"),
        (lambda: Stage1(weight=-1.0), r"stage1\.weight must be a number from 0"),
        (lambda: Stage1(head_width=0), r"stage1\.head_width must be at least 1, not 0"),
        (lambda: Stage1(block=2.0), r"stage1\.block should be int, not 2\.0"),
        (lambda: Stage1, r"the settings must be Stage1\(\.\.\.\), not the class Stage1"),
        (lambda: {"block": 2}, r"the settings must be Stage1\(\.\.\.\), not dict"),
        (lambda: Stage2(), r"the settings must be Stage1\(\.\.\.\), not Stage2"),
    ],
)
def test_settings_made_in_python_are_checked_in_stage_1(make, message):
    with pytest.raises(ValueError, match=message):
        StructureGuidance(Stub(), make())


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"target_norm": "layr"},
            r"stage2\.target_norm should be one of 'none', 'layer', 'cosine', 'spatial', not 'layr'",
        ),
        ({"head": "convolution"}, r"stage2\.head should be one of"),
        ({"timestep_range": (0.2, 0.4, 0.5)}, r"stage2\.timestep_range should be"),
    ],
)
def test_settings_made_in_python_are_checked_in_stage_2(options, message):
    with pytest.raises(ValueError, match=message):
        SelfGuidance(Stub(), frozen(), Stage2(**options))


@pytest.mark.parametrize("span", [(0.9, 0.2), (0.7, 1.5), (0.3, 2.5)])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_range_is_checked_as_it_was_given_before_it_is_moved_by_data_std(span, path):
    with pytest.raises(ValueError, match=rf"timestep_range {re.escape(str(span))} must be two increasing numbers"):
        SelfGuidance(Stub(), frozen(), Stage2(timestep_range=span, data_std=2.0), path)


def test_teacher_block_of_the_settings_is_the_one_that_teaches():
    d, student, teacher = handmade_draw(TIMES), Stub(), frozen()  # keeps three blocks
    for block, expected in ((None, 3), (2, 2)):
        guidance = SelfGuidance(student, teacher, Stage2(scale=1.0, teacher_block=block, head_width=4))
        assert torch.equal(guidance.guided_features(d), teacher(d.zt, d.t, d.cond, taps=(expected,))[0])
    for block in (0, 4):
        with pytest.raises(
            ValueError, match=rf"teacher_blocks \({block},\) are beyond the teacher's 3 blocks; give Frozen"
        ):
            SelfGuidance(student, teacher, Stage2(teacher_block=block))


def test_patchify_that_disagrees_with_the_grid_is_refused():
    student = Stub()
    student.grid = (4, 4)
    with pytest.raises(
        ValueError, match=r"Stub\.patchify cuts a latent of \(2, 4, 4\) into \(1, 4, 8\); expected .* \(1, 16, 2\)"
    ):
        StructureGuidance(student, Stage1(head_width=4))


def test_settings_may_be_numbers_of_numpy():
    stage1 = StructureGuidance(Stub(), Stage1(block=np.int64(2), weight=np.float32(0.5)))
    assert stage1.taps == (2,) and stage1.weight == 0.5 and type(stage1.config.block) is int


def test_scale_of_a_recipe_without_classes_needs_no_action():
    config = recipe("digits")
    with pytest.warns(
        UserWarning, match=r"no classes: stage2.scale is 1 in place of 2, .* there is nothing to change$"
    ):
        settled = SELF_TRANSCENDENCE.settle(config, Conditions("none"))
    assert settled.section(Stage2).scale == 1
    assert SELF_TRANSCENDENCE.settle(settled, Conditions("none")) == settled, "without a warning"
    assert SELF_TRANSCENDENCE.settle(config, Conditions("labels", 3)) == config


@pytest.mark.parametrize("place", ["meta", torch.bfloat16])
def test_patchify_may_use_weights_of_any_device_and_type(place):
    class Embedding(Stub):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def patchify(self, x):
            return super().patchify(torch.cat([x, self.scale.expand_as(x)])[: len(x)])

    assert StructureGuidance(Embedding().to(place), Stage1(block=1)).taps == (1,)
