"""MMDiT against diffusers' Stable Diffusion 3 in float64, its null condition, and the contract of a backbone."""

import contextlib
import copy
import dataclasses
import io
import json
import math

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from safetensors.torch import load_file, save_file
from torch.nn.attention import sdpa_kernel

from selftrans.checkpoints.format import KEY, read_header
from selftrans.checkpoints.load import load_model
from selftrans.data.dataset import Dataset
from selftrans.flow import LINEAR, draw
from selftrans.methods.guidance import Frozen
from selftrans.methods.objective import Objective
from selftrans.methods.self_transcendence import SelfGuidance, Stage1, Stage2, StructureGuidance
from selftrans.models.compiling import compile_model
from selftrans.models.layers import sincos_positions
from selftrans.models.mmdit import MASKED, MMDIT_SIZES, JointBlock, MMDiT, MMDiTConfig, build
from selftrans.train.ema import EMA
from selftrans.train.flops import forward_flops, step_flops
from selftrans.train.run import train
from selftrans.train.signals import Interrupted, StopSignal
from selftrans.types import MASK, TEXT, Batch, Conditions, map_cond
from tests.support import captioned, toy
from tests.support.diffusers_blocks import FixedCondition, copy_joint_block, copy_mmdit, randomised
from tests.support.toy import quick  # noqa: F401 - a fixture

WORDS = Conditions("text", tokens=5, width=6, encoder="an encoder", sha256="0" * 64)
SIZES = {"width": 32, "depth": 3, "heads": 2, "patch": 2}


def tiny(shape=(4, 8, 8), **options):
    torch.manual_seed(0)
    return MMDiT(shape, WORDS, **{**SIZES, **options})


def captions(n, seed=3):
    """Tokens, and masks of captions of 2 to 5 tokens."""
    g = torch.Generator().manual_seed(seed)
    lengths = 2 + torch.arange(n) % 4
    return {TEXT: torch.randn(n, 5, 6, generator=g), MASK: torch.arange(5)[None] < lengths[:, None]}


def empty():
    return {TEXT: torch.full((1, 5, 6), 0.25), MASK: torch.tensor([[True, True, False, False, False]])}


def inputs(model, n=3):
    g = torch.Generator().manual_seed(2)
    return torch.randn(n, *model.shape, generator=g), torch.rand(n, generator=g), captions(n)


# ---- against diffusers


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_joint_block_equals_diffusers_in_float64(qk_norm, last):
    ours = randomised(JointBlock(48, 3, qk_norm=qk_norm)).double()
    if last:
        ours.context_block.keep_attention_inputs()
    theirs = JointTransformerBlock(48, 3, 16, context_pre_only=last, qk_norm="rms_norm" if qk_norm else None).double()
    copy_joint_block(theirs, ours)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    g = torch.Generator().manual_seed(3)
    context, x = (torch.randn(2, n, 48, generator=g, dtype=torch.float64) for n in (7, 20))
    c = torch.randn(2, 48, generator=g, dtype=torch.float64)
    with torch.no_grad():
        found, expected = ours(context, x, c), theirs(x, context, c)
    assert (found[1] - x).abs().max() > 0.1 and (found[1] - expected[1]).abs().max() < 1e-10
    if last:
        assert expected[0] is None and found[0].numel() == 0
    else:
        assert (found[0] - context).abs().max() > 0.1 and (found[0] - expected[0]).abs().max() < 1e-10


@pytest.mark.parametrize("qk_norm", [False, True])
def test_model_equals_diffusers_in_float64(qk_norm):
    ours = randomised(tiny(qk_norm=qk_norm)).double().eval()
    x, t, cond = inputs(ours)
    x, cond = x.double(), {TEXT: cond[TEXT].double(), MASK: cond[MASK]}
    theirs = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=32,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=4,
        qk_norm="rms_norm" if qk_norm else None,
    ).double()
    copy_mmdit(theirs, ours)
    with torch.no_grad():
        theirs.time_text_embed = FixedCondition(ours.t_embedder(t))
        expected = theirs(x, cond[TEXT], torch.zeros(3, 8), t, return_dict=False)[0]
        found = ours(x, t, cond).v
    assert expected.abs().max() > 0.1 and (found - expected).abs().max() < 1e-10


