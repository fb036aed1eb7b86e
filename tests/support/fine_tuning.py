"""Small runs that start from given weights: two data sets with one class in common, and a run trained on the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selftrans.config import RunConfig
from selftrans.train.run import train
from tests.support import published_files, toy
from tests.support.published_files import TINY
from tests.support.shared import once

FIRST, SECOND = ("cat", "dog", "eel"), ("dog", "fox")
#: of runs on given weights, whose sizes the model has from there
TUNED: dict[str, Any] = {
    name: value for name, value in toy.TOY.items() if not name.startswith("model.") and name != "stage1.steps"
} | {"method": "vanilla", "train.steps": 4, "train.keep": 0, "train.checkpoint_every": 1}


@once
def data(classes: tuple[str, ...], side: int = 8) -> Path:
    """Pictures of noise with these classes."""
    return toy.prepared(toy.place(f"data-{'-'.join(classes)}-{side}"), classes, side=side)


@once
def first() -> Path:
    """A run on the first data, without guidance. Its weights are random ones: after a few steps from scratch all gates of a
    model are still closed, and its blocks have no influence."""
    raw = published_files.state(**TINY | {"channels": 3, "classes": 3}, qk_norm=True)
    toy.place("random").mkdir(parents=True)
    file = published_files.save(toy.place("random") / "a.pt", {"ema": raw, "args": published_files.options("repa")})
    train(tuned({"data.path": str(data(FIRST)), "train.steps": 3}, init=file), toy.place("first-run"), quiet=True)
    return toy.place("first-run")


def tuned(dotted: dict[str, Any] | None = None, init: Path | str | None = None) -> RunConfig:
    """A run on the second data that starts from the first run."""
    given = {"data.path": str(data(SECOND)), "init.path": str(init or first())}
    return toy.override(toy.recipe("digits"), TUNED | given | (dotted or {})).restricted()


@once
def adapted() -> Path:
    """A finished run of both stages with adapters."""
    run = toy.place("adapted")
    both = {
        "method": "self_transcendence",
        "stage1.steps": 2,
        "stage2.until_step": 3,
        "lora.rank": 2,
        "lora.alpha": 4.0,
    }
    train(tuned(both), run, quiet=True)
    return run
