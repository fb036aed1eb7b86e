"""The block of the backbone `wave`. Shape legend: N batch, T tokens, D width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from selftrans.models.layers import modulate


class GatedBlock(nn.Module):
    """x + gate * W (tanh(a) sigmoid(b)), where (a, b) is a convolution of the modulated tokens. Initially gate is zero."""

    def __init__(self, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.conv = nn.Conv1d(width, 2 * width, kernel, padding="same", dilation=dilation)
        self.out = nn.Linear(width, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (N, T, D), (N, D) -> (N, T, D)
        shift, scale, gate = self.modulation(c).chunk(3, dim=-1)
        hidden = self.conv(modulate(self.norm(x), shift, scale).transpose(1, 2)).transpose(1, 2)  # (N, T, 2 D)
        a, b = hidden.chunk(2, dim=-1)
        return x + gate.unsqueeze(dim=1) * self.out(torch.tanh(a) * torch.sigmoid(b))
