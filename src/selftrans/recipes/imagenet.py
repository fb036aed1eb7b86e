"""ImageNet 256x256 with the published settings (paper, section 4 and the authors' release)."""

from __future__ import annotations

from selftrans.config import RunConfig, SampleConfig, Train, sections
from selftrans.methods.self_transcendence import Stage1, Stage2
from selftrans.models.sit import SiTConfig


def _published(name: str, size: str, *, until_step: int) -> RunConfig:
    """Published settings of every size: blocks from the depth (s = 2; then half, and two thirds of it), w = 30.

    Stage 1 is half of train.steps, 200k of 400k as published. The data are what `selftrans prepare` makes of ImageNet at 256
    pixels with stabilityai/sd-vae-ft-mse: latents 4x32x32, 1000 classes. No mirrored pictures: neither this method's release
    nor REPA has them (the original SiT has; `prepare --flip` stores them). Two things differ from the published runs: times
    are spread evenly over the batch (each still uniform on [0, 1]; `--train.times uniform` draws them one by one, as
    published, and is what range_mode `scale` needs to reproduce the released code's spread), and the EMA warms up.
    docs/published-figures.md has the commands of a comparison with the published figures, and what measurements at small size
    suggest in place of these settings.
    """
    return RunConfig(
        recipe=name,
        model=SiTConfig(name=f"SiT-{size}/2", qk_norm=True),
        sections=sections(Stage1(block=2), Stage2(scale=30.0, until_step=until_step)),
        train=Train(steps=400_000, batch_size=256, lr=1e-4, ema=0.9999, precision="bf16"),
        sample=SampleConfig(sampler="sde", steps=250),
    )


def sit_imagenet_s2() -> RunConfig:
    """SiT-S/2 on ImageNet-256.

    Command: `selftrans train sit_imagenet_s2 --data DIR --out RUN`. Cost: stage 1 is 200k steps (40 epochs), stage 2 400k
    (80 epochs) of batch 256. The paper gives no figure for this size.
    """
    return _published("sit_imagenet_s2", "S", until_step=100_000)


def sit_imagenet_b2() -> RunConfig:
    """SiT-B/2 on ImageNet-256.

    Command: `selftrans train sit_imagenet_b2 --data DIR --out RUN`. Cost: stage 1 is 200k steps (40 epochs), stage 2 400k
    (80 epochs) of batch 256. Published FID-50K at 80 epochs without guidance at sampling: 20.49 (vanilla 36.14).
    """
    return _published("sit_imagenet_b2", "B", until_step=100_000)


def sit_imagenet_l2() -> RunConfig:
    """SiT-L/2 on ImageNet-256.

    Command: `selftrans train sit_imagenet_l2 --data DIR --out RUN`. Cost as SiT-B/2, 3.5 times the operations a step.
    Published FID-50K at 80 epochs: 8.74 (vanilla 21.41). The end of guidance at 50k steps is from a secondary source.
    """
    return _published("sit_imagenet_l2", "L", until_step=50_000)


def sit_imagenet_xl2() -> RunConfig:
    """SiT-XL/2 on ImageNet-256.

    Command: `selftrans train sit_imagenet_xl2 --data DIR --out RUN`. Cost as SiT-B/2, 5.1 times the operations a step.
    Published FID-50K at 80 epochs: 7.51 (vanilla 17.63); 400 epochs with guidance 1.9 on [0, 0.65] at sampling: 1.44.
    The end of guidance at 50k steps is from a secondary source.
    """
    return _published("sit_imagenet_xl2", "XL", until_step=50_000)


def sit_imagenet() -> RunConfig:
    """ImageNet-256 at the size of the headline result, SiT-XL/2 (see sit_imagenet_xl2; _s2, _b2, _l2 are the others).

    Command: `selftrans train sit_imagenet --data DIR --out RUN`.
    """
    return _published("sit_imagenet", "XL", until_step=50_000)
