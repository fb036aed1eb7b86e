"""Plain flow matching without guidance: the baseline of every comparison."""

from __future__ import annotations

from selftrans.methods.spec import MethodSpec, Stage

VANILLA = MethodSpec(
    "vanilla", "vanilla", lambda config: [Stage("vanilla", config.train.steps, lambda student, teacher: [])]
)