# ---- sizes


def test_the_published_size():
    published = {"width": 768, "depth": 24, "heads": 24, "patch": 2}
    assert MMDiTConfig().name == "MMDiT-B/2" and MMDIT_SIZES["MMDiT-B/2"] == published
    with torch.device("meta"):
        model = build(MMDiTConfig(), (4, 32, 32), Conditions("text", tokens=77, width=768))
    block, last = (model.joint_blocks[i].context_block for i in (22, 23))
    assert block.adaLN_modulation[1].out_features == 6 * 768 and block.mlp.fc1.out_features == 4 * 768
    assert last.adaLN_modulation[1].out_features == 2 * 768 and last.mlp is None and last.attn.proj is None
    d, blocks = 768, 24
    stream = (3 * d * d + 3 * d) + (d * d + d) + (8 * d * d + 5 * d) + (6 * d * d + 6 * d)
    ended = (3 * d * d + 3 * d) + (2 * d * d + 2 * d)
    others = (16 * d + d) + (256 * d + d + d * d + d) + (768 * d + d) + (2 * d * d + 2 * d + 16 * d + 16)
    assert sum(p.numel() for p in model.parameters()) == (2 * blocks - 1) * stream + ended + others


@pytest.mark.parametrize("name", MMDIT_SIZES)
def test_every_size_builds_and_runs(name):
    with torch.device("meta"):
        model = build(MMDiTConfig(name), (4, 32, 32), Conditions("text", tokens=77, width=768))
        cond = map_cond(lambda x: x.to("meta").expand(2, *x.shape[1:]), model.conditions.example())
        v, feats = model(torch.empty(2, 4, 32, 32), torch.empty(2), cond, taps=(model.depth,))
    assert v.shape == (2, 4, 32, 32) and feats[model.depth].shape == (2, model.tokens, model.width)


def test_config_builds_its_size_and_its_options():
    config = MMDiTConfig("MMDiT-S/2", width=128, depth=2, qk_norm=True, masked=True)
    model = build(config, (4, 8, 8), WORDS)
    assert (model.width, model.depth, model.patch, model.masked) == (128, 2, 2, True) and config.blocks() == 2
    assert model.joint_blocks[0].x_block.attn.heads == 2 and model.conditions is WORDS
    assert isinstance(model.joint_blocks[0].context_block.attn.ln_k, torch.nn.RMSNorm)
    with pytest.raises(ValueError, match="MMDiT-B/2"):
        MMDiTConfig("MMDiT-B/3").check()
    with pytest.raises(ValueError, match=r"model\.depth"):
        MMDiTConfig(depth=0).check()


