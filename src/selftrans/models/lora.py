"""Low-rank adapters on a backbone's linear layers, made by peft: W x + (alpha / rank) B A x, with W frozen (2106.09685).

Names in a model with adapters: `<layer>.base_layer.weight` is W, `<layer>.lora_A.default.weight` (rank, in) is A, and
`<layer>.lora_B.default.weight` (out, rank) is B, which starts at zero, so that the model starts as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selftrans.models.spec import Named
from selftrans.types import Backbone

BASE, A, B = ".base_layer", ".lora_A.default", ".lora_B.default"
#: parts of a name that lead to a layer of the conditioning, which is no default target
CONDITIONING = re.compile(r"norm|modulation|emb", re.IGNORECASE)


def linear_layers(model: nn.Module) -> list[str]:
    """Names of a model's linear layers."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def default_targets(model: Backbone) -> list[str]:
    """The linear layers of attention and MLP in every block; of the whole model, where it has no list of blocks."""
    inside = {id(part) for block in model.repeated() for part in block.modules()}
    layers = [name for name in linear_layers(model) if not inside or id(model.get_submodule(name)) in inside]
    return [name for name in layers if not any(map(CONDITIONING.search, name.split(".")))]


def chosen_targets(model: Backbone, targets: Sequence[str]) -> list[str]:
    """The linear layers that `targets` name in full or by their ends; none given: `default_targets`.

    ValueError for one that matches no linear layer; it lists the names that there are.
    """
    layers, chosen = linear_layers(model), set()
    for target in targets:
        found = {name for name in layers if name == target or name.endswith(f".{target}")}
        if not found:
            ends = dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name) for name in layers)
            raise ValueError(f"lora.targets '{target}' matches no linear layer; there are {', '.join(ends)}")
        chosen |= found
    return [name for name in layers if name in chosen] if targets else default_targets(model)


def add_adapters(
    model: Backbone, rank: int, factor: float, targets: Sequence[str] = (), trained: Iterable[str] = ()
) -> None:
    """Put adapters into a model, in place, and freeze its own weights but the parameters named in `trained`.

    `factor` is alpha / rank. ValueError for targets that match nothing, or a rank that no target has.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = chosen_targets(model, targets)
    if not names:
        raise ValueError("the model has no linear layer in its blocks to adapt; give lora.targets")
    shapes: list[Any] = [model.get_submodule(name).weight.shape for name in names]
    most = max(map(min, shapes))
    if rank > most:
        raise ValueError(f"lora.rank {rank} is more than the {most} of the largest layer; use at most that")
    trained = set(trained)
    in_full = [p for name, p in model.named_parameters() if name in trained]
    config = LoraConfig(r=rank, lora_alpha=factor * rank, target_modules=names, lora_dropout=0.0, bias="none")  # type: ignore[arg-type]
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in [p for name, p in model.named_parameters() if A in name or B in name] + in_full:
        parameter.requires_grad_(True)


def trained_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are trained: adapters, and what is new."""
    return {name for name, p in model.named_parameters() if p.requires_grad}


def pairs(named: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight of the plain model -> its (A, B). ValueError for half a pair, or one whose shapes do not fit each other."""
    found = {}
    for name in named:
        if A in name or B in name:
            layer, _, end = name.replace(B, A).partition(A)
            a, b = named.get(f"{layer}{A}{end}"), named.get(f"{layer}{B}{end}")
            if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                raise ValueError(f"the adapter of {layer} is incomplete")
            found[layer + end] = (a, b)
    return found


def trained_in_full(named: Mapping[str, Tensor]) -> Named:
    """The tensors among those of `trained_names` that are no adapters, by their names in the plain model."""
    return {name.replace(BASE, "", 1): tensor for name, tensor in named.items() if A not in name and B not in name}


def merged(base: Mapping[str, Tensor], trained: Mapping[str, Tensor], factor: float) -> Named:
    """The tensors of the plain model: `base` with the adapters of `trained` added, and its other tensors in their place.

    ValueError where names or shapes do not fit each other.
    """
    out, adapters, own = dict(base), pairs(trained), trained_in_full(trained)
    for name, tensor in own.items():
        if name not in base or base[name].shape != tensor.shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} does not belong to the weights it was trained on")
        out[name] = tensor
    for name, (a, b) in adapters.items():
        if name not in out or tuple(out[name].shape) != (b.shape[0], a.shape[1]):
            raise ValueError(f"the adapter of {name} does not belong to the weights it was trained on")
        out[name] = torch.addmm(out[name], b, a, alpha=factor)
    return out
