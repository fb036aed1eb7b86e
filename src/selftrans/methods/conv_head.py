"""A head that sees the neighbours of a token: one convolution over the grid, as in iREPA (Singh et al., 2512.10794).

Shape legend: N batch, T tokens, D width, (C, *S) latent of one to three spatial dimensions.
"""

from __future__ import annotations

from torch import Tensor, nn

from selftrans.methods.guidance import initialised

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ConvHead(nn.Module):
    """Tokens (N, T, D) -> (N, T, out) by a convolution of three tokens along each dimension of their grid, padded with zeros.

    `grid`: tokens along each dimension, for latents of another size than the model's; None: those of the model.
    """

    def __init__(self, grid: tuple[int, ...], width: int, out: int) -> None:
        super().__init__()
        self.grid = tuple(grid)
        self.conv = initialised(CONVOLUTIONS[len(grid) - 1](width, out, kernel_size=3, padding=1))

    def forward(self, tokens: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        maps = tokens.transpose(1, 2).unflatten(2, grid or self.grid)  # (N, T, D) -> (N, D, *grid)
        return self.conv(maps).flatten(2).transpose(1, 2)