@pytest.mark.parametrize("conditions", [Conditions("labels", 10), Conditions("none")])
def test_data_without_text_are_refused(conditions):
    with pytest.raises(
        ValueError,
        match=rf"MMDiT-S/2 is conditioned on text; the data have {conditions}; prepare them with captions .* SiT",
    ):
        build(MMDiTConfig("MMDiT-S/2"), (4, 8, 8), conditions)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 9, 8), {}, "9x8 does not divide into patches of 2"),
        ((4, 8, 8), {"heads": 5}, "heads 5"),
        ((4, 8, 8), {"width": 34}, "multiple of 4"),
        ((4,), {}, "takes latents"),
        ((4, 8, 8), {"patch_frames": 2}, "patch_frames is for latents with frames"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(shape, **options)


def test_text_without_tokens_is_refused():
    with pytest.raises(ValueError, match="needs text tokens"):
        MMDiT((4, 8, 8), Conditions("text"), **SIZES)


# ---- initialisation


def test_initialisation_is_that_of_dit():
    model = tiny(width=64, qk_norm=True)
    block = model.joint_blocks[0]
    for linear in (
        block.x_block.attn.qkv,
        block.context_block.mlp.fc1,
        block.x_block.attn.proj,
        model.context_embedder,
    ):
        bound = (6 / sum(linear.weight.shape)) ** 0.5  # Xavier, uniform
        assert 0.98 * bound < linear.weight.abs().max() <= bound and not linear.bias.any()
    for i in (0, 2):
        assert model.t_embedder.mlp[i].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(block.context_block.attn.ln_q.weight, torch.ones(32))


def test_a_fresh_model_predicts_zero_and_ignores_the_text():
    model = tiny()
    x, t, cond = inputs(model)
    v, feats = model(x, t, cond, taps=(1, 3))
    assert torch.equal(v, torch.zeros_like(x)) and torch.equal(feats[1], feats[3])
    assert torch.equal(model(x, t, captions(3, seed=4), taps=(3,)).feats[3], feats[3])


def test_without_zero_init_weights_are_as_torch_makes_them():
    model = tiny(zero_init=False)
    x, t, cond = inputs(model)
    assert model(x, t, cond).v.abs().max() > 0
    gate = model.joint_blocks[0].x_block.adaLN_modulation[1].weight
    assert 0.98 / 32**0.5 < gate.abs().max() <= 1 / 32**0.5  # torch: uniform on +-1 / sqrt(width of the input)


def test_gradients_reach_every_weight_of_both_streams():
    model = randomised(tiny(qk_norm=True))
    x, t, cond = inputs(model)
    model(x, t, cond).v.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())  # DistributedDataParallel needs a gradient of each
    unused = [name for name, p in model.named_parameters() if not p.grad.any()]
    assert unused == ["joint_blocks.2.context_block.attn.ln_q.weight"], (
        "nothing reads what the text of the last block asks"
    )


# ---- the text


def test_masked_attention_equals_no_padding():
    """Captions of 2 to 4 tokens one by one, cut to their length, in a model that attends to all it is given."""
    model = randomised(tiny(masked=True, qk_norm=True)).double().eval()
    plain = copy.deepcopy(model)
    plain.masked = False
    x, t, cond = inputs(model)
    x, cond = x.double(), {TEXT: cond[TEXT].double(), MASK: cond[MASK]}
    found = model(x, t, cond, taps=(2,))
    for i, length in enumerate(cond[MASK].sum(dim=1).tolist()):
        cut = {name: part[i : i + 1, :length] for name, part in cond.items()}
        v, feats = plain(x[i : i + 1], t[i : i + 1], cut, taps=(2,))
        assert (found.v[i] - v[0]).abs().max() < 1e-12 and (found.feats[2][i] - feats[2][0]).abs().max() < 1e-12
    assert not torch.allclose(plain(x, t, cond).v, found.v)


class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


def test_attention_under_a_mask_on_a_gpu_leaves_out_cudnn(monkeypatch):
    """Its backward pass can give NaN there; the choice is part of compiled code, too, without a second graph."""
    allowed, attend = [], torch.nn.functional.scaled_dot_product_attention

    def noted(*args, **options):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    block, before = JointBlock(32, 2, qk_norm=False), torch.backends.cuda.cudnn_sdp_enabled()
    context, x, c = torch.zeros(2, 5, 32), torch.zeros(2, 16, 32), torch.zeros(2, 32)
    mask = torch.ones(2, 1, 1, 21, dtype=torch.bool)
    for given in ((context, x.as_subclass(OnGpu), c, mask), (context, x.as_subclass(OnGpu), c), (context, x, c, mask)):
        block(*given)
    assert allowed == [False, before, before] and torch.backends.cuda.cudnn_sdp_enabled() is before is True
    monkeypatch.undo()

    def masked(q):
        with sdpa_kernel(MASKED):
            return attend(q, q, q, attn_mask=torch.ones(2, 1, 4, 4, dtype=torch.bool))

    q = torch.randn(2, 2, 4, 8)
    assert torch.equal(torch.compile(masked, fullgraph=True, backend="aot_eager")(q), masked(q))
    torch.compiler.reset()


