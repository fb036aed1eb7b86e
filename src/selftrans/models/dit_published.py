"""Published checkpoints of DiT (github.com/facebookresearch/DiT): a plain state dict, or {model, ema, opt, args}.

Names and shapes are those of SiT, and so is what is checked (see `sit_published`). The weights stay as they are, the unused
half of learn_sigma included: `DiT` itself turns noise into a velocity.
"""

from __future__ import annotations

from typing import Any

from selftrans.models import sit_published
from selftrans.models.dit import DIT_SIZES, DiT, DiTConfig
from selftrans.models.spec import Layout, Named, Published, PublishedFile
from selftrans.types import Conditions


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


def _kept(named: Named) -> Named:
    """The student's tensors in float32, without positions."""
    return {name: tensor.float() for name, tensor in named.items() if name != "pos_embed"}


def read(file: PublishedFile, heads: int | None, chosen: str | None) -> Published | None:
    """A published file as a DiT; None without evidence that it is one. ValueError when it cannot be used."""
    reason = _reason(file, chosen)
    if reason is None:
        return None
    named = file.weights.get("raw") or file.weights["ema"]
    found = sit_published.sizes(str(file.path), named, heads)
    for kind, tensors in file.weights.items():
        where = f"{file.path} ({kind} weights)" if len(file.weights) > 1 else str(file.path)
        sit_published.check(where, tensors, found)
        if any(map(sit_published.is_head, tensors)):
            raise ValueError(f"{where} holds projectors, which DiT does not have; set another --convention")
    own = {key: getattr(found, key) for key in ("width", "depth", "heads", "patch")}
    known = next((name for name, made in DIT_SIZES.items() if made == own), None)
    options: dict[str, Any] = {"qk_norm": found.qk_norm, "learn_sigma": found.learn_sigma}
    return Published(
        name=known or f"DiT of width {found.width}",
        sizes=", ".join(f"{key} {value}" for key, value in own.items()),
        config=DiTConfig(name=known, **options) if known else DiTConfig(**own, **options),
        shape=found.shape,
        conditions=Conditions("labels" if found.classes else "none", found.classes),
        convention="dit",
        reason=reason,
        path=None,
        recipe=None,
        source={"heads": found.heads},
        is_head=lambda name: False,
        is_fixed=lambda name: name == "pos_embed",
        translate=lambda tensors, squares: _kept(tensors),
        cells=lambda layer: layer,
    )


def _tensors(model: DiT) -> Named:
    return {"pos_embed": model.pos_embed.detach().clone(), **model.state_dict()}  # type: ignore[operator]


def _arguments(model: DiT, config: DiTConfig) -> dict[str, Any]:
    """Arguments of the published `DiT` class."""
    if config.qk_norm:
        raise ValueError("the published DiT has no QK-norm, and this model has; export the layout selftrans")
    return sit_published.arguments(model, config) | {"learn_sigma": config.learn_sigma}


LAYOUTS = {"dit": Layout("t = 999 is noise, predicts noise (DDPM, linear betas)", _tensors, _arguments)}
