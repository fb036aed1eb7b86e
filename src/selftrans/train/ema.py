"""Exponential moving average of the weights of the student, which previews and samples use."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from selftrans.train.fsdp import local, reshard
from selftrans.types import Backbone


class EMA:
    """Average `a <- a + (1 - d) (p - a)` of the parameters, d = min(decay, (1 + step) / (10 + step)).

    `model` is the averaged copy, in float32 and eval mode. Frozen parameters are not copied: average and student share them.
    Buffers keep their values from the start: in the models here they are constants.
    """

    def __init__(self, student: Backbone, decay: float) -> None:
        self.decay = decay
        frozen = {id(p): p for p in student.parameters() if not p.requires_grad}
        self.model = copy.deepcopy(student, memo=frozen).requires_grad_(False).eval()
        self.follow(student)

    def follow(self, student: Backbone) -> None:
        """Average the parameters of `student` from now on. Call it again after student and average have been sharded."""
        pairs = zip(self.model.parameters(), student.parameters(), strict=True)
        self._pairs = [(average, own) for average, own in pairs if average is not own]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step number `step` (1-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = [local(a) for a, _ in self._pairs]
        parameters: list[Tensor] = [local(p.detach()) for _, p in self._pairs]
        torch._foreach_lerp_(averages, parameters, 1 - decay)
        reshard(self.model)  # a guidance with the average as teacher has gathered its weights
