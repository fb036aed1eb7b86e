"""MMDiT, the multimodal diffusion transformer of Stable Diffusion 3 (Esser et al., 2403.03206, section 4 and figure 2): text
tokens and latent tokens, each with weights of their own, meet in joint attention.

As REPA trains it for text-to-image: time alone modulates (no pooled text vector), and positions are fixed. Parameter names are
those of REPA's code. Shape legend: N batch, T latent tokens, L text tokens of E channels, D width, h heads of d channels,
(C, *S) latent.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from selftrans.models.layers import (
    FinalLayer,
    Mlp,
    RMSNorm,
    TimestepEmbedder,
    attend,
    head_width,
    initialise,
    modulate,
    split_heads,
)
from selftrans.models.patch_transformer import PatchTransformer, SizedConfig, published_sizes
from selftrans.models.text_null import TextNull, check_text
from selftrans.types import MASK, TEXT, Cond, Conditions, Output

#: width, depth, heads. Published: B (REPA, appendix on text-to-image), with patches of 2. S is half as wide and half as deep
SIZES = {"S": (384, 12, 12), "B": (768, 24, 24)}
MMDIT_SIZES = published_sizes("MMDiT", SIZES, patches=(1, 2, 4))
MLP_RATIO = 4
#: kernels of attention under a mask: not cuDNN's, whose backward pass can give NaN there (pytorch issue 196678)
MASKED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class MMDiTConfig(SizedConfig):
    """An MMDiT. A field left at None comes from the size `name`; the published model is MMDiT-B/2."""

    published: ClassVar[Mapping[str, Mapping[str, int]]] = MMDIT_SIZES

    name: str = "MMDiT-B/2"
    """size, MMDiT-{S,B}/{1,2,4}"""
    qk_norm: bool = False
    """RMSNorm on queries and keys, as in Stable Diffusion 3.5; the published model has none"""
    masked: bool = False
    """attention ignores the padding of captions; the published model attends to all tokens of the text encoder"""
    zero_init: bool = True
    """adaLN-Zero: Xavier weights, zero gates and output; False: torch's own initialisation, as the published code has it"""


def build(config: MMDiTConfig, shape: tuple[int, ...], conditions: Conditions) -> MMDiT:
    """A freshly initialised MMDiT for latents (C, *S). ValueError for sizes that do not fit, and unless the data have text."""
    check_text(config.name, conditions)
    options: dict[str, Any] = {**config.sizes()}
    options |= {key: getattr(config, key) for key in ("patch_frames", "qk_norm", "masked", "zero_init")}
    return MMDiT(shape, conditions, **options)


class StreamAttention(nn.Module):
    """The part of attention of one stream: its queries, keys and values, and the projection of its result."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads, d = heads, head_width(width, heads)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj: nn.Linear | None = nn.Linear(width, width)
        self.ln_q: nn.Module = RMSNorm(d, eps=1e-6) if qk_norm else nn.Identity()
        self.ln_k: nn.Module = RMSNorm(d, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (N, T, D) -> three of (N, T, h, d)
        q, k, v = split_heads(self.qkv(x), self.heads)
        return self.ln_q(q).to(v.dtype), self.ln_k(k).to(v.dtype), v


class Stream(nn.Module):
    """One side of a joint block: norms, modulation, projections and MLP for the tokens of one kind."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = StreamAttention(width, heads, qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp: Mlp | None = Mlp(width, MLP_RATIO * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def enter(self, x: Tensor, c: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
        """x (N, T, D), c (N, D) -> queries, keys, values, and the modulation of what follows attention."""
        shift, scale, *rest = self.adaLN_modulation(c).chunk(6 if self.mlp is not None else 2, dim=-1)
        return self.attn(modulate(self.norm1(x), shift, scale)), rest

    def leave(self, x: Tensor, mixed: Tensor, rest: list[Tensor]) -> Tensor:
        """x (N, T, D) with the result `mixed` (N, T, D) of attention; empty (0,) if no later layer uses these tokens."""
        if self.mlp is None or self.attn.proj is None:
            return x.new_empty(0)
        gate1, shift2, scale2, gate2 = rest
        x = x + gate1.unsqueeze(dim=1) * self.attn.proj(mixed)
        return x + gate2.unsqueeze(dim=1) * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def keep_attention_inputs(self) -> None:
        """Delete what does not act before attention, in place: no later block reads the tokens of this stream."""
        if self.mlp is None:
            return
        self.mlp = self.attn.proj = None
        linear: Any = self.adaLN_modulation[1]
        linear.out_features //= 3  # shift and scale before attention
        for name, parameter in list(linear.named_parameters()):
            kept = parameter.detach()[: linear.out_features].clone()
            setattr(linear, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))


