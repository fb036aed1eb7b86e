"""Handwritten digits that move: videos."""

from __future__ import annotations

from selftrans.config import Log, RunConfig, SampleConfig, Train, sections
from selftrans.methods.self_transcendence import Stage1, Stage2
from selftrans.models.sit import SiTConfig


def moving_digits() -> RunConfig:
    """A 6-block, 64-channel transformer on videos of 8 frames of 12x12 pixels (36 tokens of 2x4x4), class = digit.

    Data: `python benchmarks/make_moving_digits.py --out GIFS`, then
    `selftrans prepare GIFS --out DIR --frames 8 --grey`.
    Command: `selftrans train moving_digits --data DIR --out RUN`. Cost: about four minutes of one CPU core for 1,000 steps
    of stage 1 or 2.

    Learning rate and label table were chosen for vanilla training (docs/results.md). After 2,500 steps a classifier of
    the videos takes half of the samples for their digit; that is far from converged.
    """
    return RunConfig(
        recipe="moving_digits",
        model=SiTConfig(name="SiT-S/4", width=64, depth=6, heads=2, patch=4, patch_frames=2, label_std=0.5),
        sections=sections(
            Stage1(steps=400, block=2, head_width=128), Stage2(scale=5.0, until_step=1000, head_width=128)
        ),
        train=Train(steps=2500, batch_size=64, lr=4e-3, ema=0.99, checkpoint_every=500, preview_every=500),
        sample=SampleConfig(sampler="heun", steps=12, batch_size=256),
        log=Log(every=50, held_out_every=250),
    )
