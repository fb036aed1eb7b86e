"""Published MMDiT checkpoints of REPA's text-to-image code (github.com/sihyun-yu/REPA, models/mmdit.py).

{model, ema, opt, args, steps}, or a state dict. Names, shapes, time and velocity are those of `MMDiT`; besides, a file holds
the positions and heads `projectors.i.j`. Their class has width 32 x depth and as many heads as blocks, latents of 16 x 16
patches and text of 768 channels (CLIP ViT-L/14, 77 tokens: that number is in no tensor). Models with a pooled text vector
(`y_embedder`), register tokens, SwiGLU or norms with a bias are refused by the names of their tensors.
Shape legend: T latent tokens, L text tokens of E channels, D width, (C, H, W) latent.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from selftrans.messages import shape_text
from selftrans.models import label_published as shared
from selftrans.models.layers import sincos_positions
from selftrans.models.mmdit import MMDIT_SIZES, MMDiT, MMDiTConfig, build
from selftrans.models.spec import Layout, Named, Published, PublishedFile
from selftrans.types import Conditions

BLOCKS = "joint_blocks."
CONVENTION = "repa"
CLIP, TOKENS, TEXT_WIDTH = "openai/clip-vit-large-patch14", 77, 768  #: the text that it was trained on
HEAD_WIDTH, GRID = 32, 16  #: of the published class: channels of a head, side of its table of positions
RECIPES = {("MMDiT-B/2", (4, 32, 32)): "mmdit_coco"}


def read(file: PublishedFile, heads: int | None, chosen: str | None) -> Published | None:
    """A published file as an MMDiT; None without joint blocks. ValueError when it cannot be used."""
    named = file.named
    if not any(name.startswith(BLOCKS) for name in named):
        return None
    if chosen not in (None, CONVENTION):
        raise ValueError(f"{file.path} is an MMDiT, whose time is REPA's; omit --convention {chosen}")
    config, shape, width = _sizes(str(file.path), named, heads)
    conditions = Conditions("text", tokens=TOKENS, width=width, encoder=CLIP if width == TEXT_WIDTH else "")
    with torch.device("meta"):  # the sizes may be wrong: nothing is allocated before the shapes agree
        model = build(config, shape, conditions)
        null = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("null_")}
        network = {name: tensor for name, tensor in model.state_dict().items() if name not in null}
    sizes = config.sizes()
    for kind, tensors in file.weights.items():
        shared.check_tensors(
            file.where(kind), tensors, network, lambda: {"pos_embed": sincos_positions(model.width, model.grid)[None]}
        )
    known = config.name if config.width is None else None
    return Published(
        name=known or f"MMDiT of width {model.width}",
        sizes=", ".join(f"{key} {value}" for key, value in sizes.items()),
        config=config,
        shape=shape,
        conditions=conditions,
        convention=CONVENTION,
        reason="from --convention" if chosen else "the only one of this model",
        path=shared.check_arguments(file, file.args.get("num_classes", 0)),
        recipe=RECIPES.get((known or "", shape)),
        source={"heads": sizes["heads"]},
        is_head=shared.is_head,
        is_fixed="pos_embed".__eq__,
        is_buffer="pos_embed".__eq__,
        translate=lambda tensors, squares: _translate(tensors, null),
        cells=lambda layer: shared.cells(layer, model.patch, shape[0]),
    )


def _sizes(where: str, named: Named, heads: int | None) -> tuple[MMDiTConfig, tuple[int, int, int], int]:
    """Settings, shape of the latent, and width of the text tokens. ValueError when they cannot be read."""
    dims = {"x_embedder.proj.weight": 4, "pos_embed": 3, "context_embedder.weight": 2}
    shared.check_present(where, named, dims, "an MMDiT")
    width, channels, patch, _ = named["x_embedder.proj.weight"].shape
    tokens, text = named["pos_embed"].shape[1], named["context_embedder.weight"].shape[1]
    side = math.isqrt(tokens)
    if not width or not channels or not patch or not side or not text or side**2 != tokens:
        raise ValueError(f"{where} is not an MMDiT on square latents: {tokens} tokens, patches of {patch}")
    depth = len({name.split(".")[1] for name in named if name.startswith(BLOCKS)})
    norm = named.get(f"{BLOCKS}0.x_block.attn.ln_q.weight")
    known = width // len(norm) if norm is not None and norm.dim() == 1 and 0 < len(norm) <= width else None
    known = known or (depth if width == HEAD_WIDTH * depth else None)
    if heads and known and heads != known:
        raise ValueError(f"{where} has {known} attention heads; omit --heads {heads}")
    if not (heads or known):
        raise ValueError(
            f"{where} has width {width} and {depth} blocks, not {HEAD_WIDTH} channels for each block as published; set its "
            "number of attention heads with --heads"
        )
    own = {"width": width, "depth": depth, "heads": heads or known, "patch": patch}
    name = next((name for name, made in MMDIT_SIZES.items() if made == own), None)
    fields: dict[str, Any] = {"name": name} if name else own
    return (
        MMDiTConfig(**fields, qk_norm=norm is not None, zero_init=False),
        (channels, side * patch, side * patch),
        text,
    )


def _translate(named: Named, null: Named) -> Named:
    """The student's tensors in float32, without positions and heads.

    With weights (moments have no positions) the null caption, which is in no file: all zero, one that is not known yet.
    """
    own = {name: x.float() for name, x in named.items() if name != "pos_embed" and not shared.is_head(name)}
    zeros = {name: torch.zeros(x.shape, dtype=x.dtype) for name, x in null.items()}
    return own | zeros if "pos_embed" in named else own


# ---- our weights in their layout


def to_published(model: MMDiT) -> Named:
    """A published state dict with positions, without heads. The null caption is left out: their code stores it elsewhere."""
    named = {name: x for name, x in model.state_dict().items() if not name.startswith("null_")}
    return {"pos_embed": model.pos_embed.detach().clone(), **named}


def _arguments(model: MMDiT, config: MMDiTConfig) -> dict[str, Any]:
    """Arguments of the published class. ValueError where that class cannot hold this model, with what both have."""
    sizes, size = config.sizes(), shape_text(model.shape[1:])
    depth = sizes["depth"]
    fixed: tuple[tuple[bool, str, str], ...] = (
        (model.grid == (GRID, GRID), f"latents of {GRID}x{GRID} patches", f"latents of {size}, patch {model.patch}"),
        (
            sizes["width"] == HEAD_WIDTH * depth and sizes["heads"] == depth,
            f"width {HEAD_WIDTH} x depth and as many heads as blocks",
            ", ".join(f"{key} {sizes[key]}" for key in ("width", "depth", "heads")),
        ),
        (
            model.conditions.width == TEXT_WIDTH,
            f"text of {TEXT_WIDTH} channels",
            f"text of {model.conditions.width} channels",
        ),
        (not model.masked, "attention to the padding of captions", "attention that ignores it (model.masked)"),
    )
    for holds, theirs, ours in fixed:
        if not holds:
            raise ValueError(f"the published MMDiT has {theirs}, and this model {ours}; export the layout selftrans")
    return {
        "input_size": model.shape[1],
        "patch_size": model.patch,
        "in_channels": model.shape[0],
        "depth": depth,
        "qk_norm": "rms" if config.qk_norm else None,
        "encoder_depth": 1,
        "z_dims": [],
    }


LAYOUTS = {"repa": Layout("t = 0 is data, v = noise - data", to_published, _arguments)}
