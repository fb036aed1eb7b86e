"""Your own pictures, with classes or with captions."""

from __future__ import annotations

from selftrans.config import RunConfig, SampleConfig, Train, sections
from selftrans.methods.self_transcendence import Stage1, Stage2
from selftrans.models.mmdit import MMDiTConfig
from selftrans.models.sit import SiTConfig


def imagefolder() -> RunConfig:
    """Any data that `selftrans prepare` has written: latent shape and classes come from its manifest.

    Command: `selftrans train imagefolder --data DIR --out RUN`. Cost: 100k student steps and 50k of stage 1, batch 256,
    SiT-B/2. Published settings otherwise, but for w and times: w is 5, because the published 30 harms on small data; times are
    logit-normal, which were better than uniform ones in all short runs (docs/results/times.md; `--train.times systematic` for
    the published ones). Runs of few thousand steps on small data were better with a higher rate and the label table drawn at
    0.5: for such, try `--train.lr 1e-3 --model.label-std 0.5`. Choose another size with `--model.name SiT-S/2`. No result is
    known beforehand: compare with `--method vanilla` at the same steps.
    """
    return RunConfig(
        recipe="imagefolder",
        model=SiTConfig(name="SiT-B/2"),
        sections=sections(Stage2(scale=5.0, until_step=50_000)),
        train=Train(times="systematic_logitnormal", steps=100_000, batch_size=256),
        sample=SampleConfig(sampler="heun", steps=50),
    )


def imagefolder_t2i() -> RunConfig:
    """Pictures with captions: any data that `selftrans prepare --text ENCODER` has written, whatever the text encoder.

    Command: `selftrans train imagefolder_t2i --data DIR --out RUN`. Cost: 100k student steps and 50k of stage 1, batch 256,
    MMDiT-S/2 (12 blocks of width 384). The settings of `mmdit_coco` for half its depth: the guided blocks, the end of guidance
    and the warm-up are scaled with blocks and steps. Other than there, padding of captions is not attended to, since only CLIP
    is trained to make sense of it; weights start as adaLN-Zero; sampling is an ODE of 50 steps. Choose the published size with
    `--model.name MMDiT-B/2 --stage1.block 4`, and `--train.precision bf16` on a GPU that has it. No result is known
    beforehand: compare with `--method vanilla` at the same steps.
    """
    return RunConfig(
        recipe="imagefolder_t2i",
        model=MMDiTConfig(name="MMDiT-S/2", masked=True),
        sections=sections(
            Stage1(block=2, timestep_range=None),
            Stage2(scale=5.0, timestep_range=None, until_step=33_000, teacher_weights="ema"),
        ),
        train=Train(steps=100_000, batch_size=256, lr=2e-4, betas=(0.9, 0.9), weight_decay=0.03, warmup=3_000),
        sample=SampleConfig(sampler="heun", steps=50, guidance_scale=1.8),
    )
