"""The convolutional head against sums over neighbours in loops, for latents of one to three dimensions."""

import itertools

import numpy as np
import pytest
import torch

from selftrans.methods.conv_head import ConvHead


@pytest.mark.parametrize("grid", [(5,), (2, 3), (2, 3, 2)])
def test_every_token_is_a_sum_over_its_neighbours(grid):
    torch.manual_seed(0)
    head, count = ConvHead(grid, 2, 3), int(np.prod(grid))
    torch.nn.init.normal_(head.conv.bias)
    tokens = torch.randn(2, count, 2)
    weight, bias = (p.detach().double().numpy() for p in (head.conv.weight, head.conv.bias))
    places = list(itertools.product(*map(range, grid)))  # token k is at places[k]: row by row
    expected = np.zeros((2, count, 3))
    for k, place in enumerate(places):
        expected[:, k] = bias
        for offset in itertools.product((-1, 0, 1), repeat=len(grid)):
            neighbour = tuple(p + o for p, o in zip(place, offset, strict=True))
            if neighbour in places:
                kernel = weight[(slice(None), slice(None), *(o + 1 for o in offset))]  # (out, D)
                expected[:, k] += tokens[:, places.index(neighbour)].double().numpy() @ kernel.T
    np.testing.assert_allclose(head(tokens).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_head_starts_with_xavier_weights_and_a_zero_bias():
    head = ConvHead((4, 4), 32, 48)
    bound = (6 / (9 * 32 + 9 * 48)) ** 0.5
    assert head.conv.weight.abs().max() <= bound and head.conv.weight.std().item() == pytest.approx(
        bound / 3**0.5, rel=0.05
    )
    assert not head.conv.bias.any()
