"""The contract of a backbone, for each family, latents of one to three dimensions, and other grids than a model's own."""

import pytest
import torch

from selftrans.methods.guidance import Frozen
from selftrans.methods.objective import Objective
from selftrans.methods.self_transcendence import SelfGuidance, Stage1, Stage2, StructureGuidance
from selftrans.models.registry import find
from selftrans.types import Backbone, Batch, Conditions
from tests.support.diffusers_blocks import randomised
from tests.support.label_models import FAMILIES, inputs, tiny

BLOCKS = ("SiT", "LightningDiT")  # DiT's are those of SiT
#: latents with one to three dimensions: shape, patches, grid
LATENTS = {
    "signal": ((3, 12), {"patch": 3}, (4,)),
    "square": ((2, 4, 4), {"patch": 1}, (4, 4)),
    "rectangle": ((3, 8, 4), {"patch": 2}, (4, 2)),
    "video": ((2, 4, 6, 4), {"patch": 2, "patch_frames": 2}, (2, 3, 2)),
}


@pytest.fixture(params=BLOCKS)
def model(request):
    return randomised(tiny(request.param, qk_norm=True))


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ---- blocks: stopping, features, truncation


@pytest.mark.parametrize("taps", [(1,), (1, 3), (3, 1), (2, 2), (4,)])
def test_stopping_computes_no_block_after_the_last_tap(model, taps):
    x, t, y = inputs(model)
    full, runs = model(x, t, y, taps=taps), []
    for k, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(lambda *_, k=k: runs.append(k))
    early = model(x, t, y, taps=taps, stop=True)
    assert runs == list(range(1, max(taps) + 1))
    assert early.v is None and full.v is not None and set(early.feats) == set(taps)
    for k in taps:
        assert torch.equal(early.feats[k], full.feats[k]) and full.feats[k].shape == (3, 4, 48)
    assert torch.equal(model(x, t, y).v, full.v) and model(x, t, y).feats == {}


def test_truncated_copy_gives_the_same_features_and_no_velocity(model):
    x, t, y = inputs(model)
    shallow = model.truncated(2)
    assert len(shallow.repeated()) == 2 and len(model.repeated()) == 4 and shallow.final_layer is None
    assert torch.equal(shallow(x, t, y, taps=(2,), stop=True).feats[2], model(x, t, y, taps=(2,)).feats[2])
    with pytest.raises(AssertionError, match="truncated"):
        shallow(x, t, y)


def test_recomputing_gives_equal_gradients(model):
    x, t, y = inputs(model.train())
    gradients = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        v, feats = model(x, t, y, taps=(2,))
        (v.square().mean() + feats[2].square().mean()).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_stays_close(model, how):
    x, t, y = inputs(model.eval())
    expected = model(x, t, y, taps=(2,), stop=True).feats[2]
    if how == "weights":
        found = model.to(torch.bfloat16)(x, t, y, taps=(2,), stop=True).feats[2]
        assert found.dtype == torch.bfloat16
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x, t, y, taps=(2,), stop=True).feats[2]
    assert ((found.float() - expected).norm() / expected.norm()).item() < 0.03


# ---- initialisation


@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize("kind", LATENTS)
def test_initialisation_is_the_published_one(family, kind):
    shape, patches, _ = LATENTS[kind]
    model = tiny(family, shape, num_classes=1000, width=96, depth=2, qk_norm=True, **patches)
    block, kernel = model.blocks[1], model.x_embedder.proj.weight
    mlp = (block.mlp.fc1, block.mlp.fc2) if family == "SiT" else (block.mlp.w12, block.mlp.w3)
    for linear in (model.blocks[0].attn.qkv, block.attn.proj, *mlp):
        bound = (6 / sum(linear.weight.shape)) ** 0.5  # Xavier, uniform
        assert 0.99 * bound < linear.weight.abs().max() <= bound and not linear.bias.any()
    bound = (6 / (96 + kernel[0].numel())) ** 0.5  # the patch convolution as the linear map that it is
    assert 0.95 * bound < kernel.abs().max() <= bound and not model.x_embedder.proj.bias.any()
    for weight in (model.y_embedder.embedding_table.weight, *(model.t_embedder.mlp[i].weight for i in (0, 2))):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.RMSNorm)):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight)) and norm.eps == 1e-6
    x, t, y = inputs(model)
    v, feats = model(x, t, y, taps=(1, 2))
    assert torch.equal(v, torch.zeros_like(x)) and torch.equal(feats[1], feats[2])


