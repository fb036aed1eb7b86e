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

    After 400 steps a classifier of the recordings takes 0.33 of vanilla's samples for their word, and 0.39 of those of
    Self-Transcendence (docs/results.md): a demonstration, far from converged.
    """
    return RunConfig(
        recipe="speech_words",
        model=SiTConfig(name="SiT-S/4", width=64, depth=6, heads=2, patch=4),
        sections=sections(Stage1(block=2, head_width=128), Stage2(scale=5.0, until_step=260, head_width=128)),
        train=Train(steps=400, batch_size=64, lr=1e-3, ema=0.99, checkpoint_every=80, preview_every=80),
        sample=SampleConfig(sampler="heun", steps=12, batch_size=256),
        log=Log(every=50),
    )
