"""Your own backbone in about 30 lines: tokens mixed by two small MLPs (2105.01601), trained for a few steps on digits.

Run it with `python examples/own_backbone.py`; it takes seconds. Shape legend: N batch, T tokens, D width, (C, H, W) latent.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

from selftrans import Backbone, Batch, Objective, Output, Stage1, StructureGuidance
from selftrans.models.layers import LabelEmbedder, Mlp, PatchEmbed, TimestepEmbedder, patchify, unpatchify
from selftrans.types import Conditions


class Mixer(Backbone):
    """MLPs along the tokens and along the channels; the condition is added to every token before each block."""

    def __init__(self, shape, conditions, width=64, depth=4, patch=2):
        super().__init__()
        self.shape, self.conditions = shape, conditions
        self.width, self.depth, self.patch = width, depth, patch
        self.grid = (shape[1] // patch, shape[2] // patch)
        self.embed, self.unembed = PatchEmbed(shape[0], patch, width), nn.Linear(width, shape[0] * patch**2)
        self.time, self.label = TimestepEmbedder(width), LabelEmbedder(conditions.num_classes, width)
        self.along_tokens = nn.ModuleList(Mlp(self.tokens, 2 * self.tokens) for _ in range(depth))
        self.along_width = nn.ModuleList(Mlp(width, 4 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, x, t, cond, *, taps=(), stop=False):
        h, feats = self.embed(x), {}  # (N, T, D)
        c = (self.time(t) + self.label(cond)).unsqueeze(1)  # (N, 1, D)
        for k, (tokens, channels) in enumerate(zip(self.along_tokens, self.along_width, strict=True), start=1):
            h = h + tokens(self.norm(h + c).transpose(1, 2)).transpose(1, 2)
            h = h + channels(self.norm(h + c))
            if k in taps:
                feats[k] = h
            if stop and len(feats) == len(set(taps)):  # a teacher needs no later block
                return Output(None, feats)
        return Output(unpatchify(self.unembed(self.norm(h)), self.patch, self.shape[0], self.grid), feats)

    def patchify(self, x):
        return patchify(x, (self.patch, self.patch))  # (N, T, C * patch²)


def main(steps: int = 100) -> list[float]:
    """Train it under stage-1 guidance; returns the flow losses."""
    torch.manual_seed(0)
    pixels, digit = load_digits(return_X_y=True)
    latents = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    labels = torch.tensor(digit)
    model = Mixer((1, 8, 8), Conditions("labels", 10))
    objective = Objective(model, [StructureGuidance(model, Stage1(block=2, head_width=128))])
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        rows = torch.randint(len(latents), (64,))
        loss, report = objective(Batch(latents[rows], labels[rows]), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(report["flow"]))
        if step % 10 == 0:
            print(f"step {step:3d}  flow loss {losses[-1]:.3f}  structure {float(report['structure']):.3f}")
    return losses


if __name__ == "__main__":
    main()
