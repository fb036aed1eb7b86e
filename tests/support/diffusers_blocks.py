"""Weights of our layers, copied into those of diffusers."""

import copy

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


def copy_joint_block(theirs, ours):
    """Weights of our JointBlock into diffusers' JointTransformerBlock, of a last block, too."""
    sides = (
        (ours.x_block, ("to_q", "to_k", "to_v"), theirs.attn.to_out[0], theirs.norm1, theirs.ff, "norm_{}"),
        (
            ours.context_block,
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            getattr(theirs.attn, "to_add_out", None),
            theirs.norm1_context,
            theirs.ff_context,
            "norm_added_{}",
        ),
    )
    for stream, names, out, norm, ff, qk_norm in sides:
        copy_parts([getattr(theirs.attn, name) for name in names], stream.attn.qkv)
        for name in ("q", "k"):
            source = getattr(stream.attn, f"ln_{name}")
            if not isinstance(source, nn.Identity):  # theirs computes the variance in float32
                setattr(theirs.attn, qk_norm.format(name), copy.deepcopy(source))
        if stream.mlp is None:
            copy_scale_and_shift(norm.linear, stream.adaLN_modulation[1])
        else:
            copy_linear(norm.linear, stream.adaLN_modulation[1])
            copy_linear(out, stream.attn.proj)
            copy_linear(ff.net[0].proj, stream.mlp.fc1)
            copy_linear(ff.net[2], stream.mlp.fc2)


def copy_parts(targets, source):
    """One linear layer into several that each make a part of its output."""
    with torch.no_grad():
        for target, weight, bias in zip(
            targets, source.weight.chunk(len(targets), dim=0), source.bias.chunk(len(targets), dim=0), strict=True
        ):
            target.weight.copy_(weight)
            target.bias.copy_(bias)


def copy_scale_and_shift(target, source):
    """A layer that makes shift and scale into one of diffusers, which makes scale and shift."""
    with torch.no_grad():
        target.weight.copy_(torch.cat(source.weight.chunk(2, dim=0)[::-1]))
        target.bias.copy_(torch.cat(source.bias.chunk(2, dim=0)[::-1]))


def copy_mmdit(theirs, ours):
    """Weights of our MMDiT into diffusers' SD3Transformer2DModel, but for its embedding of time and pooled text."""
    copy_linear(theirs.pos_embed.proj, ours.x_embedder.proj)
    copy_linear(theirs.context_embedder, ours.context_embedder)
    for one, other in zip(theirs.transformer_blocks, ours.joint_blocks, strict=True):
        copy_joint_block(one, other)
    copy_scale_and_shift(theirs.norm_out.linear, ours.final_layer.adaLN_modulation[1])
    copy_linear(theirs.proj_out, ours.final_layer.linear)
