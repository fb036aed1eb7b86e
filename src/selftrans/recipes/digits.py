"""Real handwritten digits (scikit-learn's load_digits, 1,797 scans of 8x8): the whole method in minutes on a CPU."""

from __future__ import annotations

from selftrans.config import Log, Model, RunConfig, Train
from selftrans.methods.self_transcendence import Stage1, Stage2
from selftrans.sample import SampleConfig


def digits() -> RunConfig:
    """A 6-block, 64-channel transformer on 8x8 digits (16 tokens). Needs no `--data`.

    Command: `selftrans train digits --out RUN`.
    """
    return RunConfig(
        recipe="digits",
        model=Model(name="SiT-S/2", width=64, depth=6, heads=2, patch=2),
        stage1=Stage1(block=2, head_width=128),
        stage2=Stage2(scale=5.0, until_step=600, head_width=128),
        train=Train(steps=1000, batch_size=128, lr=1e-3, ema=0.995, checkpoint_every=250, preview_every=250),
        sample=SampleConfig(sampler="heun", steps=12, batch_size=256),
        log=Log(every=50),
    )
