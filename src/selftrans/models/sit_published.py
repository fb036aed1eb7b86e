"""Published SiT checkpoints: model sizes from tensor names and shapes, and conversion to selftrans's names and time.

    SiT (github.com/willisma/SiT)     a plain state dict (also under state_dict), or {model, ema, opt, args}
    REPA (github.com/sihyun-yu/REPA)  {model, ema, opt, args, steps}; heads `projectors.i.j` in the model
    Self-Transcendence (github.com/csslc/Self-Transcendence)  as REPA; heads `projectors.j`, in stage 1 also `projectors_final`
each written by torch.save or safetensors, with or without the wrappers' prefixes `module.` and `_orig_mod.`.

In the original SiT, time runs from noise to data and the model predicts data minus noise. The conversion to selftrans's
convention changes only weights and is exact: the sinusoids of 1 - t are a reflection of those of t,
    cos(w - wt) = cos w cos wt + sin w sin wt        sin(w - wt) = sin w cos wt - cos w sin wt
so the first layer after them is multiplied by that reflection (its own inverse), and the sign of the last layer is flipped.
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

#: tolerance for the position table: moving averages drift, half precision rounds
POSITIONS = 2e-3
#: reason for taking a file with the unused learn_sigma half for a SiT checkpoint
LIKE_DIT = "a guess: its last layer has the unused half of learn_sigma, like DiT's; set --convention to decide"
#: name of a path in SiT's and REPA's options -> name here; GVP is the cosine path
PATH_NAMES = {"linear": "linear", "cosine": "cosine", "Linear": "linear", "GVP": "cosine"}


class Sizes(NamedTuple):
    """Model sizes, inferred from a state dict."""

    width: int
    depth: int
    heads: int
    patch: int
    shape: tuple[int, int, int]
    classes: int
    qk_norm: bool
    learn_sigma: bool


# ---- sizes from shapes


def is_head(name: str) -> bool:
    """Whether a tensor belongs to a projection head, which is not part of the student."""
    return name.startswith(("projectors.", "projectors_final."))


def sizes(where: str, named: Named, heads: int | None = None, family: str = "SiT") -> Sizes:
    """Sizes of the model of a state dict. ValueError when it is not of `family`, or `heads` is needed and missing."""
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
            raise ValueError(f"{where} is not a {family}: {what}; it holds {few(named)}")
    width, channels, patch, _ = named["x_embedder.proj.weight"].shape
    tokens, rows = named["pos_embed"].shape[1], named["y_embedder.embedding_table.weight"].shape[0]
    grid = int(tokens**0.5)
    if not width or not channels or not patch or not rows or not grid or grid**2 != tokens:
        raise ValueError(
            f"{where} is not a {family} on square latents: {tokens} tokens, {rows} labels, patches of {patch}"
        )
    q_norm = named.get("blocks.0.attn.q_norm.weight")
    known = width // len(q_norm) if q_norm is not None and q_norm.dim() and len(q_norm) else None
    published = next((h for w, _, h in SIZES.values() if w == width), None)
    if heads is not None and known is not None and heads != known:
        raise ValueError(f"{where} has {known} attention heads, from the width of its q_norm; omit --heads {heads}")
    chosen = heads or known or published
    if chosen is None:
        raise ValueError(
            f"{where} has width {width}, not a published size; set its number of attention heads with --heads"
        )
    doubled = named["final_layer.linear.weight"].shape[0] == 2 * patch * patch * channels
    depth = len({name.split(".")[1] for name in named if name.startswith("blocks.")})
    shape = (channels, grid * patch, grid * patch)
    return Sizes(width, depth, chosen, patch, shape, rows - 1, q_norm is not None, doubled)


def check(where: str, named: Named, sizes: Sizes) -> None:
    """ValueError that lists a few unknown, missing and misshapen tensors, or when the positions are not the fixed ones."""
    with torch.device("meta"):
        model = SiT(
            sizes.shape,
            sizes.classes,
            width=sizes.width,
            depth=sizes.depth,
            heads=sizes.heads,
            patch=sizes.patch,
            qk_norm=sizes.qk_norm,
            learn_sigma=sizes.learn_sigma,
        )
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected["pos_embed"] = (1, (sizes.shape[1] // sizes.patch) ** 2, sizes.width)
    check_shapes(where, {name: tensor for name, tensor in named.items() if not is_head(name)}, expected)
    check_table(where, "pos_embed", named["pos_embed"], sincos_positions(sizes.width, sizes.shape[1] // sizes.patch))


def check_table(where: str, name: str, table: Tensor, true: Tensor) -> None:
    """ValueError unless a constant of the file equals the true one; it may have leading dimensions of size 1."""
    error = (table.float() - true.float()).abs().max().item()
    if not error <= POSITIONS:
        raise ValueError(f"{where}: {name} is not the fixed table of sines and cosines (off by {error:.2g})")


def convention(file: PublishedFile, named: Named, learn_sigma: bool) -> tuple[Convention, str]:
    """The time and sign convention of the weights and the reason: header, stored options, heads, or else a guess.

    Warns when the file could also be a DiT checkpoint, which has SiT's names and shapes but predicts noise.
    """
    evidence: tuple[tuple[bool, Convention, str], ...] = (
        (file.layout == "sit", "sit", "from its header"),
        (file.layout == "repa", "repa", "from its header"),
        (file.args.get("prediction") == "v", "repa", "from its stored options"),
        (file.args.get("prediction") is not None, "sit", "from its stored options"),
        (any(map(is_head, named)), "repa", "since it holds projectors"),
        (file.steps is not None, "repa", "since it holds a step count"),
        (learn_sigma, "sit", LIKE_DIT),
        (
            "blocks.0.attn.q_norm.weight" in named,
            "repa",
            "a guess: the original SiT has no QK-norm; set --convention to decide",
        ),
    )
    chosen, reason = next(
        ((c, reason) for holds, c, reason in evidence if holds),
        ("sit", "a guess without evidence; set --convention to decide"),
    )
    if reason == LIKE_DIT:
        warnings.warn(
            f"{file.path} may be a DiT checkpoint, which has the same names and shapes but predicts noise: set "
            "--convention dit if it is one, --convention sit if it is a SiT checkpoint",
            stacklevel=3,
        )
    return chosen, reason


# ---- published => selftrans


def reflection(frequencies: int) -> Tensor:
    """(F, F) float64: maps the sinusoids of t to those of 1 - t; symmetric, and its own inverse."""
    w = time_rates(frequencies).double()
    cosine, sine = torch.diag(torch.cos(w)), torch.diag(torch.sin(w))
    return torch.cat([torch.cat([cosine, sine], dim=1), torch.cat([sine, -cosine], dim=1)], dim=0)


def translate(named: Named, sizes: Sizes, *, flip: bool, squares: bool = False) -> Named:
    """The student's tensors in float32, without positions, heads and the learn_sigma half; `flip` converts the time.

    `squares`: the tensors are second moments of the optimiser. Their conversion is approximate, because products of
    different frequencies are not stored and taken as zero. Everything else is exact.
    """
    out = {}
    for name, tensor in named.items():
        if name == "pos_embed" or is_head(name):
            continue
        x = tensor.float()
        if name.startswith("final_layer.linear."):
            x = x.reshape(sizes.patch**2, -1, *x.shape[1:])[:, : sizes.shape[0]].flatten(end_dim=1)
            x = -x if flip and not squares else x
        elif name == "t_embedder.mlp.0.weight" and flip:
            turn = reflection(x.shape[1])
            x = (tensor.double() @ (turn.square() if squares else turn)).float()
        out[name] = x
    return out


def cells(layer: Tensor, patch: int, channels: int) -> Tensor:
    """Rows of a layer that predicts a token's cells, reordered from (row, column, channel) to `SiT.patchify`'s order."""
    if not layer.dim() or len(layer) != patch**2 * channels:
        return layer
    return layer.reshape(patch**2, channels, *layer.shape[1:]).transpose(0, 1).flatten(end_dim=1)


def read(file: PublishedFile, heads: int | None, chosen: str | None) -> Published:
    """A published file as a SiT. ValueError when it is not a SiT, or cannot be used."""
    named = file.weights.get("raw") or file.weights["ema"]
    inferred = sizes(str(file.path), named, heads)
    for kind, tensors in file.weights.items():
        check(f"{file.path} ({kind} weights)" if len(file.weights) > 1 else str(file.path), tensors, inferred)
    source, reason = (chosen, "from --convention") if chosen else convention(file, named, inferred.learn_sigma)
    check_arguments(file, inferred)
    own = {key: getattr(inferred, key) for key in ("width", "depth", "heads", "patch")}
    known = next((name for name, published in SIT_SIZES.items() if published == own), None)
    config = SiTConfig(name=known, qk_norm=inferred.qk_norm) if known else SiTConfig(**own, qk_norm=inferred.qk_norm)
    imagenet = known and known.endswith("/2") and inferred.shape == (4, 32, 32) and inferred.classes == 1000
    flip = source == "sit"
    return Published(
        name=known or f"SiT of width {inferred.width}",
        sizes=", ".join(f"{key} {value}" for key, value in own.items()),
        config=config,
        shape=inferred.shape,
        conditions=Conditions("labels" if inferred.classes else "none", inferred.classes),
        convention=source,
        reason=reason,
        path=PATH_NAMES[str(file.args.get("path_type", "linear"))],
        recipe=f"sit_imagenet_{known[4:-2].lower()}2" if known and imagenet else None,
        source={"heads": inferred.heads},
        is_head=is_head,
        is_fixed=lambda name: name == "pos_embed",
        translate=lambda tensors, squares: translate(tensors, inferred, flip=flip, squares=squares),
        cells=lambda layer: cells(layer, inferred.patch, inferred.shape[0]),
    )


def check_arguments(file: PublishedFile, sizes: Sizes) -> None:
    """ValueError when a file was trained with unsupported options."""
    args = file.args
    if args.get("prediction", "v") not in ("v", "velocity"):
        raise ValueError(f"{file.path} predicts {args['prediction']}; only models that predict velocity are supported")
    if str(args.get("path_type", "linear")) not in PATH_NAMES:
        raise ValueError(f"{file.path} was trained on the path {args['path_type']}, which selftrans does not support")
    if args.get("num_classes", sizes.classes) != sizes.classes:
        raise ValueError(
            f"{file.path} has {sizes.classes + 1} label vectors for {args['num_classes']} classes; expected one per class and "
            "one for the null label"
        )


# ---- selftrans => published


def give_back(model: SiT, *, flip: bool) -> Named:
    """The inverse of `translate` without learn_sigma: a published state dict with positions."""
    named = dict(model.state_dict())
    channels, side, _ = model.shape
    sizes = Sizes(model.width, model.depth, 0, model.patch, (channels, side, side), model.num_classes, False, False)
    return {"pos_embed": model.pos_embed.detach().clone(), **translate(named, sizes, flip=flip)}  # type: ignore[operator]


def arguments(model: SiT, config: SiTConfig) -> dict[str, Any]:
    """Arguments of the published `SiT` class that are the same in both repositories."""
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
        raise ValueError("this model has QK-norm, which the original SiT lacks; use --layout repa")
    return arguments(model, config) | {"learn_sigma": False}


def _repa_arguments(model: SiT, config: SiTConfig) -> dict[str, Any]:
    own = {"decoder_hidden_size": model.width, "z_dims": [], "encoder_depth": 1, "qk_norm": config.qk_norm}
    return arguments(model, config) | own


LAYOUTS = {
    "sit": Layout("t = 0 is noise, v = data - noise", lambda model: give_back(model, flip=True), _sit_arguments),
    "repa": Layout("t = 0 is data, v = noise - data", lambda model: give_back(model, flip=False), _repa_arguments),
}
