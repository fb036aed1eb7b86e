"""Published checkpoints of DiT (github.com/facebookresearch/DiT): a plain state dict, or {model, ema, opt, args}.

Names and shapes are those of SiT, and so is what is checked (see `label_published`). The weights stay as they are, the unused
half of learn_sigma included: `DiT` itself turns noise into a velocity.
"""

from __future__ import annotations

from typing import Any

from selftrans.models.dit import DiT, DiTConfig
from selftrans.models.label_published import Family, arguments, describe, is_head, sizes
from selftrans.models.sit_published import FAMILY as SIT
from selftrans.models.spec import Layout, Named, Published, PublishedFile


def _reason(file: PublishedFile, chosen: str | None) -> str | None:
    """What shows that a file is of DiT; None where nothing does."""
    for holds, why in (
        (chosen == "dit", "from --convention"),
        (chosen is None and file.layout == "dit", "from its header"),
        (chosen is None and str(file.args.get("model", "")).startswith("DiT-"), "from its stored options"),
    ):
        if holds:
            return why
    return None


def read(file: PublishedFile, heads: int | None, chosen: str | None) -> Published | None:
    """A published file as a DiT; None without evidence that it is one. ValueError when it cannot be used."""
    reason = _reason(file, chosen)
    if reason is None:
        return None
    if any(is_head(name) for tensors in file.weights.values() for name in tensors):
        raise ValueError(f"{file.path} holds projectors, which DiT does not have; set another --convention")
    found = sizes(str(file.path), file.named, heads, SIT)
    family = Family("DiT", DiT, DiTConfig, lambda named: SIT.own(named) | {"learn_sigma": found.learn_sigma})
    kept = lambda tensors, squares: {name: x.float() for name, x in tensors.items() if name != "pos_embed"}  # noqa: E731
    return describe(file, family, found, convention="dit", reason=reason, translate=kept, cells=lambda layer: layer)


def _tensors(model: DiT) -> Named:
    return {"pos_embed": model.pos_embed.detach().clone(), **model.state_dict()}


def _arguments(model: DiT, config: DiTConfig) -> dict[str, Any]:
    """Arguments of the published `DiT` class."""
    if config.qk_norm:
        raise ValueError("the published DiT has no QK-norm, and this model has; export the layout selftrans")
    if config.schedule != "linear":
        raise ValueError(
            f"the published DiT has linear betas, and this model {config.schedule}; export the layout selftrans"
        )
    return arguments(model, config.sizes()["heads"]) | {"learn_sigma": config.learn_sigma}


LAYOUTS = {"dit": Layout("t = 999 is noise, predicts noise (DDPM, linear betas)", _tensors, _arguments)}
