"""The head of stage 1 in a checkpoint of the authors' released code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from selftrans.methods.spec import PublishedHeads
from selftrans.methods.stage_settings import Stage1

if TYPE_CHECKING:
    from selftrans.config import RunConfig

#: names in the released code -> names here, in a state dict
PUBLISHED_HEAD = {
    f"{theirs}.{part}": f"guidances.0.head.{ours}.{part}"
    for theirs, ours in {
        "projectors.0": "0.0",
        "projectors.2": "0.2",
        "projectors.4": "0.4",
        "projectors_final.linear": "2",
    }.items()
    for part in ("weight", "bias")
}


def published_heads(
    named: Mapping[str, Tensor], arguments: Mapping[str, Any], config: RunConfig
) -> PublishedHeads | None:
    """The release's head of stage 1 (`projectors.*`, `projectors_final.linear`), and the settings it was trained with.

    Raises KeyError, TypeError, IndexError or ValueError for options that cannot be used.
    """
    if "projectors_final.linear.weight" not in named or "projectors.0.weight" not in named:
        return None
    if any(name.startswith("projectors_final.adaLN") for name in named):
        return None  # the head of the released MMDiT is modulated by the time, the head here is not
    span, plain = arguments.get("t_range"), config.section(Stage1)
    stage1 = dataclasses.replace(
        plain,
        block=int(arguments.get("encoder_depth", plain.block)),
        weight=float(arguments.get("proj_coeff", plain.weight)),
        timestep_range=(float(span[0]), float(span[1])) if span else None if arguments else plain.timestep_range,
        range_mode="scale",  # what the released code computes
        head_width=named["projectors.0.weight"].shape[0],
    )
    return PublishedHeads((stage1,), PUBLISHED_HEAD, "projectors_final.linear.")
