"""Toy runs on the captioned pictures of `captioned.py`: a tiny MMDiT through both stages, in a second or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selftrans.config import RunConfig
from selftrans.train.run import train
from tests.support import captioned, toy
from tests.support.shared import once

TEXT_TOY: dict[str, Any] = {
    "data.builtin": None,
    "model.name": "MMDiT-S/2",
    "model.width": 32,
    "model.depth": 3,
    "model.heads": 2,
    "model.patch": 4,
    "model.zero_init": False,  # so that the text matters from the first step on
    "stage2.until_step": 3,
    "train.steps": 4,
    "stage1.steps": 2,
    "train.checkpoint_every": 2,
}


def text_toy(overrides: dict[str, Any] | None = None, data: Path | None = None) -> RunConfig:
    """The settings of a toy run of both stages on data with captions."""
    path = {"data.path": str(data or captioned.shared())}
    return toy.toy({"model.name": "MMDiT-S/2"}).override(TEXT_TOY | path | (overrides or {}))


@once
def finished() -> Path:
    """A finished run of both stages, with previews of the last; copy it before you change it."""
    train(text_toy({"train.preview_every": 4}), toy.place("captioned-run"), quiet=True)
    return toy.place("captioned-run")
