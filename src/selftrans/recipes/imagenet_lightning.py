"""ImageNet 256x256 with LightningDiT (2501.01423) on the latents of VA-VAE, 16 times smaller and of 32 channels."""

from __future__ import annotations

from selftrans.config import RunConfig, SampleConfig, Train, sections
from selftrans.methods.self_transcendence import Stage1, Stage2
from selftrans.models.lightning import LightningConfig


def _published(name: str, size: str, *, until_step: int) -> RunConfig:
    """Settings of LightningDiT's repository: 64 epochs (80k steps of batch 1024), AdamW 2e-4, betas (0.9, 0.95), no weight
    decay, times of logistic-normal density, the cosine loss of the velocity with factor 1, EMA 0.9999; sampling by Euler's
    method with timestep_shift 0.3 (`--sample.time-shift` 1 / 0.3 here). Blocks, w and range are those of SiT of the same depth;
    stage 1 is half of train.steps.

    The data are ImageNet at 256 pixels, --flip, encoded by VA-VAE f16d32 with its statistics per channel (`selftrans
    import-vae`): latents 32x16x16. With guidance, its repository samples with scale 10 on the first 3 channels for t below 0.9
    after 64 epochs (FID 2.11), with 6.7 and t below 0.875 after 800 (1.35): `--guidance-scale 10 --guidance-channels 3
    --guidance-interval 0 0.9`. Not as published: 250 steps are 249 there, gradients are clipped at 1, and the EMA warms up.
    How Self-Transcendence was trained on LightningDiT is not published in detail: w, blocks and the end of guidance are SiT's,
    the end in epochs.
    """
    return RunConfig(
        recipe=name,
        model=LightningConfig(name=f"LightningDiT-{size}/1"),
        sections=sections(Stage1(block=2), Stage2(scale=30.0, until_step=until_step)),
        train=Train(
            steps=80_000,
            batch_size=1024,
            lr=2e-4,
            betas=(0.9, 0.95),
            ema=0.9999,
            times="logitnormal",
            cosine=1.0,
            precision="bf16",
        ),
        sample=SampleConfig(sampler="euler", steps=250, time_shift=1 / 0.3),
    )


def lightningdit_imagenet_b1() -> RunConfig:
    """LightningDiT-B/1 on ImageNet-256, latents of VA-VAE.

    Command: `selftrans train lightningdit_imagenet_b1 --data DIR --out RUN`. Cost: stage 1 is 40k steps (32 epochs), stage 2
    80k (64 epochs) of batch 1024. Published FID-50K at 64 epochs without guidance at sampling: 14.03 (vanilla 15.94).
    """
    return _published("lightningdit_imagenet_b1", "B", until_step=25_000)


def lightningdit_imagenet_xl1() -> RunConfig:
    """LightningDiT-XL/1 on ImageNet-256, latents of VA-VAE.

    Command: `selftrans train lightningdit_imagenet_xl1 --data DIR --out RUN`. Cost as LightningDiT-B/1, 5.2 times the
    operations a step. Published FID-50K at 64 epochs without guidance at sampling: 3.55 (vanilla 5.30, REPA 4.09).
    """
    return _published("lightningdit_imagenet_xl1", "XL", until_step=12_500)
