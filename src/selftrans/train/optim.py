"""The optimiser, its schedule, and its tensors in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from selftrans.config import Train
from selftrans.messages import first_line
from selftrans.train.fsdp import local, shard_like

#: of bitsandbytes: values of the smallest tensor with 8-bit moments; values that share a scale
SMALLEST, BLOCK = 4096, 256


def build_optimizer(model: nn.Module, config: Train) -> torch.optim.Optimizer:
    """Fused AdamW over every trainable parameter: one kernel per step instead of several per tensor.

    With `adamw8bit` bitsandbytes' (Dettmers et al., 2110.02861): a kernel per tensor, moments of 8 bits in blocks of 256 with a
    float32 scale each; those of tensors below 4096 values stay in float32. ValueError where it is not installed.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options, fused=True)  # type: ignore[arg-type]
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"train.optimizer {config.optimizer} needs bitsandbytes ({first_line(error)}): pip install 'selftrans[8bit]', or "
            "leave train.optimizer at adamw"
        ) from error
    return AdamW8bit(parameters, **options)


def moment_bytes(parameters: Iterable[Tensor], kind: str) -> int:
    """Bytes of both moments of these parameters, in one process, by `train.optimizer`."""
    sizes = [(local(p).numel(), p.element_size()) for p in parameters]
    if kind == "adamw":
        return sum(2 * n * size for n, size in sizes)
    return sum(2 * (n + 4 * -(-n // BLOCK)) if n >= SMALLEST else 8 * n for n, _ in sizes)


def learning_rate(step: int, config: Train) -> float:
    """Rate of the 0-based step: linear warm-up, constant, and the fall of `lr_decay`.

    A function of the step and not of the run's length: resume needs no state, and a longer run has the same first steps.
    """
    rate = config.lr * min(1.0, (step + 1) / config.warmup) if config.warmup else config.lr
    if config.lr_decay is None:
        return rate
    first, last = config.lr_decay
    left = min(1.0, max(0.0, (last - step) / (last - first)))
    return rate * (left if config.lr_decay_shape == "linear" else (1 - math.cos(math.pi * left)) / 2)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The same rate for every parameter, from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def use_rate_tensor(optimizer: Any, rate: Tensor, *, capturable: bool) -> None:
    """Let the optimiser read its rate from a 0-d tensor, which may change; `capturable`: also within a CUDA graph."""
    for group in optimizer.param_groups:
        group["lr"], group["capturable"] = rate, capturable


def update(optimizer: Any, sound: Tensor, scaler: torch.amp.GradScaler | None = None) -> None:
    """One update where `sound`, a 0-d boolean on the device, is true; else weights and moments stay unchanged, bit for bit.

    torch's fused kernels read the flag on the device (`found_inf`), so the host does not wait. With fp16 the gradient
    scaler, which has unscaled the gradient and checked it for overflow, skips the update itself. Optimisers of other packages
    do not know the flag: for them the host reads `sound`.
    """
    knows_flag = isinstance(optimizer, torch.optim.AdamW)
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    elif knows_flag:
        optimizer.found_inf = (~sound).float()
        optimizer.step()
        del optimizer.found_inf  # in a recorded step it lies in the memory of the graph, which could not be freed
    elif bool(sound):
        optimizer.step()


def forget(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Drop every parameter that is no longer in `model`, and its moments."""
    staying = set(model.parameters())
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p in staying]
    for parameter in [p for p in optimizer.state if p not in staying]:
        del optimizer.state[parameter]


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Moments by name: `<parameter>:<moment>`. A tensor that several parameters share (a table of 8-bit values) is copied."""
    found: dict[str, Tensor] = {}
    shared: set[int] = set()
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensor = torch.as_tensor(value)
            found[f"{name}:{moment}"] = tensor.clone() if id(tensor) in shared else tensor
            shared.add(id(tensor) if isinstance(value, Tensor) else 0)
    return found


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`. ValueError for moments of another optimiser."""
    fused, named = isinstance(optimizer, torch.optim.AdamW), dict(model.named_parameters())
    found: dict[str, dict[str, Tensor]] = {}  # parameter -> moment -> value
    for key, value in tensors.items():
        name, _, moment = key.rpartition(":")
        found.setdefault(name, {})[moment] = value
    for name, moments in found.items():
        if name not in named:
            raise ValueError(f"it holds moments of {name}, which the settings do not train")
        if ("exp_avg" in moments) != fused:
            raise ValueError(f"the moments of {name} are those of another optimiser; choose the other train.optimizer")
        parameter = named[name]
        optimizer.state[parameter] = {
            moment: shard_like(value, parameter).clone() if value.ndim else value.to(parameter.device).clone()
            for moment, value in moments.items()
        }
        if not fused:
            optimizer.state[parameter]["step"] = int(moments["step"])
