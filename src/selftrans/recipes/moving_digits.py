"""Handwritten digits that move: videos."""

from __future__ import annotations

from selftrans.config import Log, RunConfig, SampleConfig, Train, sections
from selftrans.methods.self_transcendence import Stage1, Stage2
from selftrans.models.sit import SiTConfig


def moving_digits() -> RunConfig:
    """A 6-block, 64-channel transformer on videos of 8 frames of 12x12 pixels (36 tokens of 2x4x4), class = digit.

    Data: `python benchmarks/make_moving_digits.py --out GIFS`, then
    `selftrans prepare GIFS --out DIR --frames 8 --grey`.
    Command: `selftrans train moving_digits --data DIR --out RUN`. Cost: about two minutes of one CPU core per stage.

    After 400 steps no method has learnt the digits (docs/results.md); give more `--train.steps`.
    """
    return RunConfig(
        recipe="moving_digits",
        model=SiTConfig(name="SiT-S/4", width=64, depth=6, heads=2, patch=4, patch_frames=2),
        sections=sections(Stage1(block=2, head_width=128), Stage2(scale=5.0, until_step=260, head_width=128)),
        train=Train(steps=400, batch_size=64, lr=1e-3, ema=0.99, checkpoint_every=80, preview_every=80),
        sample=SampleConfig(sampler="heun", steps=12, batch_size=256),
        log=Log(every=50),
    )
