"""Two backbones with three parameters each, whose features and velocity can be computed by hand, and helpers of the
tests of methods. Nothing here uses selftrans except its types.

    h_1 = a patches(x)        h_2 = h_1 + b t        h_3 = h_2 + c y        velocity = h_3 as an image: a x + b t + c y
"""

import math

import numpy as np
import torch
from torch import nn

from selftrans.types import Backbone, Conditions, Draw, Output


class Stub(Backbone):
    """Three blocks of one parameter each; y is a class label, and the null label is `num_classes`.

    `wide` repeats every token's channels; the inputs of every call are kept in `calls`.
    """

    def __init__(self, shape=(2, 4, 4), patch=2, num_classes=7, wide=1, abc=(0.5, -1.5, 0.25)):
        super().__init__()
        self.shape, self.patch, self.num_classes, self.wide = shape, patch, num_classes, wide
        self.grid = (shape[1] // patch, shape[2] // patch)
        self.conditions = Conditions("labels", num_classes)
        self.depth, self.width = 3, wide * shape[0] * patch**2
        self.a, self.b, self.c = (nn.Parameter(torch.tensor(x)) for x in abc)
        self.calls = []

    def null(self, cond):
        return torch.full_like(cond, self.num_classes)

    def patchify(self, x):
        n, (c, h, w), p = len(x), x.shape[1:], self.patch
        return x.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * p * p)

    def meaning(self, cond):
        """y of each sample (N,)."""
        return cond.to(self.c.dtype)

    def forward(self, x, t, cond, *, taps=(), stop=False):
        graph = torch.is_grad_enabled()
        self.calls.append({"x": x.clone(), "t": t.clone(), "cond": cond, "taps": taps, "stop": stop, "graph": graph})
        n, p = x.shape[0], self.patch
        c, h, w = self.shape
        tokens = x.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * p * p)
        h1 = self.a * tokens.repeat(1, 1, self.wide)
        h2 = h1 + self.b * t.view(n, 1, 1)
        h3 = h2 + self.c * self.meaning(cond).view(n, 1, 1)
        feats = {k: feature for k, feature in ((1, h1), (2, h2), (3, h3)) if k in taps}
        if stop:
            return Output(None, feats)
        back = h3[..., : c * p * p].reshape(n, h // p, w // p, c, p, p).permute(0, 3, 1, 4, 2, 5)
        return Output(back.reshape(n, c, h, w), feats)


class TextStub(Stub):
    """With a text-like condition: y is the mean of the unmasked tokens plus the mean of the pooled vector."""

    def null(self, cond):
        first = torch.zeros_like(cond["mask"])
        first[:, 0] = True
        return {"tokens": torch.zeros_like(cond["tokens"]), "mask": first, "pooled": torch.zeros_like(cond["pooled"])}

    def meaning(self, cond):
        kept = cond["mask"].to(cond["tokens"].dtype)
        mean = (cond["tokens"].mean(dim=-1) * kept).sum(dim=-1) / kept.sum(dim=-1)
        return mean + cond["pooled"].mean(dim=-1)


def handmade_draw(t, shape=(2, 4, 4), num_classes=7, dropped=(), even=False, seed=0):
    """A draw on the linear path with these times, computed here; the samples `dropped` have the null label."""
    g = torch.Generator().manual_seed(seed)
    t = torch.tensor(t)
    n = len(t)
    z0, noise = torch.randn(2, n, *shape, generator=g)
    cond = torch.randint(num_classes, (n,), generator=g)
    null = torch.full_like(cond, num_classes)
    seen = cond.clone()
    seen[list(dropped)] = num_classes
    s = t.view(n, 1, 1, 1)
    return Draw(z0, noise, t, (1 - s) * z0 + s * noise, noise - z0, cond, null, seen, even)


def numbers(tensor):
    return tensor.detach().double().numpy()


def patches_by_hand(image, patch):
    """(C, H, W) -> (T, C patch²): tokens row by row; inside a token channel, row, column."""
    channels, height, width = image.shape
    return np.array(
        [
            [image[c, i + di, j + dj] for c in range(channels) for di in range(patch) for dj in range(patch)]
            for i in range(0, height, patch)
            for j in range(0, width, patch)
        ]
    )


def mlp_by_hand(parameters, h):
    """Three linear layers with SiLU between, of one token h (D,)."""
    (w1, b1), (w2, b2), (w3, b3) = (parameters[i : i + 2] for i in (0, 2, 4))
    for w, b in ((w1, b1), (w2, b2)):
        h = w @ h + b
        h = np.array([x / (1 + math.exp(-x)) for x in h])
    return w3 @ h + b3


def layer_norm_by_hand(x, eps):
    return (x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + eps)


def gains_by_hand(t, timestep_range, mode):
    """The gain of each sample, from the definition of the three modes."""
    n = len(t)
    inside = [timestep_range is None or timestep_range[0] <= x <= timestep_range[1] for x in t]
    if timestep_range is None or mode == "select":
        return [x / n for x in inside]
    return [sum(inside) / n / n] * n


def features_by_hand(d, i, block, t=None, zt=None, cond=None, abc=(0.5, -1.5, 0.25)):
    """h_block (T, D) of a stub with the parameters `abc` for sample i of a draw; default: at its zt, t, condition."""
    a, b, c = abc
    h = a * patches_by_hand(numbers(d.zt[i] if zt is None else zt), 2)
    h = h + b * (d.t[i].item() if t is None else t) if block > 1 else h
    return h + c * (d.dropped[i] if cond is None else cond).item() if block > 2 else h


def cosine_by_hand(x, y):
    return (x @ y) / math.sqrt((x @ x) * (y @ y))
