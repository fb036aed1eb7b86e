"""SiT against DiT of diffusers, published sizes, and the contract of a backbone."""

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

from selftrans.models.sit import SIT_SIZES, SiT
from selftrans.types import Backbone
from tests.support.diffusers_blocks import copy_block, copy_linear, randomised

TINY = {"width": 32, "depth": 4, "heads": 4, "patch": 2}


def tiny(shape=(4, 8, 8), num_classes=10, **options):
    torch.manual_seed(0)
    return SiT(shape, num_classes, **{**TINY, **options})


def inputs(model, n=3):
    g = torch.Generator().manual_seed(2)
    return (
        torch.randn(n, *model.shape, generator=g),
        torch.rand(n, generator=g),
        torch.arange(n) % max(1, model.num_classes),
    )


# ---- published sizes


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_parameter_counts_are_the_published_ones(size, millions):
    with torch.device("meta"):
        model = SiT((4, 32, 32), 1000, **SIT_SIZES[f"SiT-{size}/2"])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("name", SIT_SIZES)
def test_every_published_size_builds_and_runs(name):
    with torch.device("meta"):
        model = SiT((4, 32, 32), 1000, **SIT_SIZES[name])
        v, feats = model(
            torch.empty(2, 4, 32, 32), torch.empty(2), torch.zeros(2, dtype=torch.long), taps=(model.depth,)
        )
    assert v.shape == (2, 4, 32, 32)
    assert feats[model.depth].shape == (2, (32 // model.patch) ** 2, model.width)
    small = tiny((4, 16, 16), **{**SIT_SIZES[name], "depth": 1})  # the same width, heads and patch, with data
    assert torch.isfinite(small(*inputs(small, 1)).v).all()


# ---- against diffusers


def copy_embedder(theirs, ours):
    """Our embedders into diffusers' combined one, with DiT's frequencies (theirs divides by half - 1)."""
    theirs.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    copy_linear(theirs.timestep_embedder.linear_1, ours.t_embedder.mlp[0])
    copy_linear(theirs.timestep_embedder.linear_2, ours.t_embedder.mlp[2])
    copy_linear(theirs.class_embedder.embedding_table, ours.y_embedder.embedding_table)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_model_equals_diffusers_dit(learn_sigma):
    ours = randomised(tiny(learn_sigma=learn_sigma)).eval()
    theirs = DiTTransformer2DModel(
        num_attention_heads=TINY["heads"],
        attention_head_dim=TINY["width"] // TINY["heads"],
        in_channels=4,
        out_channels=8 if learn_sigma else 4,
        num_layers=TINY["depth"],
        sample_size=8,
        patch_size=TINY["patch"],
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    ).eval()
    copy_linear(theirs.pos_embed.proj, ours.x_embedder.proj)
    for their_block, our_block in zip(theirs.transformer_blocks, ours.blocks, strict=True):
        copy_block(their_block, our_block)
        copy_embedder(their_block.norm1.emb, ours)
    copy_linear(theirs.proj_out_1, ours.final_layer.adaLN_modulation[1])
    copy_linear(theirs.proj_out_2, ours.final_layer.linear)
    x, t, _ = inputs(ours)
    labels = torch.tensor([0, 7, 10])  # the last is the null label
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=labels).sample[:, :4]
        torch.testing.assert_close(ours(x, t, labels).v, expected, atol=1e-5, rtol=1e-5)


# ---- the contract of a backbone


def counted(model):
    """How often each block runs, by its number."""
    runs = [0] * model.depth
    for k, block in enumerate(model.blocks):
        inner = block.forward
        block.forward = lambda *args, k=k, inner=inner: (runs.__setitem__(k, runs[k] + 1), inner(*args))[1]
    return runs


@pytest.mark.parametrize("taps", [(1,), (2,), (1, 3), (3, 1), (2, 2), (4,)])
def test_stopping_computes_no_block_after_the_last_tap(taps):
    model = randomised(tiny())
    x, t, y = inputs(model)
    full = model(x, t, y, taps=taps)
    runs = counted(model)
    early = model(x, t, y, taps=taps, stop=True)
    assert runs == [1] * max(taps) + [0] * (model.depth - max(taps))
    assert early.v is None and full.v is not None and set(early.feats) == set(taps)
    for k in taps:
        assert torch.equal(early.feats[k], full.feats[k]) and full.feats[k].shape == (3, 16, 32)


def test_taps_do_not_change_the_velocity():
    model = randomised(tiny())
    x, t, y = inputs(model)
    assert torch.equal(model(x, t, y).v, model(x, t, y, taps=(1, 2, 3, 4)).v)
    assert model(x, t, y).feats == {}


def test_truncated_model_gives_the_same_features_and_no_velocity():
    model = randomised(tiny())
    x, t, y = inputs(model)
    expected = model(x, t, y, taps=(2,)).feats[2]
    parameters = sum(p.numel() for p in model.parameters())
    model.truncate(2)
    assert len(model.blocks) == 2 and sum(p.numel() for p in model.parameters()) < parameters
    assert torch.equal(model(x, t, y, taps=(2,), stop=True).feats[2], expected)
    with pytest.raises(AssertionError, match="truncated"):
        model(x, t, y)


def test_new_model_predicts_zero_and_its_blocks_are_the_identity():
    model = tiny()
    x, t, y = inputs(model)
    v, feats = model(x, t, y, taps=(1, 4))
    assert torch.equal(v, torch.zeros_like(x))
    assert torch.equal(feats[1], feats[4])


def test_initialisation_is_the_published_one():
    model = tiny(num_classes=1000, width=64, depth=2)
    for linear in (model.blocks[0].attn.qkv, model.blocks[1].mlp.fc1, model.blocks[1].attn.proj):
        bound = (6 / sum(linear.weight.shape)) ** 0.5  # Xavier, uniform
        assert 0.99 * bound < linear.weight.abs().max() <= bound and not linear.bias.any()
    bound = (6 / (4 * 2 * 2 + 64)) ** 0.5  # the patch convolution as the linear map it is
    assert 0.98 * bound < model.x_embedder.proj.weight.abs().max() <= bound and not model.x_embedder.proj.bias.any()
    for weight in (model.y_embedder.embedding_table.weight, *(model.t_embedder.mlp[i].weight for i in (0, 2))):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_null_is_the_label_after_the_last_class():
    model = tiny(num_classes=10)
    null = model.null(torch.tensor([3, 9]))
    assert null.tolist() == [10, 10] and null.dtype == torch.int64
    assert model.y_embedder.embedding_table.num_embeddings == 11
    assert isinstance(model, Backbone)


def test_model_without_classes():
    model = randomised(tiny(num_classes=0))
    x, t, _ = inputs(model)
    labels = torch.zeros(3, dtype=torch.long)
    assert torch.equal(model.null(labels), labels)
    assert model(x, t, labels).v.shape == x.shape


@pytest.mark.parametrize(("shape", "patch"), [((1, 8, 8), 2), ((3, 32, 32), 4), ((16, 12, 12), 1), ((4, 6, 6), 3)])
def test_square_latents_of_any_size(shape, patch):
    model = randomised(tiny(shape, patch=patch, depth=1))
    x, t, y = inputs(model, 2)
    assert model(x, t, y).v.shape == x.shape


@pytest.mark.parametrize("qk_norm", [False, True])
def test_condition_time_and_each_pixel_reach_the_velocity(qk_norm):
    model = randomised(tiny(qk_norm=qk_norm))
    x, t, y = inputs(model, 1)
    v = model(x, t, y).v
    assert not torch.allclose(model(x, t, y + 1).v, v) and not torch.allclose(model(x, t / 2, y).v, v)
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, t, y).v[0, 0, 0, 0], x)
    assert (gradient != 0).all()