def test_padding_changes_nothing_exactly_if_masked():
    x, t, cond = inputs(tiny())
    other = {TEXT: torch.where(cond[MASK][..., None], cond[TEXT], 7.0), MASK: cond[MASK]}
    for masked in (True, False):
        model = randomised(tiny(masked=masked))
        assert torch.allclose(model(x, t, cond).v, model(x, t, other).v) is masked


def test_text_time_and_each_pixel_reach_the_velocity():
    model = randomised(tiny())
    x, t, cond = inputs(model, 1)
    v = model(x, t, cond).v
    assert not torch.allclose(model(x, t, captions(1, seed=4)).v, v) and not torch.allclose(model(x, t / 2, cond).v, v)
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, t, cond).v[0, 0, 0, 0], x)
    assert (gradient != 0).all()


# ---- the null condition


def test_null_is_the_empty_caption_without_a_copy():
    model = tiny()
    model.use_null(empty())
    null = model.null(captions(4))
    assert torch.equal(null[TEXT], empty()[TEXT].expand(4, -1, -1)) and torch.equal(
        null[MASK], empty()[MASK].expand(4, -1)
    )
    assert null[TEXT].data_ptr() == model.null_text.data_ptr() and null[TEXT].stride(0) == 0
    half = model.null({TEXT: captions(4)[TEXT].half(), MASK: captions(4)[MASK]})
    assert half[TEXT].dtype == torch.float16 and half[MASK].dtype == torch.bool and half[TEXT].shape == (4, 5, 6)


def test_null_that_is_missing_or_of_another_shape_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="no null condition yet; call use_null with the tokens of the empty caption"):
        model.null(captions(2))
    with pytest.raises(ValueError, match=r"empty caption has shape \(1, 5, 7\), this model takes \(1, 5, 6\)"):
        model.use_null({TEXT: torch.zeros(1, 5, 7), MASK: torch.ones(1, 5, dtype=torch.bool)})


def test_weights_carry_the_null_and_copies_and_the_average_have_it():
    model = tiny()
    assert {"null_text", "null_mask"} < set(model.state_dict())
    fresh = tiny()
    fresh.load_state_dict(model.state_dict())
    assert not fresh.null_set
    model.use_null(empty())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    fresh.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    average = EMA(model, 0.9)
    average.update(1)
    for one in (fresh, model.truncated(2), average.model, Objective(model).student):
        assert torch.equal(one.null(captions(1))[TEXT], empty()[TEXT])


# ---- the contract of a backbone


@pytest.mark.parametrize("taps", [(1,), (1, 2), (2, 1), (2, 2), (3,)])
def test_stopping_computes_no_block_after_the_last_tap(taps):
    model = randomised(tiny())
    x, t, cond = inputs(model)
    complete = model(x, t, cond, taps=taps)
    runs = []
    for k, block in enumerate(model.joint_blocks, start=1):
        block.register_forward_hook(lambda *_, k=k: runs.append(k))
    early = model(x, t, cond, taps=taps, stop=True)
    assert runs == list(range(1, max(taps) + 1))
    assert early.v is None and complete.v is not None and set(early.feats) == set(taps)
    assert all(torch.equal(early.feats[k], complete.feats[k]) for k in taps)
    assert all(feature.shape == (3, model.tokens, 32) for feature in early.feats.values())


