"""Spoken words as spectrograms."""

from __future__ import annotations

from selftrans.config import Log, RunConfig, SampleConfig, Train, sections
from selftrans.methods.self_transcendence import Stage1, Stage2
from selftrans.models.sit import SiTConfig


def speech_words() -> RunConfig:
    """A 6-block, 64-channel transformer on log-mel spectrograms of 24 bands and 32 frames (48 tokens), class = word.

    Data: `python benchmarks/make_speech.py --out WORDS` (ten words by espeak-ng in many voices), then
    `selftrans prepare WORDS --out DIR --audio mel --rate 8000 --length 0.64 --bins 24 --hop 160`.
    Command: `selftrans train speech_words --data DIR --out RUN`. Cost: about two minutes of one CPU core per stage.

    Learning rate and label table were chosen for vanilla training (docs/results.md): after 600 steps a classifier of the
    recordings takes every sample for its word (before, at 1e-3 and 0.02 and 400 steps, 0.33 of them).
    """
    return RunConfig(
        recipe="speech_words",
        model=SiTConfig(name="SiT-S/4", width=64, depth=6, heads=2, patch=4, label_std=0.5),
        sections=sections(
            Stage1(steps=200, block=2, head_width=128), Stage2(scale=5.0, until_step=360, head_width=128)
        ),
        train=Train(steps=600, batch_size=64, lr=4e-3, ema=0.99, checkpoint_every=100, preview_every=100),
        sample=SampleConfig(sampler="heun", steps=12, batch_size=256),
        log=Log(every=50, held_out_every=100),
    )
