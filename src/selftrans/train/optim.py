"""The optimiser, its schedule, and its tensors in a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from selftrans.config import Train
from selftrans.train.fsdp import shard_like


def build_optimizer(model: nn.Module, config: Train) -> torch.optim.AdamW:
    """Fused AdamW over every trainable parameter: one kernel per step instead of several per tensor."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def learning_rate(step: int, config: Train) -> float:
    """Rate of the 0-based step: linear warm-up, then constant. A function of the step alone, so resume needs no state."""
    return config.lr * min(1.0, (step + 1) / config.warmup) if config.warmup else config.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The same rate for every parameter, from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def update(optimizer: Any, sound: Tensor, scaler: Any = None) -> None:
    """One update where `sound`, a 0-d boolean on the device, is true; else weights and moments stay unchanged, bit for bit.

    torch's fused kernels read the flag on the device (`found_inf`), so the host does not wait. With fp16 the gradient
    scaler, which has unscaled the gradient and checked it for overflow, sets the flag itself.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if scaler is None:
        inner.found_inf = (~sound).float()
    optimizer.step()


def forget(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Drop every parameter, and its moments, that is no longer in `model`."""
    staying = set(model.parameters())
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p in staying]
    for parameter in [p for p in optimizer.state if p not in staying]:
        del optimizer.state[parameter]


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Moments by name: `<parameter>:<moment>`."""
    found = {}
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}:{moment}"] = torch.as_tensor(value)
    return found


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`."""
    for name, parameter in model.named_parameters():
        moments = {key.rpartition(":")[2]: value for key, value in tensors.items() if key.rpartition(":")[0] == name}
        if moments:
            optimizer.state[parameter] = {
                moment: shard_like(value, parameter).clone() if value.ndim else value.to(parameter.device).clone()
                for moment, value in moments.items()
            }
