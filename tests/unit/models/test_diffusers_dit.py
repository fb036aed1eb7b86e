"""The adapter of diffusers' DiT against the original, in float64."""

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from selftrans.models.diffusers_dit import DiffusersDiT
from selftrans.types import Conditions
from tests.support.diffusers_blocks import randomised
from tests.support.diffusers_models import FAMILIES, inputs, original, tiny


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_equals_the_original(learn_sigma):
    model = tiny("dit", learn_sigma=learn_sigma).double().eval()
    x, t, labels = inputs(model, "dit", dtype=torch.float64)
    expected = original(model, "dit", x, t, labels)
    assert expected.shape[1] == (8 if learn_sigma else 4) and expected.std() > 0.1
    assert torch.equal(model.train()(x, t, labels).v, expected[:, :4])  # the original drops labels in training


def test_the_original_drops_labels_differently_in_each_block():
    """The reason for the adapter's own loop: what is switched off."""
    net = DiTTransformer2DModel(2, 12, num_layers=2, sample_size=8, num_embeds_ada_norm=10)
    embedders = [block.norm1.emb.class_embedder for block in net.transformer_blocks]
    assert all(e.dropout_prob == 0.1 for e in embedders)
    dropped = [e.token_drop(torch.zeros(1000, dtype=torch.long)) == 10 for e in embedders]
    assert all(50 < d.sum() < 200 for d in dropped) and not torch.equal(*dropped)
    DiffusersDiT(net, (4, 8, 8))
    assert all(e.dropout_prob == 0 and e.embedding_table.num_embeddings == 11 for e in embedders)


def test_positions_of_other_latents_are_those_that_the_original_interpolates():
    model = tiny("dit", shape=(4, 8, 12), sample_size=8)
    net = model.net
    expected = get_2d_sincos_pos_embed(48, (4, 6), base_size=4, output_type="pt").float()
    assert torch.equal(net.pos_embed.pos_embed[0], expected)
    fresh = randomised(DiTTransformer2DModel(2, 24, num_layers=1, sample_size=8, num_embeds_ada_norm=10)).pos_embed
    x = torch.randn(2, 4, 8, 12)
    net.pos_embed.proj.load_state_dict(fresh.proj.state_dict())
    assert torch.equal(model.embed(x, net.pos_embed.pos_embed), fresh(x))


def test_data_without_classes():
    module, kind = FAMILIES["dit"]
    model = module.build(kind(), (4, 8, 8), Conditions("none"))
    labels = torch.zeros(2, dtype=torch.long)
    assert model.conditions == Conditions("none") and torch.equal(model.null(labels), labels)
    assert model(torch.randn(2, 4, 8, 8), torch.rand(2), labels).v.shape == (2, 4, 8, 8)


def test_initial_blocks_are_the_identity():
    model = tiny("dit", random=False)
    x, t, labels = inputs(model, "dit")
    out = model(x, t, labels, taps=(1, 3))
    assert not out.v.any() and torch.equal(out.feats[1], out.feats[3]) and out.feats[1].std() > 0.1


def test_the_part_that_the_last_layer_shares_is_not_sharded():
    model = tiny("dit")
    assert model.sharded() == model.repeated()[1:]
