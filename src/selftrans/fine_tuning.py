"""Settings of a run that starts from given weights: their source, and whether all weights are trained or adapters (LoRA)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from selftrans.sections import Section


@dataclass(frozen=True)
class Init(Section):
    """The weights that every stage's student starts from; with none, a run starts from random ones."""

    key = "init"

    path: str | None = None
    """a run, stage, checkpoint or weights file, or a published file that `selftrans import` reads; `--init` sets it"""
    stage: str | None = None
    """stage of the run; None: its last"""
    weights: Literal["ema", "raw"] = "ema"
    """ema: the moving average of the weights; raw: the weights themselves"""
    convention: str | None = None
    """time and sign of a published file, as in `selftrans import`; None: from the file, or guessed and printed"""
    heads: int | None = None
    """attention heads of a published file, where neither its tensors nor its width show them"""

    def resolved(self) -> Init:
        """The same with an absolute path: a run may be continued from another folder. Names of the hub stay as they are."""
        if self.path is None or self.path.startswith("hf:/"):
            return self
        return replace(self, path=str(Path(self.path).resolve()))

    def ineffective(self) -> dict[str, str]:
        names = ("stage", "weights", "convention", "heads")
        return {} if self.path else dict.fromkeys(names, "without --init a run starts from random weights")


@dataclass(frozen=True)
class Lora(Section):
    """Low-rank adapters (LoRA, 2106.09685) on linear layers: W x + (alpha / rank) B A x, with W frozen."""

    key = "lora"

    rank: int | None = None
    """rank of A and B; None: no adapters, all weights are trained"""
    alpha: float | None = None
    """the factor of B A is alpha / rank; None: the rank, so a factor of 1"""
    targets: tuple[str, ...] = ()
    """names of the linear layers, or the ends of names (qkv); none given: attention and MLP of every block"""

    @property
    def factor(self) -> float:
        """alpha / rank."""
        assert self.rank
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def check(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"lora.rank must be above zero, not {self.rank}; leave it out to train all weights")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha must be above zero, not {self.alpha}")

    def ineffective(self) -> dict[str, str]:
        return {} if self.rank else dict.fromkeys(("alpha", "targets"), "without lora.rank all weights are trained")


def check_together(init: Init, lora: Lora, shard: bool) -> None:
    """ValueError for adapters without weights to adapt, or on weights that are sharded."""
    if lora.rank and init.path is None:
        raise ValueError(f"lora.rank {lora.rank} needs weights to adapt; give --init RUN_OR_FILE")
    if lora.rank and shard:
        raise ValueError(
            "train.shard does not go with lora.rank: the average shares the frozen weights with the student, and FSDP2 cannot "
            "shard one weight for two models; leave out train.shard (each process then holds the frozen weights once)"
        )
