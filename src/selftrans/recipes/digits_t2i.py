"""Handwritten digits from sentences: text-to-image with a real text encoder, in minutes on a CPU."""

from __future__ import annotations

from selftrans.config import Data, Log, RunConfig, SampleConfig, Train, sections
from selftrans.methods.self_transcendence import Stage1, Stage2
from selftrans.models.mmdit import MMDiTConfig


def digits_t2i() -> RunConfig:
    """A 4-block, 64-channel MMDiT on 8x8 digits (16 tokens) and MiniLM's tokens of sentences about them. Needs no `--data`.

    Command: `selftrans train digits_t2i --out RUN`.
    """
    return RunConfig(
        recipe="digits_t2i",
        model=MMDiTConfig(name="MMDiT-S/2", width=64, depth=4, heads=2, patch=2, qk_norm=True, masked=True),
        data=Data(builtin="digits_t2i"),
        sections=sections(
            Stage1(block=1, head_width=128),
            Stage2(student_block=2, teacher_block=3, scale=5.0, until_step=600, head_width=128),
        ),
        train=Train(steps=1000, batch_size=64, lr=3e-3, ema=0.995, checkpoint_every=250, preview_every=250),
        sample=SampleConfig(sampler="heun", steps=8, batch_size=256, guidance_scale=2.0),
        log=Log(every=50, preview_images=40),
    )
