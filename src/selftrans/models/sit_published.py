"""Published checkpoints of SiT: what their names and shapes say, and the same weights under our names and in our time.

    SiT (github.com/willisma/SiT)     a plain state dict (also under state_dict), or {model, ema, opt, args}
    REPA (github.com/sihyun-yu/REPA)  {model, ema, opt, args, steps}; heads `projectors.i.j` inside the model
    Self-Transcendence (github.com/csslc/Self-Transcendence)  the same; heads `projectors.j`, in stage 1 `projectors_final` too
each as torch.save or safetensors writes it, also with the wrappers' prefixes `module.` and `_orig_mod.`.

The original SiT counts time from noise to data and predicts data minus noise. Both are folded into the weights, exactly:
the sinusoids of 1 - t are a reflection of those of t,
    cos(w - wt) = cos w cos wt + sin w sin wt        sin(w - wt) = sin w cos wt - cos w sin wt
so the first layer after them is multiplied by that reflection (its own inverse), and the last layer changes sign.
Shape legend: T tokens, D width, (C, H, W) latent.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from selftrans.models.layers import sincos_positions, time_rates
from selftrans.models.sit import SIT_SIZES, SIZES, SiT, SiTConfig
from selftrans.models.spec import Layout, Named, Published, PublishedFile, check_shapes, few
from selftrans.types import Conditions

Convention = Literal["sit", "repa"]

#: how far a table of positions may be from the true one: averages of it drift, half precision rounds it
POSITIONS = 2e-3
#: why a file whose last layer has the unused half of learn_sigma is taken for one of SiT
LIKE_DIT = "a guess: its last layer has the unused half of learn_sigma, as DiT's has too; --convention decides"
#: paths by their names in SiT's and REPA's options; GVP is the cosine path
PATH_NAMES = {"linear": "linear", "cosine": "cosine", "Linear": "linear", "GVP": "cosine"}


class Sizes(NamedTuple):
    """What the shapes of a state dict say of its model."""

    width: int
    depth: int
    heads: int
    patch: int
    shape: tuple[int, int, int]
    classes: int
    qk_norm: bool
    learn_sigma: bool


# ---- what the shapes say


def is_head(name: str) -> bool:
    """Whether a tensor belongs to a projection head, which is no part of the student."""
    return name.startswith(("projectors.", "projectors_final."))


def sizes(where: str, named: Named, heads: int | None = None) -> Sizes:
    """Sizes of the model that a state dict belongs to. ValueError where it is no SiT, or `heads` must be given."""
    needed = {
        "x_embedder.proj.weight": 4,
        "pos_embed": 3,
        "y_embedder.embedding_table.weight": 2,
        "final_layer.linear.weight": 2,
    }
    for name, dims in needed.items():
        if name not in named or named[name].dim() != dims:
            what = (
                f"{name} is missing" if name not in named else f"{name} has {named[name].dim()} dimensions, not {dims}"
            )
            raise ValueError(f"{where} is no SiT: {what}; it holds {few(named)}")
    width, channels, patch, _ = named["x_embedder.proj.weight"].shape
    tokens, rows = named["pos_embed"].shape[1], named["y_embedder.embedding_table.weight"].shape[0]
    grid = int(tokens**0.5)
    if not width or not channels or not patch or not rows or not grid or grid**2 != tokens:
        raise ValueError(f"{where} is no SiT on square latents: {tokens} tokens, {rows} labels, patches of {patch}")
    q_norm = named.get("blocks.0.attn.q_norm.weight")
    known = width // len(q_norm) if q_norm is not None and q_norm.dim() and len(q_norm) else None
    published = next((h for w, _, h in SIZES.values() if w == width), None)
    if heads is not None and known is not None and heads != known:
        raise ValueError(f"{where} has {known} attention heads, by the width of its q_norm; leave out --heads {heads}")
    chosen = heads or known or published
    if chosen is None:
        raise ValueError(f"{where} has width {width}, which is no published size; say its attention heads with --heads")
    doubled = named["final_layer.linear.weight"].shape[0] == 2 * patch * patch * channels
    depth = len({name.split(".")[1] for name in named if name.startswith("blocks.")})
    shape = (channels, grid * patch, grid * patch)
    return Sizes(width, depth, chosen, patch, shape, rows - 1, q_norm is not None, doubled)


def check(where: str, named: Named, found: Sizes) -> None:
    """ValueError that lists what is unknown, missing or misshapen, a few of each, and positions that are not the fixed ones."""
    with torch.device("meta"):
        model = SiT(
            found.shape,
            found.classes,
            width=found.width,
            depth=found.depth,
            heads=found.heads,
            patch=found.patch,
            qk_norm=found.qk_norm,
            learn_sigma=found.learn_sigma,
        )
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected["pos_embed"] = (1, (found.shape[1] // found.patch) ** 2, found.width)
    check_shapes(where, {name: tensor for name, tensor in named.items() if not is_head(name)}, expected)
    true = sincos_positions(found.width, found.shape[1] // found.patch)
    off = (named["pos_embed"][0].float() - true).abs().max().item()
    if not off <= POSITIONS:
        raise ValueError(f"{where}: pos_embed is not the fixed table of sines and cosines (off by {off:.2g})")


def convention(found: PublishedFile, named: Named, learn_sigma: bool) -> tuple[Convention, str]:
    """Whose time and sign the weights have, and what tells: a header, the options kept, the heads, or, at last, a guess.

    Warns where the file may as well be one of DiT, which has SiT's names and shapes but predicts noise.
    """
    told: tuple[tuple[bool, Convention, str], ...] = (
        (found.layout == "sit", "sit", "as its header says"),
        (found.layout == "repa", "repa", "as its header says"),
        (found.args.get("prediction") == "v", "repa", "as the options kept in it show"),
        (found.args.get("prediction") is not None, "sit", "as the options kept in it show"),
        (any(map(is_head, named)), "repa", "for it holds projectors"),
        (found.steps is not None, "repa", "for it counts its steps"),
        (learn_sigma, "sit", LIKE_DIT),
        (
            "blocks.0.attn.q_norm.weight" in named,
            "repa",
            "a guess: the original SiT has no QK-norm; --convention decides",
        ),
    )
    chosen, why = next(
        ((c, why) for holds, c, why in told if holds), ("sit", "a guess: nothing tells; --convention decides")
    )
    if why == LIKE_DIT:
        warnings.warn(
            f"{found.path} may be a file of DiT, whose names and shapes are the same, but which predicts noise: if it is, say "
            "--convention dit; if it is one of SiT, --convention sit",
            stacklevel=3,
        )
    return chosen, why


# ---- our names and our time


def reflection(frequencies: int) -> Tensor:
    """(F, F) float64: what turns the sinusoids of t into those of 1 - t; symmetric, and its own inverse."""
    w = time_rates(frequencies).double()
    cosine, sine = torch.diag(torch.cos(w)), torch.diag(torch.sin(w))
    return torch.cat([torch.cat([cosine, sine], dim=1), torch.cat([sine, -cosine], dim=1)], dim=0)


def translate(named: Named, found: Sizes, *, flip: bool, squares: bool = False) -> Named:
    """The student's tensors in float32, in our time if `flip`, without positions, heads and the half that learn_sigma adds.

    `squares`: these are second moments of the optimiser. They do not turn exactly, as the products of different
    frequencies were never kept: those are taken for zero. Everything else is exact.
    """
    out = {}
    for name, tensor in named.items():
        if name == "pos_embed" or is_head(name):
            continue
        x = tensor.float()
        if name.startswith("final_layer.linear."):
            x = x.reshape(found.patch**2, -1, *x.shape[1:])[:, : found.shape[0]].flatten(end_dim=1)
            x = -x if flip and not squares else x
        elif name == "t_embedder.mlp.0.weight" and flip:
            turn = reflection(x.shape[1])
            x = (tensor.double() @ (turn.square() if squares else turn)).float()
        out[name] = x
    return out


def cells(layer: Tensor, patch: int, channels: int) -> Tensor:
    """Rows of a layer that predicts a token's cells pixel by pixel (row, column, channel), in `SiT.patchify`'s order."""
    if not layer.dim() or len(layer) != patch**2 * channels:
        return layer
    return layer.reshape(patch**2, channels, *layer.shape[1:]).transpose(0, 1).flatten(end_dim=1)


def read(file: PublishedFile, heads: int | None, chosen: str | None) -> Published:
    """A published file as a SiT. ValueError where it is none, or one that cannot be used."""
    named = file.weights.get("raw") or file.weights["ema"]
    found = sizes(str(file.path), named, heads)
    for kind, tensors in file.weights.items():
        check(f"{file.path} ({kind} weights)" if len(file.weights) > 1 else str(file.path), tensors, found)
    theirs, why = (chosen, "as given by --convention") if chosen else convention(file, named, found.learn_sigma)
    _check_arguments(file, found)
    own = {key: getattr(found, key) for key in ("width", "depth", "heads", "patch")}
    known = next((name for name, made in SIT_SIZES.items() if made == own), None)
    config = SiTConfig(name=known, qk_norm=found.qk_norm) if known else SiTConfig(**own, qk_norm=found.qk_norm)
    imagenet = known and known.endswith("/2") and found.shape == (4, 32, 32) and found.classes == 1000
    flip = theirs == "sit"
    return Published(
        name=known or f"SiT of width {found.width}",
        sizes=", ".join(f"{key} {value}" for key, value in own.items()),
        config=config,
        shape=found.shape,
        conditions=Conditions("labels" if found.classes else "none", found.classes),
        convention=theirs,
        reason=why,
        path=PATH_NAMES[str(file.args.get("path_type", "linear"))],
        recipe=f"sit_imagenet_{known[4:-2].lower()}2" if known and imagenet else None,
        source={"heads": found.heads},
        is_head=is_head,
        is_fixed=lambda name: name == "pos_embed",
        translate=lambda tensors, squares: translate(tensors, found, flip=flip, squares=squares),
        cells=lambda layer: cells(layer, found.patch, found.shape[0]),
    )


def _check_arguments(file: PublishedFile, found: Sizes) -> None:
    """ValueError where the options that trained a file make it unusable."""
    args = file.args
    if args.get("prediction", "v") not in ("v", "velocity"):
        raise ValueError(f"{file.path} predicts {args['prediction']}; only models of the velocity can be used")
    if str(args.get("path_type", "linear")) not in PATH_NAMES:
        raise ValueError(f"{file.path} was trained on the path {args['path_type']}, which selftrans does not have")
    if args.get("num_classes", found.classes) != found.classes:
        raise ValueError(
            f"{file.path} has {found.classes + 1} label vectors for {args['num_classes']} classes; expected one more than "
            "classes, for the null label"
        )


# ---- our weights in their layouts


def give_back(model: SiT, *, flip: bool) -> Named:
    """The inverse of `translate` without learn_sigma: a published state dict, positions included."""
    named = dict(model.state_dict())
    channels, side, _ = model.shape
    found = Sizes(model.width, model.depth, 0, model.patch, (channels, side, side), model.num_classes, False, False)
    return {"pos_embed": model.pos_embed.detach().clone(), **translate(named, found, flip=flip)}  # type: ignore[operator]


def arguments(model: SiT, config: SiTConfig) -> dict[str, Any]:
    """Arguments of the published `SiT` class that both repositories share."""
    return {
        "input_size": model.shape[1],
        "patch_size": model.patch,
        "in_channels": model.shape[0],
        "hidden_size": model.width,
        "depth": model.depth,
        "num_heads": config.sizes()["heads"],
        "num_classes": model.num_classes,
    }


def _sit_arguments(model: SiT, config: SiTConfig) -> dict[str, Any]:
    if config.qk_norm:
        raise ValueError("the original SiT has no QK-norm, and this model has; use --layout repa")
    return arguments(model, config) | {"learn_sigma": False}


def _repa_arguments(model: SiT, config: SiTConfig) -> dict[str, Any]:
    own = {"decoder_hidden_size": model.width, "z_dims": [], "encoder_depth": 1, "qk_norm": config.qk_norm}
    return arguments(model, config) | own


LAYOUTS = {
    "sit": Layout("t = 0 is noise, v = data - noise", lambda model: give_back(model, flip=True), _sit_arguments),
    "repa": Layout("t = 0 is data, v = noise - data", lambda model: give_back(model, flip=False), _repa_arguments),
}