def test_truncated_copy_gives_the_same_features_and_no_velocity():
    model = randomised(tiny(qk_norm=True)).double()
    x, t, cond = inputs(model)
    x = x.double()
    shallow = model.truncated(2).requires_grad_(False)
    assert len(shallow.repeated()) == 2 and len(model.repeated()) == 3
    assert shallow.joint_blocks[1].context_block.mlp is None and model.joint_blocks[1].context_block.mlp is not None
    expected = model(x, t, cond, taps=(2,)).feats[2]
    torch.testing.assert_close(shallow(x, t, cond, taps=(2,), stop=True).feats[2], expected, atol=1e-12, rtol=1e-12)
    with pytest.raises(AssertionError, match="truncated"):
        shallow(x, t, cond)
    again = shallow.truncated(1)
    torch.testing.assert_close(
        again(x, t, cond, taps=(1,), stop=True).feats[1], model(x, t, cond, taps=(1,)).feats[1], atol=1e-12, rtol=1e-12
    )


@pytest.mark.parametrize(
    ("shape", "options", "grid"),
    [
        ((3, 12), {"patch": 3}, (4,)),
        ((16, 4, 6), {"patch": 1}, (4, 6)),
        ((3, 8, 4), {"patch": 2}, (4, 2)),
        ((2, 4, 6, 4), {"patch": 2, "patch_frames": 2}, (2, 3, 2)),
    ],
)
def test_latents_with_one_to_three_dimensions_and_other_grids_than_its_own(shape, options, grid):
    model = randomised(tiny(shape, **options))
    x, t, cond = inputs(model)
    assert model.grid == grid and torch.equal(model.pos_embed[0], sincos_positions(32, grid))
    assert model(x, t, cond).v.shape == x.shape and model.patchify(x).shape[:2] == (3, model.tokens)
    larger = randomised(tiny((shape[0], *(2 * side for side in shape[1:])), **options))
    assert larger.load_state_dict(model.state_dict()) and larger.grid != grid
    torch.testing.assert_close(larger(x, t, cond).v, model(x, t, cond).v)  # positions follow the latent, not the model


def test_samples_of_a_batch_are_independent():
    model = randomised(tiny(masked=True))
    x, t, cond = inputs(model)
    one = map_cond(lambda part: part[1:2], cond)
    torch.testing.assert_close(model(x, t, cond).v[1:2], model(x[1:2], t[1:2], one).v, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_recomputing_gives_equal_gradients(masked):
    model = randomised(tiny(qk_norm=True, masked=masked)).train()
    x, t, cond = inputs(model)
    gradients = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        v, feats = model(x, t, cond, taps=(2,))
        (v.square().mean() + feats[2].square().mean()).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_stays_close(how):
    model = randomised(tiny(qk_norm=True)).eval()
    x, t, cond = inputs(model)
    expected = model(x, t, cond, taps=(2,), stop=True).feats[2]
    if how == "weights":
        found = model.to(torch.bfloat16)(x, t, cond, taps=(2,), stop=True).feats[2]
        assert found.dtype == torch.bfloat16
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x, t, cond, taps=(2,), stop=True).feats[2]
    assert ((found.float() - expected).norm() / expected.norm()).item() < 0.03


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_without_graph_breaks(masked):
    model = randomised(tiny(qk_norm=True, masked=masked, depth=2))
    x, t, cond = inputs(model)
    expected = model(x, t, cond, taps=(1,))
    torch.compiler.reset()
    found = torch.compile(model, fullgraph=True, backend="eager")(x, t, cond, taps=(1,))
    torch.compiler.reset()
    torch.testing.assert_close(found.v, expected.v, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.feats[1], expected.feats[1], atol=1e-5, rtol=1e-5)


def test_blocks_are_compiled_for_their_two_kinds(monkeypatch):
    """One graph for the blocks that return text tokens, one for the last; none falls back to uncompiled code."""
    graphs, calls = [], []

    def backend(graph, _):
        graphs.append(graph)
        return lambda *args: calls.append(1) or graph(*args)

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend=backend, **options)
    )
    model = tiny(depth=4)
    torch.compiler.reset()
    compile_model(model)
    model(*inputs(model))
    torch.compiler.reset()
    assert len(graphs) == 3 and len(calls) == 5, "and one for the last layer"


