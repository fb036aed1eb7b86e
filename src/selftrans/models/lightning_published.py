"""Published checkpoints of LightningDiT (github.com/hustvl/LightningDiT): a state dict, or {model, ema, opt, config}.

Besides SiT's tensors they hold those of the options (`mlp.w12`, weights of norms) and the tables of the rotary positions as
`feat_rope.freqs_cos` and `feat_rope.freqs_sin` (T, d), each angle twice. Their training code is SiT's: time runs from
noise to data and the velocity is data minus noise, which is folded into the weights as `sit_published` does.
A LightningDiT without rotary positions, SwiGLU, RMSNorm and with shifts has SiT's names, shapes and arithmetic, and is read
as a SiT. Shape legend: T tokens, D width, d channels of an attention head, (C, H, W) latent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selftrans.models import sit_published as sit
from selftrans.models.layers import sincos_positions
from selftrans.models.lightning import LIGHTNING_SIZES, OPTIONS, SIZES, LightningConfig, LightningDiT, rotation_table
from selftrans.models.spec import Layout, Named, Published, PublishedFile, check_shapes
from selftrans.types import Conditions

ROPE = {"feat_rope.freqs_cos": 0, "feat_rope.freqs_sin": 1}  #: names of the rotary tables -> their row of ours


def options(named: Named) -> dict[str, bool]:
    """What the names and shapes of a state dict say of the options; all as in SiT: it is none that only LightningDiT has."""

    def rows(name: str) -> int:
        return named[name].shape[0] if name in named and named[name].dim() else 0

    modulation, width = rows("blocks.0.adaLN_modulation.1.bias"), rows("blocks.0.attn.proj.bias")
    return {
        "qk_norm": "blocks.0.attn.q_norm.weight" in named,
        "swiglu": "blocks.0.mlp.w12.weight" in named,
        "rope": any(name in named for name in ROPE),
        "rms_norm": "blocks.0.norm1.weight" in named,
        "shift": not width or modulation != 4 * width,
    }


def sizes(where: str, named: Named, heads: int | None) -> sit.Sizes:
    """Sizes of the model that a state dict belongs to. ValueError where they do not fit, or `heads` must be given."""
    x, table = named.get("x_embedder.proj.weight"), named.get("feat_rope.freqs_cos")
    width = len(x) if x is not None and x.dim() else 0
    known = width // table.shape[1] if table is not None and table.dim() == 2 and table.shape[1] else None
    if heads is not None and known is not None and heads != known:
        raise ValueError(f"{where} has {known} attention heads, from its rotary positions; omit --heads {heads}")
    normalised = "blocks.0.attn.q_norm.weight" in named  # says the heads itself
    usual = None if normalised else next((h for w, _, h in SIZES.values() if w == width), None)
    return sit.sizes(where, named, heads or known or usual, "LightningDiT")


def check(where: str, named: Named, found: sit.Sizes, parts: dict[str, bool]) -> None:
    """ValueError that lists what is unknown, missing or misshapen, a few of each, and tables that are not the fixed ones."""
    own = {key: getattr(found, key) for key in ("width", "depth", "heads", "patch", "learn_sigma")}
    with torch.device("meta"):
        model = LightningDiT(found.shape, found.classes, **own, **parts)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected["pos_embed"] = (1, model.tokens, found.width)
    expected |= {name: (model.tokens, found.width // found.heads) for name in ROPE if parts["rope"]}
    check_shapes(where, {name: tensor for name, tensor in named.items() if not sit.is_head(name)}, expected)
    side = found.shape[1] // found.patch
    sit.check_table(where, "pos_embed", named["pos_embed"], sincos_positions(found.width, side))
    if parts["rope"]:
        for name, true in rope_tables(found.width // found.heads, (side, side)).items():
            sit.check_table(where, name, named[name], true)


def rope_tables(channels: int, grid: tuple[int, int]) -> Named:
    """The published tables (T, d) float32: of each angle twice, for both channels of its pair."""
    table = rotation_table(channels, grid).float().repeat_interleave(2, dim=-1)
    return {name: table[row].clone() for name, row in ROPE.items()}


def translate(named: Named, found: sit.Sizes, *, flip: bool, squares: bool = False) -> Named:
    """The student's tensors as `sit_published.translate` gives them, without the rotary tables."""
    return sit.translate({k: t for k, t in named.items() if k not in ROPE}, found, flip=flip, squares=squares)


