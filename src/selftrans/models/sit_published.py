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
from typing import Any, Literal

import torch
from torch import Tensor

from selftrans.models.label_published import Family, arguments, check_arguments, describe, is_head, sizes
from selftrans.models.label_transformer import LabelTransformer
from selftrans.models.layers import time_rates
from selftrans.models.sit import SiT, SiTConfig
from selftrans.models.spec import Layout, Named, Published, PublishedFile

Convention = Literal["sit", "repa"]

#: reason for taking a file with the unused learn_sigma half for a SiT checkpoint
LIKE_DIT = "a guess: its last layer has the unused half of learn_sigma, like DiT's; set --convention to decide"
FAMILY = Family("SiT", SiT, SiTConfig, lambda named: {"qk_norm": "blocks.0.attn.q_norm.weight" in named})


def convention(file: PublishedFile, learn_sigma: bool) -> tuple[Convention, str]:
    """The time and sign convention of the weights and the reason: header, stored options, heads, or else a guess.

    Warns when the file could also be a DiT checkpoint, which has SiT's names and shapes but predicts noise.
    """
    evidence: tuple[tuple[bool, Convention, str], ...] = (
        (file.layout == "sit", "sit", "from its header"),
        (file.layout == "repa", "repa", "from its header"),
        (file.args.get("prediction") == "v", "repa", "from its stored options"),
        (file.args.get("prediction") is not None, "sit", "from its stored options"),
        (any(map(is_head, file.named)), "repa", "since it holds projectors"),
        (file.steps is not None, "repa", "since it holds a step count"),
        (learn_sigma, "sit", LIKE_DIT),
        (
            "blocks.0.attn.q_norm.weight" in file.named,
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


def translate(named: Named, patch: int, channels: int, *, flip: bool, squares: bool = False) -> Named:
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
            x = x.reshape(patch**2, -1, *x.shape[1:])[:, :channels].flatten(end_dim=1)
            x = -x if flip and not squares else x
        elif name == "t_embedder.mlp.0.weight" and flip:
            turn = reflection(x.shape[1])
            x = (tensor.double() @ (turn.square() if squares else turn)).float()
        out[name] = x
    return out


def read(file: PublishedFile, heads: int | None, chosen: str | None) -> Published:
    """A published file as a SiT. ValueError when it is not a SiT, or cannot be used."""
    found = sizes(str(file.path), file.named, heads, FAMILY)
    path = check_arguments(file, found.classes)
    source, reason = (chosen, "from --convention") if chosen else convention(file, found.learn_sigma)
    flip, patch, channels = source == "sit", found.patch, found.shape[0]
    model = describe(
        file,
        FAMILY,
        found,
        convention=source,
        reason=reason,
        path=path,
        translate=lambda tensors, squares: translate(tensors, patch, channels, flip=flip, squares=squares),
    )
    imagenet = model.name.endswith("/2") and found.shape == (4, 32, 32) and found.classes == 1000
    return model._replace(recipe=f"sit_imagenet_{model.name[4:-2].lower()}2") if imagenet else model


# ---- selftrans => published


def to_published(model: LabelTransformer, *, flip: bool) -> Named:
    """The inverse of `translate` without learn_sigma: a published state dict with positions."""
    translated = translate(dict(model.state_dict()), model.patch, model.shape[0], flip=flip)
    return {"pos_embed": model.pos_embed.detach().clone(), **translated}


def _sit_arguments(model: SiT, config: SiTConfig) -> dict[str, Any]:
    if config.qk_norm:
        raise ValueError("this model has QK-norm, which the original SiT lacks; use --layout repa")
    return arguments(model, config.sizes()["heads"]) | {"learn_sigma": False}


def _repa_arguments(model: SiT, config: SiTConfig) -> dict[str, Any]:
    own = {"decoder_hidden_size": model.width, "z_dims": [], "encoder_depth": 1, "qk_norm": config.qk_norm}
    return arguments(model, config.sizes()["heads"]) | own


LAYOUTS = {
    "sit": Layout("t = 0 is noise, v = data - noise", lambda model: to_published(model, flip=True), _sit_arguments),
    "repa": Layout("t = 0 is data, v = noise - data", lambda model: to_published(model, flip=False), _repa_arguments),
}
