"""Your own pictures."""

from __future__ import annotations

from selftrans.config import RunConfig, SampleConfig, Train, sections
from selftrans.methods.self_transcendence import Stage2
from selftrans.models.sit import SiTConfig


def imagefolder() -> RunConfig:
    """Any data that `selftrans prepare` has written: latent shape and classes come from its manifest.

    Command: `selftrans train imagefolder --data DIR --out RUN`. Cost: 100k student steps and 50k of stage 1, batch 256,
    SiT-B/2. Published settings otherwise, but for w: 5, because the published 30 harms on small data (docs/results.md).
    Choose another size with `--model.name SiT-S/2`. No result is known beforehand: compare with `--method vanilla` at the
    same steps.
    """
    return RunConfig(
        recipe="imagefolder",
        model=SiTConfig(name="SiT-B/2"),
        sections=sections(Stage2(scale=5.0, until_step=50_000)),
        train=Train(steps=100_000, batch_size=256),
        sample=SampleConfig(sampler="heun", steps=50),
    )
