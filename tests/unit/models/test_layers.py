"""The layers of a transformer against those of diffusers."""

import itertools
import math

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from torch import nn

from selftrans.models import layers
from tests.support.diffusers_blocks import FixedCondition, copy_block, randomised


@pytest.mark.parametrize("qk_norm", [False, True])
def test_block_equals_diffusers_block(qk_norm):
    width, heads = 48, 4
    ours = randomised(layers.Block(width, heads, 4.0, qk_norm))
    theirs = BasicTransformerBlock(
        width,
        heads,
        width // heads,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=10,
        attention_bias=True,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    ).eval()
    theirs.attn1 = DiffusersAttention(
        width, heads=heads, dim_head=width // heads, bias=True, qk_norm="layer_norm" if qk_norm else None, eps=1e-5
    )
    copy_block(theirs, ours)
    c = torch.randn(3, width)
    theirs.norm1.emb = FixedCondition(c)
    x = torch.randn(3, 16, width)
    torch.testing.assert_close(ours(x, c), theirs(x, timestep=torch.zeros(3)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("width", "side"), [(32, 4), (1152, 16), (384, 7)])
def test_positions_equal_diffusers(width, side):
    expected = get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt")
    torch.testing.assert_close(
        layers.sincos_positions(width, (side, side)).double(), expected.double(), atol=1e-6, rtol=0
    )


def test_compiled_gelu_is_that_of_torch(monkeypatch):
    """tanh u = 2 sigmoid(2 u) - 1, so both are one function: in float64 to rounding, in bfloat16 to one step of it."""
    x = torch.linspace(-30, 30, 20_001, dtype=torch.float64, requires_grad=True)
    expected = nn.functional.gelu(x, approximate="tanh")
    slope = torch.autograd.grad(expected.sum(), x)[0]
    assert torch.equal(layers.gelu(x), expected)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = layers.gelu(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], slope, rtol=1e-9, atol=1e-14)
    half = x.detach().bfloat16()
    assert layers.gelu(half).dtype == torch.bfloat16
    torch.testing.assert_close(
        layers.gelu(half), nn.functional.gelu(half.double(), approximate="tanh").bfloat16(), rtol=2**-7, atol=1e-6
    )


def test_timestep_sinusoids_equal_diffusers():
    embedder = layers.TimestepEmbedder(8)
    embedder.mlp = nn.Sequential(nn.Linear(256, 256))
    nn.init.eye_(embedder.mlp[0].weight)
    nn.init.zeros_(embedder.mlp[0].bias)
    t = torch.linspace(0, 1, 9)
    expected = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(embedder(t), expected, atol=1e-6, rtol=0)


def test_unpatchify_inverts_division_into_patches():
    n, c, side, patch = 2, 3, 8, 2
    x = torch.arange(n * c * side * side, dtype=torch.float32).view(n, c, side, side)
    tokens = torch.nn.functional.unfold(x, patch, stride=patch)  # (n, c p p, T), channel first inside a token
    tokens = tokens.view(n, c, patch * patch, -1).permute(0, 3, 2, 1).reshape(n, -1, patch * patch * c)
    assert torch.equal(layers.unpatchify(tokens, patch, c), x)


def test_tokens_are_ordered_row_by_row():
    embed = layers.PatchEmbed(1, 2, 4)
    nn.init.constant_(embed.proj.weight, 0.25)
    nn.init.zeros_(embed.proj.bias)
    x = torch.kron(torch.arange(9.0).view(3, 3), torch.ones(2, 2))[None, None]  # patch k holds the number k
    assert embed(x)[0, :, 0].tolist() == list(range(9))


@pytest.mark.parametrize("grid", [(5,), (3, 7), (4, 2, 5)])
def test_positions_equal_the_formula_token_by_token(grid):
    """Columns first, then rows, then frames; the channels of an axis are sines, then cosines."""
    width = 40
    split = {1: [40], 2: [20, 20], 3: [12, 12, 16]}[len(grid)]  # in the order of the channels
    expected = []
    for position in itertools.product(*map(range, grid)):
        token = []
        for place, channels in zip(reversed(position), split, strict=True):
            angles = [place / 10_000 ** (i / (channels / 2)) for i in range(channels // 2)]
            token += [*map(math.sin, angles), *map(math.cos, angles)]
        expected.append(token)
    found = layers.sincos_positions(width, grid).double()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_positions_of_a_line_equal_diffusers():
    expected = get_timestep_embedding(torch.arange(9), 32, flip_sin_to_cos=False, downscale_freq_shift=0)
    torch.testing.assert_close(layers.sincos_positions(32, (9,)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("channels", "axes", "parts"), [(64, 1, [64]), (64, 2, [32, 32]), (64, 3, [24, 20, 20])])
def test_channels_are_divided_among_axes(channels, axes, parts):
    assert layers.axis_channels(channels, axes, "") == parts


@pytest.mark.parametrize("cells", [(3,), (2, 4), (2, 1, 3)])
def test_patchify_equals_loops(cells):
    grid = (2, 3, 2)[: len(cells)]
    x = torch.randn(2, 3, *(g * p for g, p in zip(grid, cells, strict=True)))
    tokens = [
        x[(..., *(slice(i * p, (i + 1) * p) for i, p in zip(at, cells, strict=True)))].flatten(1)
        for at in itertools.product(*map(range, grid))
    ]
    found = layers.patchify(x, cells)
    assert torch.equal(found, torch.stack(tokens, dim=1))
    channel_last = found.unflatten(-1, (3, -1)).transpose(-1, -2).flatten(-2)
    assert torch.equal(layers.unpatchify(channel_last, cells, 3, grid), x)
