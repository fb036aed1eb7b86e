"""Real handwritten digits (scikit-learn's load_digits, 1,797 scans of 8x8): the whole method in minutes on a CPU."""

from __future__ import annotations

from selftrans.config import Data, Log, RunConfig, SampleConfig, Train, sections
from selftrans.methods.repa import Repa
from selftrans.methods.self_transcendence import Stage1, Stage2
from selftrans.methods.sra import SRA
from selftrans.models.sit import SiTConfig


def digits() -> RunConfig:
    """A 6-block, 64-channel transformer on 8x8 digits (16 tokens). Needs no `--data`.

    Command: `selftrans train digits --out RUN`. Cost: a few minutes on two CPU cores.

    Learning rate, deviation of the label table and times were chosen for vanilla training (docs/results.md). Distance in the
    features of a small digit classifier (1,000 samples, 12 Heun steps) at student step 200 / 400 / 600 / 800 / 1,000, mean of
    six seeds, deviation of the last in brackets, stage 2 taught by 1,000 steps of stage 1:
        vanilla             8.4 / 3.2 / 1.9 / 1.4 / 1.19 (0.07)
        stage 1 alone       9.9 / 3.5 / 2.1 / 1.5 / 1.18 (0.15)
        Self-Transcendence  7.2 / 2.5 / 1.7 / 1.2 / 1.11 (0.11), w = 2

    That takes --stage1.steps 1000; without it stage 1 has half of the student's steps, 500.

    So a teacher helps at equal steps, most at the start. With as much compute as both stages take, vanilla training reaches
    0.84 (0.15). With uniform times it ended at 1.54; with the published deviation of 0.02 and a learning rate of 1e-3, too, at
    8.6. --train.contrastive 0.05 takes vanilla to 0.82 (0.03) and Self-Transcendence to 0.75 (0.11), seeds 0 to 2
    (docs/results/contrastive.md).
    """
    return RunConfig(
        recipe="digits",
        model=SiTConfig(name="SiT-S/2", width=64, depth=6, heads=2, patch=2, label_std=0.5),
        data=Data(builtin="digits"),
        sections=sections(
            Stage1(block=2, head_width=128),
            Stage2(scale=2.0, until_step=600, head_width=128),
            Repa(head_width=128),
            SRA(head_width=128),
        ),
        train=Train(
            times="systematic_logitnormal",
            steps=1000,
            batch_size=128,
            lr=8e-3,
            ema=0.995,
            checkpoint_every=250,
            preview_every=250,
        ),
        sample=SampleConfig(sampler="heun", steps=12, batch_size=256),
        log=Log(every=50, held_out_every=100),
    )