# ---- in the objective


def batch(model, n=8):
    g = torch.Generator().manual_seed(5)
    return Batch(torch.randn(n, *model.shape, generator=g), captions(n))


def stage1(model, block=2):
    return Objective(
        model, [StructureGuidance(model, Stage1(block=block, head_width=16, timestep_range=None))], drop=0.5
    )


def stage2(model, teacher, block=2):
    config = Stage2(scale=5.0, head_width=16, timestep_range=None)
    frozen = Frozen(teacher, block)
    return Objective(model, [SelfGuidance(model, frozen, config)], drop=0.5), frozen


def ready(**options):
    model = randomised(tiny(**options))
    model.use_null(empty())
    return model


def test_both_stages_give_gradients_to_student_and_head():
    student, teacher = ready(), ready()
    for objective in (stage1(student), stage2(student, teacher)[0]):
        objective.zero_grad()
        loss, report = objective(batch(student), 0)
        loss.backward()
        assert loss.isfinite() and len(report) == 4
        assert [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_students_see_dropped_captions_and_teachers_the_true_ones():
    student, teacher = ready(), ready()
    objective, frozen = stage2(student, teacher)
    seen = {}
    student.register_forward_pre_hook(lambda _, args: seen.update(student=args[2]))
    frozen.model.register_forward_pre_hook(lambda _, args: seen.update(teacher=args[2]))
    true = batch(student, 32)
    objective(true, 0)
    rows = [torch.equal(row, empty()[TEXT][0]) for row in seen["student"][TEXT]]
    assert 4 < sum(rows) < 28
    for i, dropped in enumerate(rows):
        expected = (
            map_cond(lambda part: part[0], empty()) if dropped else map_cond(lambda part, i=i: part[i], true.cond)
        )
        assert all(torch.equal(seen["student"][name][i], expected[name]) for name in (TEXT, MASK))
    for name in (TEXT, MASK):
        given, null = seen["teacher"][name].chunk(2)
        assert torch.equal(given, true.cond[name]) and torch.equal(null, empty()[name].expand_as(null))


def test_guided_features_are_those_of_two_separate_passes():
    student, teacher = ready(), ready(depth=4)
    objective, _ = stage2(student, teacher, block=3)
    b = batch(student)
    d = draw(b, student.null(b.cond), path=LINEAR, drop=0.5)
    found = objective.guidances[0].guided_features(d, torch.tensor([5, 2]))
    for i, row in enumerate((5, 2)):
        true = map_cond(lambda part, row=row: part[row : row + 1], b.cond)
        f_c, f_u = (
            teacher(d.zt[row : row + 1], d.t[row : row + 1], cond, taps=(3,), stop=True).feats[3]
            for cond in (true, empty())
        )
        torch.testing.assert_close(found[i], (f_u + 5 * (f_c - f_u))[0], atol=1e-3, rtol=1e-4)


def test_operations_of_a_step_are_those_of_the_matrix_products():
    """2 per multiply-add of every linear layer, and of Q K and A V on 16 + 5 tokens."""
    model = ready()
    d, text, latent = 32, 5, 16
    stream = 2 * (3 * d * d + d * d + 8 * d * d)
    attention, ended = 2 * 2 * (text + latent) ** 2 * d, 2 * 3 * d * d
    block = stream * latent + 2 * 6 * d * d + attention
    blocks = 2 * (block + stream * text + 2 * 6 * d * d) + block + ended * text + 2 * 2 * d * d
    others = 2 * (16 * d * latent + 6 * d * text + 256 * d + d * d + 2 * d * d + 16 * d * latent)
    assert forward_flops(model, WORDS.example()) == blocks + others
    counted = step_flops(stage2(model, ready())[0], WORDS.example(), 4)
    assert counted[None] == 12 * (blocks + others) and counted[0] > 0


def test_a_trained_model_obeys_its_caption():
    """Two captions, two constant pictures: from the same noise the prompt alone decides which one the velocity leads to."""
    torch.manual_seed(0)
    model = MMDiT((1, 4, 4), WORDS, **SIZES)
    model.use_null(empty())
    objective = stage1(model)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3, betas=(0.9, 0.9))
    words = captions(2)
    for step in range(100):
        which = torch.arange(32) % 2
        z0 = (2.0 * which - 1).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
        loss, _ = objective(Batch(z0, map_cond(lambda part, w=which: part[w], words)), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = torch.randn(1, 1, 4, 4).expand(3, -1, -1, -1)
    prompts = {name: torch.cat([words[name], empty()[name]]) for name in words}
    with torch.no_grad():
        z0 = noise - model(noise, torch.full((3,), 0.98), prompts).v
    means = z0.mean(dim=(1, 2, 3)).tolist()
    assert means[0] < -0.7 and means[1] > 0.7 and abs(means[2]) < 0.5


def test_settings_are_those_of_the_run_file():
    assert {f.name for f in dataclasses.fields(MMDiTConfig)} == {
        "name", "width", "depth", "heads", "patch", "patch_frames", "qk_norm", "masked", "zero_init",
        "early_block",
    }  # fmt: skip


# ---- in a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Both stages on pictures with captions."""
    out = tmp_path_factory.mktemp("mmdit") / "run"
    train(captioned.config(), out, quiet=True)
    return out


def test_both_stages_train_and_their_files_have_the_empty_caption(run):
    data = Dataset.open(captioned.shared())
    null = data.null()
    for stage, term in {"stage1": "structure", "stage2": "self"}.items():
        lines = toy.log(run, stage)
        assert math.isfinite(lines[-1]["loss"]) and lines[0][term] > 0 and lines[-1]["tflops"] > 0
        for weights in ("raw", "ema"):
            model = load_model(run, stage=stage, weights=weights).model
            assert isinstance(model, MMDiT) and model.conditions == data.manifest.conditions
            assert all(torch.equal(part, null[name]) for name, part in model.null(null).items())
    first, last = (load_model(run, stage=stage) for stage in ("stage1", "stage2"))
    assert not torch.equal(*(found.model.context_embedder.weight for found in (first, last)))
    assert last.config.model == MMDiTConfig(width=32, depth=3, heads=2, zero_init=False)


def test_interrupted_run_equals_uninterrupted(run, tmp_path, monkeypatch):
    for at in (3, 7):  # number of the call, over both stages
        calls = []
        monkeypatch.setattr(StopSignal, "asked", lambda *_, calls=calls, at=at: calls.append(0) or len(calls) == at)
        with contextlib.suppress(Interrupted):
            train(captioned.config(), tmp_path / "run", quiet=True)
    monkeypatch.undo()
    train(captioned.config(), tmp_path / "run", quiet=True)
    toy.assert_same_run(run, tmp_path / "run")


def test_recomputing_and_data_on_the_device_change_no_number(run, tmp_path):
    train(captioned.config({"train.recompute": True, "data.on_device": True}), tmp_path / "run", quiet=True)
    toy.assert_same(toy.tensors(run), toy.tensors(tmp_path / "run"))


def test_a_file_whose_text_is_of_another_size_is_refused(run, tmp_path):
    copied = toy.copy(run, tmp_path / "run")
    file = toy.checkpoint(copied) / "ema.safetensors"
    header = read_header(file)
    header["conditions"]["width"] += 1
    save_file(load_file(file), file, metadata={KEY: json.dumps(header)})
    with pytest.raises(ValueError, match=r"context_embedder.weight is \(32, 16\), its header describes \(32, 17\)"):
        load_model(file)