def read(file: PublishedFile, heads: int | None, chosen: str | None) -> Published | None:
    """A published file as a LightningDiT; None where nothing in it is LightningDiT's own. ValueError: it cannot be used."""
    named = file.weights.get("raw") or file.weights["ema"]
    parts = options(named)
    if not (parts["swiglu"] or parts["rope"] or parts["rms_norm"] or not parts["shift"]):
        return None
    found = sizes(str(file.path), named, heads)
    for kind, tensors in file.weights.items():
        check(f"{file.path} ({kind} weights)" if len(file.weights) > 1 else str(file.path), tensors, found, parts)
    sit.check_arguments(file, found)
    own = {key: getattr(found, key) for key in ("width", "depth", "heads", "patch")}
    known = next((name for name, made in LIGHTNING_SIZES.items() if made == own), None)
    fields: dict[str, Any] = {**parts, **({"name": known} if known else own)}
    config = LightningConfig(**fields)
    if chosen == "dit":
        raise ValueError(f"{file.path} is a LightningDiT, which predicts velocity, not noise; omit --convention dit")
    source, reason = (chosen, "from --convention") if chosen else ("sit", _reason(file, named))
    flip = source == "sit"
    return Published(
        name=known or f"LightningDiT of width {found.width}",
        sizes=", ".join(f"{key} {value}" for key, value in own.items()),
        config=config,
        shape=found.shape,
        conditions=Conditions("labels" if found.classes else "none", found.classes),
        convention=source,
        reason=reason,
        path=sit.PATH_NAMES[str(file.args.get("path_type", "linear"))],
        recipe=None,
        source={"heads": found.heads},
        is_head=sit.is_head,
        is_fixed=lambda name: name == "pos_embed" or name in ROPE,
        translate=lambda tensors, squares: translate(tensors, found, flip=flip, squares=squares),
        cells=lambda layer: sit.cells(layer, found.patch, found.shape[0]),
        is_buffer=lambda name: name in ROPE,
    )


def _reason(file: PublishedFile, named: Named) -> str:
    if file.layout == "lightningdit":
        return "from its header"
    if any(map(sit.is_head, named)):
        return "a guess: as LightningDiT's own code has it, but its projectors are of another one; --convention decides"
    return "as LightningDiT's code has it"


# ---- our weights in their layout


def give_back(model: LightningDiT) -> Named:
    """The inverse of `translate` without learn_sigma: a published state dict, tables of positions included."""
    named = dict(model.state_dict())
    channels, side, _ = model.shape
    found = sit.Sizes(model.width, model.depth, 0, model.patch, (channels, side, side), model.num_classes, False, False)
    out = {"pos_embed": model.pos_embed.detach().clone()}  # type: ignore[operator]
    for name, tensor in translate(named, found, flip=True).items():
        out[name] = tensor
        if name == "y_embedder.embedding_table.weight" and isinstance(model.rotations, Tensor):  # their order
            out |= rope_tables(2 * model.rotations.shape[-1], (model.grid[0], model.grid[1]))
    return out


def _arguments(model: LightningDiT, config: LightningConfig) -> dict[str, Any]:
    """Arguments of the published `LightningDiT` class."""
    channels, rows, columns = model.shape
    if rows != columns:
        raise ValueError(
            f"the published LightningDiT takes square latents, and this one {rows}x{columns}; use another layout"
        )
    theirs = {"qk_norm": "use_qknorm", "swiglu": "use_swiglu", "rope": "use_rope", "rms_norm": "use_rmsnorm"}
    return {
        "input_size": rows,
        "patch_size": model.patch,
        "in_channels": channels,
        "hidden_size": model.width,
        "depth": model.depth,
        "num_heads": config.sizes()["heads"],
        "num_classes": model.num_classes,
        "learn_sigma": False,
        **{theirs[key]: getattr(config, key) for key in OPTIONS if key in theirs},
        "wo_shift": not config.shift,
    }


LAYOUTS = {"lightningdit": Layout("t = 0 is noise, v = data - noise", give_back, _arguments)}
