"""SiT against DiT of diffusers, and published sizes."""

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

from selftrans.models.sit import SIT_SIZES, SiT
from tests.support.diffusers_blocks import copy_block, copy_linear, randomised
from tests.support.label_models import inputs

TINY = {"width": 32, "depth": 4, "heads": 4, "patch": 2}


def tiny(shape=(4, 8, 8), num_classes=10, **options):
    torch.manual_seed(0)
    return SiT(shape, num_classes, **{**TINY, **options})


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
