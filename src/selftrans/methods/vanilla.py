"""Plain flow matching: no guidance at all. What every other method is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from selftrans.methods.spec import MethodSpec, Stage

if TYPE_CHECKING:
    from selftrans.config import RunConfig


def _stages(config: RunConfig) -> list[Stage]:
    return [Stage("vanilla", config.train.steps, lambda student, teacher: [])]


VANILLA = MethodSpec("vanilla", "vanilla", _stages)
