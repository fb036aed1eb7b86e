"""The autoencoder of latent diffusion (VA-VAE is one) from its formulas, in float64, and a random state dict of it.

Nothing of selftrans or diffusers is used. Names, shapes and order are those of its repository.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.published_files import Tensors

Named = dict[str, Tensor]
#: 32 channels, as group norms have 32 groups; attention at the lowest resolution, as VA-VAE has it
TINY = {"ch": 32, "mult": (1, 2), "layers": 1, "z": 3, "attended": (1,)}


def state(ch: int, mult: tuple[int, ...], layers: int, z: int, attended: tuple[int, ...], seed: int = 0) -> Named:
    out = Tensors(seed)

    def resnet(name: str, columns: int, rows: int) -> None:
        out.norm(f"{name}.norm1", columns)
        out.conv(f"{name}.conv1", rows, columns, 3)
        out.norm(f"{name}.norm2", rows)
        out.conv(f"{name}.conv2", rows, rows, 3)
        if rows != columns:
            out.conv(f"{name}.nin_shortcut", rows, columns, 1)

    def attention(name: str, size: int) -> None:
        out.norm(f"{name}.norm", size)
        for part in ("q", "k", "v", "proj_out"):
            out.conv(f"{name}.{part}", size, size, 1)

    def level(name: str, columns: int, rows: int, count: int, attends: bool) -> None:
        for j in range(count):
            resnet(f"{name}.block.{j}", columns if j == 0 else rows, rows)
            if attends:
                attention(f"{name}.attn.{j}", rows)

    def middle(name: str, size: int) -> None:
        resnet(f"{name}.block_1", size, size)
        attention(f"{name}.attn_1", size)
        resnet(f"{name}.block_2", size, size)

    widths = [ch * m for m in mult]
    out.conv("encoder.conv_in", ch, 3, 3)
    for i, width in enumerate(widths):
        level(f"encoder.down.{i}", widths[max(i - 1, 0)], width, layers, i in attended)
        if i + 1 < len(widths):
            out.conv(f"encoder.down.{i}.downsample.conv", width, width, 3)
    middle("encoder.mid", widths[-1])
    out.norm("encoder.norm_out", widths[-1])
    out.conv("encoder.conv_out", 2 * z, widths[-1], 3)
    out.conv("decoder.conv_in", widths[-1], z, 3)
    middle("decoder.mid", widths[-1])
    for i in reversed(range(len(widths))):
        level(f"decoder.up.{i}", widths[min(i + 1, len(widths) - 1)], widths[i], layers + 1, i in attended)
        if i:
            out.conv(f"decoder.up.{i}.upsample.conv", widths[i], widths[i], 3)
    out.norm("decoder.norm_out", ch)
    out.conv("decoder.conv_out", 3, ch, 3)
    out.conv("quant_conv", 2 * z, 2 * z, 1)
    out.conv("post_quant_conv", z, z, 1)
    return dict(out)


class Network:
    """Encoder and decoder with the tensors of a state dict."""

    def __init__(self, named: Named) -> None:
        self.named = {name: tensor.double() for name, tensor in named.items()}
        self.levels = len({name.split(".")[2] for name in named if name.startswith("encoder.down.")})

    def conv(self, name: str, x: Tensor, **options: int) -> Tensor:
        weight = self.named[f"{name}.weight"]
        return F.conv2d(x, weight, self.named[f"{name}.bias"], **{"padding": weight.shape[-1] // 2, **options})

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.named[f"{name}.weight"], self.named[f"{name}.bias"], 1e-6)

    def resnet(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.named else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")  # (N, C, H W)
        scores = torch.softmax(torch.einsum("ncq,nck->nqk", q, k) / q.shape[1] ** 0.5, dim=-1)
        return x + self.conv(f"{name}.proj_out", torch.einsum("nqk,nck->ncq", scores, v).view_as(x))

    def level(self, name: str, x: Tensor) -> Tensor:
        j = 0
        while f"{name}.block.{j}.conv1.weight" in self.named:
            x = self.resnet(f"{name}.block.{j}", x)
            if f"{name}.attn.{j}.q.weight" in self.named:
                x = self.attention(f"{name}.attn.{j}", x)
            j += 1
        return x

    def middle(self, name: str, x: Tensor) -> Tensor:
        return self.resnet(f"{name}.block_2", self.attention(f"{name}.attn_1", self.resnet(f"{name}.block_1", x)))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels -> mean and standard deviation."""
        h = self.conv("encoder.conv_in", x.double())
        for i in range(self.levels):
            h = self.level(f"encoder.down.{i}", h)
            if i + 1 < self.levels:
                h = self.conv(f"encoder.down.{i}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2, padding=0)
        h = F.silu(self.norm("encoder.norm_out", self.middle("encoder.mid", h)))
        mean, logvar = self.conv("quant_conv", self.conv("encoder.conv_out", h)).chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar)

    def decode(self, z: Tensor) -> Tensor:
        h = self.middle("decoder.mid", self.conv("decoder.conv_in", self.conv("post_quant_conv", z.double())))
        for i in reversed(range(self.levels)):
            h = self.level(f"decoder.up.{i}", h)
            if i:
                h = F.interpolate(h, scale_factor=2, mode="nearest")
                h = self.conv(f"decoder.up.{i}.upsample.conv", h)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", h)))
