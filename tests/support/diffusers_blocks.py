"""Weights of our layers, copied into those of diffusers."""

import torch
from torch import nn


def randomised(module):
    """Weights far from the zero gates of initialisation, so that every path contributes."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2 + (1.0 if p.dim() == 1 and p.mean() == 1 else 0.0))
    return module


def copy_linear(target, source):
    target.load_state_dict(source.state_dict())


def copy_block(theirs, ours):
    """Weights of our Block into diffusers' BasicTransformerBlock (or its parts)."""
    projections = (theirs.attn1.to_q, theirs.attn1.to_k, theirs.attn1.to_v)
    weights, biases = ours.attn.qkv.weight.chunk(3, dim=0), ours.attn.qkv.bias.chunk(3, dim=0)
    with torch.no_grad():
        for projection, weight, bias in zip(projections, weights, biases, strict=True):
            projection.weight.copy_(weight)
            projection.bias.copy_(bias)
    copy_linear(theirs.attn1.to_out[0], ours.attn.proj)
    copy_linear(theirs.ff.net[0].proj, ours.mlp.fc1)
    copy_linear(theirs.ff.net[2], ours.mlp.fc2)
    copy_linear(theirs.norm1.linear, ours.adaLN_modulation[1])
    for name in ("q_norm", "k_norm"):
        if not isinstance(getattr(ours.attn, name), nn.Identity):
            copy_linear(getattr(theirs.attn1, {"q_norm": "norm_q", "k_norm": "norm_k"}[name]), getattr(ours.attn, name))


class FixedCondition(nn.Module):
    """Replaces an embedder: returns a condition that is computed outside, as our Block takes it."""

    def __init__(self, c):
        super().__init__()
        self.c = c

    def forward(self, *_, **__):
        return self.c
