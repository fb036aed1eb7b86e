"""Checkpoints in the published layouts of other code bases, and their network assembled from parts of diffusers.

Nothing of selftrans is used: names and order are those of the published modules, the arithmetic is that of diffusers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import (
    LabelEmbedding,
    PatchEmbed,
    TimestepEmbedding,
    Timesteps,
    get_2d_sincos_pos_embed,
)
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import Tensor, nn

Named = dict[str, Tensor]
#: arguments of `state` and `Assembled`
TINY = {"width": 32, "depth": 3, "heads": 2, "patch": 2, "channels": 1, "side": 8, "classes": 10}


class Tensors(Named):
    """Random tensors by name, added in the order in which a published module registers them."""

    def __init__(self, seed: int | None) -> None:
        """`seed` None: for tensors on the device meta, which takes no generator."""
        super().__init__()
        self.random = None if seed is None else torch.Generator().manual_seed(seed)

    def linear(self, name: str, rows: int, columns: int) -> None:
        self[f"{name}.weight"] = torch.randn(rows, columns, generator=self.random) / columns**0.5
        self[f"{name}.bias"] = 0.1 * torch.randn(rows, generator=self.random)

    def conv(self, name: str, rows: int, columns: int, side: int) -> None:
        kernel = torch.randn(rows, columns, side, side, generator=self.random)
        self[f"{name}.weight"] = kernel / (columns * side * side) ** 0.5
        self[f"{name}.bias"] = 0.1 * torch.randn(rows, generator=self.random)

    def norm(self, name: str, size: int, *, bias: bool = True) -> None:
        self[f"{name}.weight"] = 1 + 0.1 * torch.randn(size, generator=self.random)
        if bias:
            self[f"{name}.bias"] = 0.1 * torch.randn(size, generator=self.random)


def state(
    width: int,
    depth: int,
    heads: int,
    patch: int,
    channels: int,
    side: int,
    classes: int,
    *,
    qk_norm: bool = False,
    learn_sigma: bool = False,
    projectors: str | None = None,
    swiglu: bool = False,
    rms_norm: bool = False,
    shift: bool = True,
    rope: Named | None = None,
    seed: int = 0,
) -> Named:
    """A state dict of SiT, or with the options of LightningDiT, in the order in which the published modules register it.

    `projectors`: "repa" (a list of heads), "stage2" (one head) or "stage1" (one head and its last layer); `rope`: tables.
    """
    out, grid = Tensors(seed), side // patch
    out["pos_embed"] = get_2d_sincos_pos_embed(width, grid, base_size=grid, output_type="pt")[None].float()
    out.conv("x_embedder.proj", width, channels, patch)
    out.linear("t_embedder.mlp.0", width, 256)
    out.linear("t_embedder.mlp.2", width, width)
    out["y_embedder.embedding_table.weight"] = torch.randn(classes + 1, width, generator=out.random)
    out |= rope or {}
    hidden = int(2 / 3 * 4 * width) if swiglu else 4 * width
    for i in range(depth):
        for norm in ("norm1", "norm2") if rms_norm else ():
            out.norm(f"blocks.{i}.{norm}", width, bias=False)
        out.linear(f"blocks.{i}.attn.qkv", 3 * width, width)
        if qk_norm:  # small enough for the epsilon of the norms to matter
            out[f"blocks.{i}.attn.qkv.weight"][: 2 * width] *= 0.01 if rms_norm else 0.1
            for norm in ("q_norm", "k_norm"):
                out.norm(f"blocks.{i}.attn.{norm}", width // heads, bias=not rms_norm)
        out.linear(f"blocks.{i}.attn.proj", width, width)
        out.linear(f"blocks.{i}.mlp.{'w12' if swiglu else 'fc1'}", 2 * hidden if swiglu else hidden, width)
        out.linear(f"blocks.{i}.mlp.{'w3' if swiglu else 'fc2'}", width, hidden)
        out.linear(f"blocks.{i}.adaLN_modulation.1", (6 if shift else 4) * width, width)
    if projectors:
        first = "projectors.0." if projectors == "repa" else "projectors."
        for part, (rows, columns) in {"0": (16, width), "2": (16, 16), "4": (width, 16)}.items():
            out.linear(first + part, rows, columns)
    if projectors == "stage1":
        out.linear("projectors_final.linear", patch * patch * channels, width)
    if rms_norm:
        out.norm("final_layer.norm_final", width, bias=False)
    out.linear("final_layer.linear", patch * patch * channels * (2 if learn_sigma else 1), width)
    out.linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return dict(out)


def options(kind: str, **more: Any) -> argparse.Namespace:
    """The options that their training commands store in a checkpoint."""
    sit = {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity", "loss_weight": None, "ckpt": None}
    repa = {"model": "SiT-B/2", "path_type": "linear", "prediction": "v", "weighting": "uniform", "proj_coeff": 0.5}
    return argparse.Namespace(**{**(sit if kind == "sit" else repa), **more})


def adamw(named: Named, gradients: list[Named], **settings: Any) -> tuple[Named, dict[str, Any]]:
    """The parameters after a step of torch's AdamW with each of `gradients`, and its state_dict()."""
    parameters = {
        name: nn.Parameter(tensor.clone(), requires_grad=name != "pos_embed") for name, tensor in named.items()
    }
    optimizer = torch.optim.AdamW(parameters.values(), **{"lr": 1e-4, "weight_decay": 0.0} | settings)
    for step in gradients:
        for name, gradient in step.items():
            parameters[name].grad = gradient.clone()
        optimizer.step()
    return {name: p.detach().clone() for name, p in parameters.items()}, optimizer.state_dict()


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