class JointBlock(nn.Module):
    """Transformer block of two streams: one attention over the text and latent tokens together, all else apart."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.context_block = Stream(width, heads, qk_norm)
        self.x_block = Stream(width, heads, qk_norm)

    def forward(self, context: Tensor, x: Tensor, c: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """context (N, L, D), x (N, T, D), c (N, D), mask (N, 1, 1, L + T) or None -> context, x.

        The last block, and the last one kept of a truncated model, returns no context but an empty tensor (0,).
        """
        of_context, context_rest = self.context_block.enter(context, c)
        of_x, x_rest = self.x_block.enter(x, c)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(of_context, of_x, strict=True))
        with sdpa_kernel(MASKED) if mask is not None and q.is_cuda else contextlib.nullcontext():
            mixed = attend(q, k, v, mask)  # (N, L + T, D)
        to_context, to_x = mixed.split([context.shape[1], x.shape[1]], dim=1)
        return self.context_block.leave(context, to_context, context_rest), self.x_block.leave(x, to_x, x_rest)


class MMDiT(TextNull, PatchTransformer):
    """A diffusion transformer conditioned on text: {"text": (N, L, E), "mask": (N, L) bool}.

    Args:
        shape: (C, *S) of a latent, as `PatchTransformer.cut` takes it; the published model takes squares.
        conditions: of kind text; L and E are `tokens` and `width`.
        qk_norm, masked, zero_init: see `MMDiTConfig`.
    Raises ValueError when the sizes do not fit each other.

    The null condition is the empty caption's row, which `use_null` stores in two buffers; checkpoints hold them.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        conditions: Conditions,
        *,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        patch_frames: int = 1,
        qk_norm: bool = False,
        masked: bool = False,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        self.keep_null(conditions)
        self.cut(shape, width=width, patch=patch, patch_frames=patch_frames)
        self.conditions, self.depth, self.masked = conditions, depth, masked
        self.t_embedder = TimestepEmbedder(width)
        self.context_embedder = nn.Linear(conditions.width, width)
        self.joint_blocks = nn.ModuleList(JointBlock(width, heads, qk_norm=qk_norm) for _ in range(depth))
        self._end_context()
        self.final_layer = FinalLayer(width, math.prod(self.cells) * shape[0])
        if zero_init:
            initialise(self)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, *, taps: tuple[int, ...] = (), stop: bool = False) -> Output:
        """x (N, C, *S), t (N,), text and mask -> velocity (N, C, *S) and the latent tokens after blocks `taps`."""
        assert isinstance(cond, dict) and all(1 <= k <= self.depth for k in taps)
        tokens, grid = self.embed(x)  # (N, T, D)
        context = self.context_embedder(cond[TEXT].to(self.context_embedder.weight.dtype))  # (N, L, D)
        c = self.t_embedder(t)  # (N, D)
        # (N, 1, 1, L + T): every query attends to all latent tokens
        masks = (F.pad(cond[MASK], (0, tokens.shape[1]), value=True)[:, None, None, :],) if self.masked else ()
        feats: dict[int, Tensor] = {}
        for k, block in enumerate(self.joint_blocks, start=1):
            context, tokens = self.run_block(block, context, tokens, c, *masks)
            if k in taps:
                feats[k] = tokens
            if stop and len(feats) == len(set(taps)):
                return Output(None, feats)
        return Output(self.velocity(tokens, c, grid), feats)

    def repeated(self) -> list[nn.Module]:
        return list(self.joint_blocks)

    def truncate(self, block: int) -> None:
        """As `Backbone`; of the text stream of `block` only the inputs of attention stay: no later block reads its text."""
        del self.joint_blocks[block:]
        self.final_layer = None
        self._end_context()

    def _end_context(self) -> None:
        last: Any = self.joint_blocks[-1]
        last.context_block.keep_attention_inputs()
