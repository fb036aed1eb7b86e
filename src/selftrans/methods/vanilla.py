"""Plain flow matching without guidance: the baseline of every comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

from selftrans.methods.spec import MethodSpec, Stage

if TYPE_CHECKING:
    from selftrans.config import RunConfig


def _stages(config: RunConfig) -> list[Stage]:
    return [Stage("vanilla", config.train.steps, lambda student, teacher: [])]


VANILLA = MethodSpec("vanilla", "vanilla", _stages)
