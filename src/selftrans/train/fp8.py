"""Products in eight bits: the linear layers of attention and MLP in float8, by torchao (`train.fp8`).

Weights, their gradients, the optimiser and the average keep their precision, names and values; only the three products of a
layer (forward, and the two of backward) take operands that are scaled and rounded to eight bits. The average, previews,
samples and teachers do not use it. A CPU has no such products: there they are emulated, which is slower than without.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from selftrans.models.lora import default_targets
from selftrans.train.flops import on_meta
from selftrans.types import Backbone, map_cond

MULTIPLE = 16  #: the products take sizes that are multiples of this
CAPABILITY = (8, 9)  #: of NVIDIA's devices that have such products: Ada, Hopper and later


def layers(student: Backbone) -> list[str]:
    """Names of the layers whose products are in eight bits: those of attention and MLP, where their sizes allow it."""
    found: list[str] = []
    for name in default_targets(student):
        layer: Any = student.get_submodule(name)
        if layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0:
            found.append(name)
    return found


def rows(student: Backbone, names: Collection[str]) -> dict[str, int]:
    """Layer -> rows of its input for one sample in training: tokens, without those that skip its block (`model.route`)."""
    meta, found = on_meta(student).train(), dict[str, int]()
    meta.recompute = False

    def noted(name: str) -> Any:
        return lambda _, given: found.update({name: given[0].numel() // given[0].shape[-1]})

    for name in names:
        meta.get_submodule(name).register_forward_pre_hook(noted(name))
    cond = map_cond(lambda x: x.to("meta"), meta.conditions.example())
    with torch.no_grad():
        meta(torch.empty(1, *meta.shape, device="meta"), torch.empty(1, device="meta"), cond)
    return found


def check_rows(student: Backbone, names: Collection[str], samples: int) -> None:
    """ValueError, in one line, unless the gradients of the weights are products of allowed sizes: they sum over all rows."""
    for name, each in rows(student, names).items():
        if samples * each % MULTIPLE:
            least = MULTIPLE // math.gcd(each, MULTIPLE)
            raise ValueError(
                f"train.fp8 needs a multiple of {MULTIPLE} tokens in every layer; {name} has {samples} x {each} of a "
                f"micro-batch: choose train.batch_size and train.accumulate for micro-batches of a multiple of {least}"
            )


def convert(student: Backbone, scaling: str, device: torch.device, samples: int) -> None:
    """Replace the `layers` of a student in place by torchao's, which hold the same parameters.

    Args:
        scaling: `none`, nothing is replaced; `tensorwise`, one factor for each operand; `rowwise`, one for each of its rows.
        samples: of a micro-batch.
    ValueError, in one line, without torchao, on a GPU without products in eight bits, for a model without a layer of suitable
    size, and on a GPU for a number of samples that such products do not allow.
    """
    if scaling == "none":
        return
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        where = torch.cuda.get_device_name(device)
        raise ValueError(f"train.fp8 needs a GPU of compute capability 8.9 or later, not {where}; leave it out")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except (ImportError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"train.fp8 needs torchao ({reason}): pip install 'selftrans[fp8]'") from error
    chosen = set(layers(student))
    if not chosen:
        raise ValueError(f"train.fp8 needs blocks with linear layers of multiples of {MULTIPLE} channels; leave it out")
    settings = Float8LinearConfig.from_recipe_name(scaling)
    if device.type == "cuda":
        check_rows(student, chosen, samples)
    else:
        warnings.warn("train.fp8 is emulated on this device: the same rounding, and slower", stacklevel=2)
        settings = dataclasses.replace(settings, emulate=True)

    def wanted(module: nn.Module, name: str) -> bool:
        return name in chosen

    convert_to_float8_training(student, module_filter_fn=wanted, config=settings)