class Given(nn.Module):
    """Replaces an embedder: returns the condition that was computed once for all blocks."""

    value: Tensor

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.value


class Assembled(nn.Module):
    """The published network from parts of diffusers, with the tensors of a published state dict, in its own time convention."""

    def __init__(
        self, named: Named, width: int, depth: int, heads: int, patch: int, channels: int, side: int, classes: int
    ) -> None:
        super().__init__()
        qk_norm = "blocks.0.attn.q_norm.weight" in named
        self.patch, self.channels = patch, channels
        self.patches = PatchEmbed(side, side, patch, channels, width)
        self.waves = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(256, width)
        self.label = LabelEmbedding(classes, width, dropout_prob=0.1)
        self.given = Given()
        self.blocks = nn.ModuleList(self._block(width, heads, qk_norm) for _ in range(depth))
        self.norm = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6)
        self.out = nn.Linear(width, len(named["final_layer.linear.bias"]))
        self._load(named)
        self.eval()

    def _block(self, width: int, heads: int, qk_norm: bool) -> BasicTransformerBlock:
        block = BasicTransformerBlock(
            width, heads, width // heads, activation_fn="gelu-approximate", num_embeds_ada_norm=1, attention_bias=True,
            norm_type="ada_norm_zero", norm_elementwise_affine=False, norm_eps=1e-6,
        )  # fmt: skip
        norm = "layer_norm" if qk_norm else None  # they use timm's attention, whose norms have torch's default epsilon
        block.attn1 = Attention(width, heads=heads, dim_head=width // heads, bias=True, qk_norm=norm, eps=1e-5)
        block.norm1.emb = self.given
        return block

    @torch.no_grad()
    def _load(self, named: Named) -> None:
        def fill(module: Any, name: str, pick: Any = lambda x: x) -> None:
            for part in ("weight", "bias"):
                getattr(module, part).copy_(pick(named[f"{name}.{part}"]))

        fill(self.patches.proj, "x_embedder.proj")
        self.patches.pos_embed.copy_(named["pos_embed"])
        fill(self.time.linear_1, "t_embedder.mlp.0")
        fill(self.time.linear_2, "t_embedder.mlp.2")
        self.label.embedding_table.weight.copy_(named["y_embedder.embedding_table.weight"])
        for i, block in enumerate(self.blocks):
            for k, projection in enumerate((block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)):
                fill(projection, f"blocks.{i}.attn.qkv", lambda x, k=k: x.chunk(3, dim=0)[k])
            if block.attn1.norm_q is not None:
                fill(block.attn1.norm_q, f"blocks.{i}.attn.q_norm")
                fill(block.attn1.norm_k, f"blocks.{i}.attn.k_norm")
            fill(block.attn1.to_out[0], f"blocks.{i}.attn.proj")
            fill(block.ff.net[0].proj, f"blocks.{i}.mlp.fc1")
            fill(block.ff.net[2], f"blocks.{i}.mlp.fc2")
            fill(block.norm1.linear, f"blocks.{i}.adaLN_modulation.1")
        # diffusers has scale, shift; the published layer shift, scale
        fill(self.norm.linear, "final_layer.adaLN_modulation.1", lambda x: torch.cat(x.chunk(2, dim=0)[::-1], dim=0))
        fill(self.out, "final_layer.linear")

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """(N, C, H, W), (N,), (N,) -> (N, C, H, W), without the second half of learn_sigma, as published."""
        self.given.value = self.time(self.waves(t)) + self.label.embedding_table(labels)
        tokens = self.patches(x)
        for block in self.blocks:
            tokens = block(tokens, timestep=t)
        tokens = self.out(self.norm(tokens, self.given.value))
        n, count, _ = tokens.shape
        side, p = int(count**0.5), self.patch
        pixels = tokens.reshape(n, side, side, p, p, -1)
        return torch.einsum("nhwpqc->nchpwq", pixels).reshape(n, -1, side * p, side * p)[:, : self.channels]
