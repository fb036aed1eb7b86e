"""COCO 2014 at 256x256 from captions, with the published settings (the authors' text-to-image release)."""

from __future__ import annotations

from selftrans.config import RunConfig, SampleConfig, Train, sections
from selftrans.methods.self_transcendence import Stage1, Stage2
from selftrans.models.mmdit import MMDiTConfig


def mmdit_coco() -> RunConfig:
    """MMDiT of 24 blocks and width 768, conditioned on text, on COCO at 256 pixels.

    Command: `selftrans train mmdit_coco --data DIR --out RUN`. The data are what `selftrans prepare` makes of the 82,783
    training pictures of COCO 2014 and their captions with --autoencoder stabilityai/sd-vae-ft-mse --resolution 256 --text
    openai/clip-vit-large-patch14: latents 4x32x32, captions of 77x768 tokens; the null condition is the empty caption.
    Cost: stage 1 is 150k steps, stage 2 another 150k (464 epochs each) of batch 256, half the operations of SiT-XL/2 a step
    (121 GFLOP a forward pass of one picture); the teacher adds 44 % until step 50k. 14 + 16 EFLOP in all.

    Published, FID against 40,504 validation pictures at 150k steps, sampling as here: MMDiT without guidance of features 5.30
    (with an ODE of 50 steps 6.05), with REPA 4.14 (4.73). Longer training has been reported to be worse. This package has not
    trained the recipe to the end.

    As released: stage 1 trains block 4 and stage 2 starts from its average after 150k steps; no timestep range; weights start
    as torch makes them, so without zero gates (`--model.zero-init True` is adaLN-Zero). Different from the release: its head
    of stage 1 is modulated by the time; its teacher sees the captions that were dropped for the student as empty, ours sees
    the true ones; it trained in fp16; times and EMA as in the recipes for ImageNet.
    """
    return RunConfig(
        recipe="mmdit_coco",
        model=MMDiTConfig(name="MMDiT-B/2", zero_init=False),
        sections=sections(
            Stage1(steps=150_000, block=4, timestep_range=None),
            Stage2(
                student_block=12,
                teacher_block=16,
                scale=5.0,
                timestep_range=None,
                until_step=50_000,
                teacher_weights="ema",
            ),
        ),
        train=Train(
            steps=150_000,
            batch_size=256,
            lr=2e-4,
            betas=(0.9, 0.9),
            weight_decay=0.03,
            warmup=5_000,
            ema=0.9999,
            drop=0.1,
            precision="bf16",
        ),
        sample=SampleConfig(sampler="sde", steps=250, guidance_scale=1.8),
    )