def test_samples_of_a_batch_are_independent():
    model = randomised(tiny())
    x, t, y = inputs(model)
    torch.testing.assert_close(model(x, t, y).v[1:2], model(x[1:2], t[1:2], y[1:2]).v, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_learn_sigma_only_widens_the_output_layer(learn_sigma):
    model = tiny(learn_sigma=learn_sigma)
    assert model.final_layer.linear.out_features == 2 * 2 * 4 * (2 if learn_sigma else 1)
    assert model(*inputs(model)).v.shape == (3, 4, 8, 8)


def test_recomputing_gives_equal_gradients():
    model = randomised(tiny()).train()
    x, t, y = inputs(model)
    gradients = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        v, feats = model(x, t, y, taps=(2,))
        (v.square().mean() + feats[2].square().mean()).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bfloat16_weights_stay_close():
    model = randomised(tiny()).eval()
    x, t, y = inputs(model)
    expected = model(x, t, y, taps=(2,), stop=True).feats[2]
    found = model.to(torch.bfloat16)(x, t, y, taps=(2,), stop=True).feats[2]
    assert found.dtype == torch.bfloat16
    assert ((found.float() - expected).norm() / expected.norm()).item() < 0.03


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 8, 6), {}, "8x6"),
        ((4, 9, 9), {}, "patches of 2"),
        ((4, 8, 8), {"heads": 5}, "heads 5"),
        ((4, 8, 8), {"width": 30, "heads": 3}, "multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(shape, **options)