# ---- conditions


@pytest.mark.parametrize("family", FAMILIES)
def test_null_is_the_label_after_the_last_class(family):
    model = tiny(family)
    null = model.null(torch.tensor([3, 9]))
    assert null.tolist() == [10, 10] and null.dtype == torch.int64 and isinstance(model, Backbone)
    assert model.y_embedder.embedding_table.num_embeddings == 11


@pytest.mark.parametrize("family", FAMILIES)
def test_model_without_classes(family):
    spec = find(f"{family}-S/2")
    config = spec.Config(name=f"{family}-S/2", width=32, depth=1)
    model = randomised(spec.build(config, (2, 4, 4), Conditions("none")))
    x, t, _ = inputs(model)
    labels = torch.zeros(3, dtype=torch.long)
    assert torch.equal(model.null(labels), labels) and model(x, t, labels).v.shape == x.shape
    with pytest.raises(ValueError, match="the data have text"):
        spec.build(config, (2, 4, 4), Conditions("text"))


@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_learn_sigma_only_widens_the_output_layer(family, learn_sigma):
    model = tiny(family, learn_sigma=learn_sigma)
    assert model.final_layer.linear.out_features == 2 * 2 * 2 * (2 if learn_sigma else 1)
    assert model(*inputs(model)).v.shape == (3, 2, 4, 4)


# ---- latents of any shape


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", LATENTS)
def test_condition_time_and_each_cell_reach_the_velocity(family, kind):
    shape, patches, grid = LATENTS[kind]
    model = randomised(tiny(family, shape, depth=1, **patches))
    assert model.grid == grid and model.shape == shape
    x, t, y = inputs(model, 2)
    v, feats = model(x, t, y, taps=(1,))
    assert v.shape == x.shape and feats[1].shape == (2, model.tokens, 48)
    assert not torch.allclose(model(x, t, y + 1).v, v) and not torch.allclose(model(x, t / 2, y).v, v)
    close(model(x[1:], t[1:], y[1:]).v, v[1:])  # samples are independent
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, t, y).v[0].flatten()[0], x)
    assert (gradient[0] != 0).all() and not gradient[1].any()


