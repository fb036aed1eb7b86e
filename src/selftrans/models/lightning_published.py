"""Published checkpoints of LightningDiT (github.com/hustvl/LightningDiT): a state dict, or {model, ema, opt, config}.

Besides SiT's tensors they hold those of the options (`mlp.w12`, weights of norms) and the tables of the rotary positions as
`feat_rope.freqs_cos` and `feat_rope.freqs_sin` (T, d), each angle twice. Their training code is SiT's: time runs from
noise to data and the velocity is data minus noise, which is folded into the weights as `sit_published` does.
A LightningDiT without rotary positions, SwiGLU, RMSNorm and with shifts has SiT's names, shapes and arithmetic, and is read
as a SiT. Shape legend: T tokens, D width, d channels of an attention head, (C, H, W) latent.
"""

from __future__ import annotations

from typing import Any

from selftrans.models import label_published as shared
from selftrans.models import sit_published as sit
from selftrans.models.lightning import OPTIONS, SIZES, LightningConfig, LightningDiT, rotation_table
from selftrans.models.spec import Layout, Named, Published, PublishedFile

ROPE = {"feat_rope.freqs_cos": 0, "feat_rope.freqs_sin": 1}  #: names of the rotary tables -> their row of ours


def options(named: Named) -> dict[str, bool]:
    """The options of LightningDiT by names and shapes of a state dict. A state dict of SiT gives SiT's values for all."""

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


FAMILY = shared.Family("LightningDiT", LightningDiT, LightningConfig, options, tuple(SIZES.values()))


def rope_tables(channels: int, grid: tuple[int, ...]) -> Named:
    """The published tables (T, d) float32, with each angle twice, for both channels of its pair."""
    table = rotation_table(channels, grid).float().repeat_interleave(2, dim=-1)
    return {name: table[row].clone() for name, row in ROPE.items()}


def read(file: PublishedFile, heads: int | None, chosen: str | None) -> Published | None:
    """A published file as a LightningDiT; None where nothing in it is LightningDiT's own. ValueError: it cannot be used."""
    named = file.named
    parts = options(named)
    if not (parts["swiglu"] or parts["rope"] or parts["rms_norm"] or not parts["shift"]):
        return None
    if chosen == "dit":
        raise ValueError(f"{file.path} is a LightningDiT, which predicts velocity, not noise; omit --convention dit")
    found = shared.sizes(str(file.path), named, heads, FAMILY)
    source, reason = (chosen, "from --convention") if chosen else ("sit", _reason(file, named))

    def translate(tensors: Named, squares: bool) -> Named:
        kept = {name: tensor for name, tensor in tensors.items() if name not in ROPE}
        return sit.translate(kept, found.patch, found.shape[0], flip=source == "sit", squares=squares)

    return shared.describe(
        file,
        FAMILY,
        found,
        buffers=tuple(ROPE),
        constants=lambda: rope_tables(found.width // found.heads, found.grid) if parts["rope"] else {},
        convention=source,
        reason=reason,
        path=shared.check_arguments(file, found.classes),
        translate=translate,
    )


def _reason(file: PublishedFile, named: Named) -> str:
    if file.layout == "lightningdit":
        return "from its header"
    if any(map(shared.is_head, named)):
        return "a guess: that of LightningDiT's code, but its projectors are of other code; set --convention to decide"
    return "as in LightningDiT's code"


# ---- our weights in their layout


def to_published(model: LightningDiT) -> Named:
    """A published state dict, tables of positions included."""
    out: Named = {}
    for name, tensor in sit.to_published(model, flip=True).items():
        out[name] = tensor
        if name == "y_embedder.embedding_table.weight" and model.rotations is not None:  # the order in published files
            out |= rope_tables(2 * model.rotations.shape[-1], model.grid)
    return out


def _arguments(model: LightningDiT, config: LightningConfig) -> dict[str, Any]:
    """Arguments of the published `LightningDiT` class."""
    theirs = {"qk_norm": "use_qknorm", "swiglu": "use_swiglu", "rope": "use_rope", "rms_norm": "use_rmsnorm"}
    return {
        **shared.arguments(model, config.sizes()["heads"]),
        "learn_sigma": False,
        **{theirs[key]: getattr(config, key) for key in OPTIONS if key in theirs},
        "wo_shift": not config.shift,
    }


LAYOUTS = {"lightningdit": Layout("t = 0 is noise, v = data - noise", to_published, _arguments)}
