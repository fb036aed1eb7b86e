"""What the readers of published SiT, DiT and LightningDiT files share: sizes from shapes, checks, and the description.

Their networks are `LabelTransformer`s on square latents, under the same tensor names, with their constants stored.
Shape legend: T tokens, D width, (C, H, W) latent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftrans.messages import shape_text
from selftrans.models.label_transformer import LabelTransformer
from selftrans.models.layers import sincos_positions
from selftrans.models.patch_transformer import SizedConfig
from selftrans.models.sit import SIZES
from selftrans.models.spec import Named, Published, PublishedFile, check_shapes, count_and_names
from selftrans.types import Conditions

#: tolerance for constant tables: moving averages drift, half precision rounds
POSITIONS = 2e-3
#: name of a path in SiT's and REPA's options -> name here; GVP is the cosine path
PATH_NAMES = {"linear": "linear", "cosine": "cosine", "Linear": "linear", "GVP": "cosine"}


class Family(NamedTuple):
    """A family of models: its name, its classes and its settings."""

    name: str
    Model: Callable[..., LabelTransformer]
    Config: type[SizedConfig]
    own: Callable[[Named], dict[str, Any]]  #: settings besides the sizes that names and shapes of a state dict show
    sizes: tuple[tuple[int, int, int], ...] = tuple(SIZES.values())  #: published width, depth, heads


class Sizes(NamedTuple):
    """Model sizes, inferred from a state dict."""

    width: int
    depth: int
    heads: int
    patch: int
    shape: tuple[int, int, int]
    classes: int
    learn_sigma: bool

    @property
    def arguments(self) -> dict[str, int]:
        """As the model's constructor takes them, and the fields of its settings are called."""
        return {"width": self.width, "depth": self.depth, "heads": self.heads, "patch": self.patch}

    @property
    def grid(self) -> tuple[int, int]:
        return (self.shape[1] // self.patch, self.shape[2] // self.patch)


def is_head(name: str) -> bool:
    """Whether a tensor belongs to a projection head, which is not part of the student."""
    return name.startswith(("projectors.", "projectors_final."))


# ---- sizes from shapes


def sizes(where: str, named: Named, heads: int | None, family: Family) -> Sizes:
    """Sizes of the model of a state dict. ValueError when it is not of `family`, or `heads` is needed and missing."""
    needed = {
        "x_embedder.proj.weight": 4,
        "pos_embed": 3,
        "y_embedder.embedding_table.weight": 2,
        "final_layer.linear.weight": 2,
    }
    check_present(where, named, needed, f"a {family.name}")
    width, channels, patch, _ = named["x_embedder.proj.weight"].shape
    tokens, rows = named["pos_embed"].shape[1], named["y_embedder.embedding_table.weight"].shape[0]
    grid = int(tokens**0.5)
    if not width or not channels or not patch or not rows or not grid or grid**2 != tokens:
        raise ValueError(
            f"{where} is not a {family.name} on square latents: {tokens} tokens, {rows} labels, patches of {patch}"
        )
    chosen = _heads(where, named, heads, width, family)
    doubled = named["final_layer.linear.weight"].shape[0] == 2 * patch * patch * channels
    depth = len({name.split(".")[1] for name in named if name.startswith("blocks.")})
    return Sizes(width, depth, chosen, patch, (channels, grid * patch, grid * patch), rows - 1, doubled)


def _heads(where: str, named: Named, given: int | None, width: int, family: Family) -> int:
    """Attention heads: from norms of queries or rotary tables, else as given, else as published for this width."""
    for name, dim, what in (
        ("blocks.0.attn.q_norm.weight", 0, "the width of its q_norm"),
        ("feat_rope.freqs_cos", 1, "its rotary positions"),
    ):
        table = named.get(name)
        if table is None or table.dim() != dim + 1 or not 0 < table.shape[dim] <= width:
            continue
        known = width // table.shape[dim]
        if given is not None and given != known:
            raise ValueError(f"{where} has {known} attention heads, from {what}; omit --heads {given}")
        return known
    chosen = given or next((h for w, _, h in family.sizes if w == width), None)
    if chosen is None:
        raise ValueError(
            f"{where} has width {width}, not a published size; set its number of attention heads with --heads"
        )
    return chosen


# ---- checks


def check_present(where: str, named: Named, dims: dict[str, int], model: str) -> None:
    """ValueError unless the tensors in `dims` exist with these numbers of dimensions: the sizes are read from them."""
    for key, expected in dims.items():
        if key not in named or named[key].dim() != expected:
            what = (
                f"{key} is missing" if key not in named else f"{key} has {named[key].dim()} dimensions, not {expected}"
            )
            raise ValueError(f"{where} is not {model}: {what}; it holds {count_and_names(named)}")


def check_tensors(where: str, named: Named, network: Named, constants: Callable[[], Named]) -> None:
    """ValueError that lists a few unknown, missing and misshapen tensors, or names a constant table with other values.

    `network`: the tensors of the model, of which only shapes are used.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in network.items()}
    with torch.device("meta"):
        expected |= {name: tuple(tensor.shape) for name, tensor in constants().items()}
    check_shapes(where, {name: tensor for name, tensor in named.items() if not is_head(name)}, expected)
    for name, true in constants().items():
        error = (named[name].float() - true).abs().max().item()
        if not error <= POSITIONS:
            raise ValueError(f"{where}: {name} is not the fixed table of sines and cosines (off by {error:.2g})")


def check_arguments(file: PublishedFile, classes: int) -> str | None:
    """The path that a file was trained on, if it says so. ValueError when it was trained with unsupported options."""
    args = file.args
    path = str(args.get("path_type", "linear"))
    if args.get("prediction", "v") not in ("v", "velocity"):
        raise ValueError(f"{file.path} predicts {args['prediction']}; only models that predict velocity are supported")
    if path not in PATH_NAMES:
        raise ValueError(f"{file.path} was trained on the path {path}, which selftrans does not support")
    if args.get("num_classes", classes) != classes:
        raise ValueError(
            f"{file.path} has {classes + 1} label vectors for {args['num_classes']} classes; expected one per class and "
            "one for the null label"
        )
    return PATH_NAMES[path] if "path_type" in args else None


# ---- in and out


def cells(layer: Tensor, patch: int, channels: int) -> Tensor:
    """Rows of a layer that predicts a token's cells, reordered from (row, column, channel) to `Backbone.patchify`'s order."""
    if not layer.dim() or len(layer) != patch**2 * channels:
        return layer
    return layer.reshape(patch**2, channels, *layer.shape[1:]).transpose(0, 1).flatten(end_dim=1)


def describe(
    file: PublishedFile,
    family: Family,
    found: Sizes,
    buffers: tuple[str, ...] = (),
    constants: Callable[[], Named] = dict,
    **decided: Any,
) -> Published:
    """A published file as a model of a family. ValueError where one of its tensors does not fit.

    `constants` makes the tables that the file stores besides the positions, `buffers` are their names; `decided`: fields of
    `Published` from the reader (convention, reason and translate at least).
    """

    def tables() -> Named:
        return {"pos_embed": sincos_positions(found.width, found.grid)[None], **constants()}

    own, settings = found.arguments, family.own(file.named)
    for kind, tensors in file.weights.items():
        options = {"learn_sigma": found.learn_sigma} | family.own(tensors)
        with torch.device("meta"):  # the sizes may be wrong: nothing is allocated before the shapes agree
            network = dict(family.Model(found.shape, found.classes, **own, **options).state_dict())
        check_tensors(file.where(kind), tensors, network, tables)
    known = next((name for name, made in family.Config.published.items() if made == own), None)
    fields: dict[str, Any] = {"name": known} if known else own
    given = {
        "name": known or f"{family.name} of width {found.width}",
        "sizes": ", ".join(f"{key} {value}" for key, value in own.items()),
        "config": family.Config(**fields, **settings),
        "shape": found.shape,
        "conditions": Conditions("labels" if found.classes else "none", found.classes),
        "source": {"heads": found.heads},
        "is_head": is_head,
        "is_fixed": ("pos_embed", *buffers).__contains__,
        "is_buffer": buffers.__contains__,
        "cells": lambda layer: cells(layer, found.patch, found.shape[0]),
    }
    return Published(**{**given, **decided})


def arguments(model: LabelTransformer, heads: int) -> dict[str, Any]:
    """Arguments of the published classes that are the same in all repositories. ValueError unless latents are square."""
    if len(model.grid) != 2 or model.shape[1] != model.shape[2]:
        size = shape_text(model.shape[1:])
        raise ValueError(f"the published models take square latents, and this one {size}; export the layout selftrans")
    return {
        "input_size": model.shape[1],
        "patch_size": model.patch,
        "in_channels": model.shape[0],
        "hidden_size": model.width,
        "depth": model.depth,
        "num_heads": heads,
        "num_classes": model.num_classes,
    }