@pytest.mark.parametrize("kind", LATENTS)
def test_tokens_of_the_input_targets_and_output_are_in_one_order(kind):
    """A model whose blocks are the identity and that passes each token's cells through is the identity on latents."""
    shape, patches, grid = LATENTS[kind]
    model = tiny(shape=shape, **patches)
    x, t, y = inputs(model)
    cells = x[0].numel() // model.tokens
    with torch.no_grad():
        kernel, final = model.x_embedder.proj.weight, model.final_layer
        kernel.copy_(torch.eye(48)[:, :cells].view_as(kernel))  # channels of a token: (channel, cell)
        model.pos_embed.zero_()
        final.norm_final = torch.nn.Identity()
        out = torch.eye(48)[:cells].view(shape[0], -1, 48).transpose(0, 1)  # the last layer's order: (cell, channel)
        final.linear.weight.copy_(out.reshape(cells, 48))
    v, feats = model(x, t, y, taps=(1,))
    assert torch.equal(v, x) and torch.equal(feats[1][..., :cells], model.patchify(x))
    assert torch.equal(model.patchify(x)[:, 0, 0], x.flatten(2)[:, 0, 0])
    steps = [n // g for n, g in zip(shape[1:], grid, strict=True)]  # tokens are in the order of the grid
    assert torch.equal(
        model.patchify(x)[..., 0], x[:, 0][(slice(None), *(slice(None, None, s) for s in steps))].flatten(1)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", LATENTS)
def test_another_grid_than_its_own_equals_a_model_made_for_it(family, kind):
    shape, patches, _ = LATENTS[kind]
    own = randomised(tiny(family, shape, depth=2, **patches))
    other = (shape[0], *(side + 2 * p for side, p in zip(shape[1:], own.cells, strict=True)))
    made = tiny(family, other, depth=2, **patches)
    made.load_state_dict(own.state_dict())
    x, t, y = inputs(made)
    expected, found = made(x, t, y, taps=(1,)), own(x, t, y, taps=(1,))
    assert torch.equal(found.v, expected.v) and torch.equal(found.feats[1], expected.feats[1])
    small = own.to(torch.bfloat16)(x, t, y, taps=(1,), stop=True).feats[1]
    assert small.dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", LATENTS)
def test_both_stages_train_on_each_kind_of_latent(family, kind):
    """The second step of each stage has latents of another shape, as batches of other aspect ratios have."""
    shape, patches, _ = LATENTS[kind]
    teacher, student = (tiny(family, shape, **patches) for _ in range(2))
    narrow = {"head_width": 16, "timestep_range": None}
    first = [StructureGuidance(teacher, Stage1(block=1, **narrow))]
    for model, guidances in ((teacher, first), (student, None)):
        guidances = guidances or [SelfGuidance(student, Frozen(teacher, 3), Stage2(student_block=2, **narrow))]
        objective = Objective(model, guidances)
        optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
        before = [p.detach().clone() for p in model.parameters()]
        for step, longer in enumerate((0, 1, 0)):
            other = (shape[0], *(side + longer * p for side, p in zip(shape[1:], model.cells, strict=True)))
            loss, report = objective(Batch(torch.randn(4, *other), torch.arange(4)), step)
            assert loss.isfinite() and report["flow"] > 0
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert sum(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)) > 20


@pytest.mark.slow
def test_another_grid_is_compiled_without_graph_breaks():
    model = randomised(tiny("LightningDiT", depth=1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for shape in ((2, 4, 4), (2, 4, 8), (2, 6, 2)):
        close(compiled(*inputs(model, shape=shape)).v, model(*inputs(model, shape=shape)).v)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 9, 9), {}, "patches of 2; change model.patch, or take .* sides are multiples of 2"),
        ((4, 9), {}, "a latent of 9 does not"),
        (
            (4, 4, 3, 4),
            {"patch_frames": 2},
            "4x3x4 does not divide into patches of 2; change model.patch or model.patch_frames,",
        ),
        ((4, 4, 3, 4), {"patch_frames": 4}, "4x3x4 does not divide into patches of 4x2x2;"),
        ((4, 8, 8), {"heads": 5}, "width 48 is not a multiple of heads 5"),
        ((4, 8, 8), {"width": 30, "heads": 3}, "2 axes need a multiple of 4 channels, not 30.*change model.width"),
        ((4, 2, 4, 4), {"width": 4, "heads": 2}, "3 axes .* at least 6"),
        ((4,), {}, r"takes latents \(C, L\), \(C, H, W\) or"),
        ((4, 2, 2, 2, 2), {}, r"not \(4, 2, 2, 2, 2\)"),
        ((4, 8, 8), {"patch_frames": 2}, "for latents with frames"),
    ],
)
@pytest.mark.parametrize("family", BLOCKS)
def test_sizes_that_do_not_fit_are_refused(family, shape, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(family, shape, **options)


def test_rotations_need_enough_channels():
    with pytest.raises(ValueError, match=r"a multiple of 4 channels, not 6.*model\.heads, or set model\.rope False"):
        tiny("LightningDiT", width=36, heads=6)


def test_latents_that_do_not_divide_are_refused_in_a_call():
    model = tiny()
    for shape, message in (((2, 5, 4), "5x4 does not divide"), ((2, 4), "of 4 does not divide")):
        with pytest.raises(ValueError, match=message):
            model(*inputs(model, shape=shape))


@pytest.mark.parametrize("name", ["SiT-S/2", "DiT-S/2", "LightningDiT-S/1"])
def test_only_the_label_table_depends_on_its_deviation(name):
    tables = {}
    for std in (0.02, 0.5):
        torch.manual_seed(0)
        family = find(name)
        config = family.Config(name=name, width=32, depth=1, heads=2, label_std=std)
        tables[std] = family.build(config, (4, 8, 8), Conditions("labels", 1000)).state_dict()
    small, large = (tables[std].pop("y_embedder.embedding_table.weight") for std in (0.02, 0.5))
    assert large.std() == pytest.approx(0.5, rel=0.02)
    torch.testing.assert_close(large / 25, small)
    assert all(torch.equal(tables[0.02][key], tables[0.5][key]) for key in tables[0.02])


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf")])
def test_deviation_of_the_label_table_is_checked(wrong):
    with pytest.raises(ValueError, match=r"model\.label_std must be between 0 and 100, not "):
        find("SiT-S/2").Config(label_std=wrong).check()
