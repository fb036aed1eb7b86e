"""Settings of `selftrans autoencoder`, which are options of the command: how an autoencoder is built and trained.

Nothing here loads torch: the help page shows them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

CHECKPOINT_EVERY = 500  #: steps from one checkpoint to the next


@dataclass(frozen=True)
class AutoencoderSettings:
    """How an autoencoder is built and trained. In a training `perceptual` is the sha256 of the classifier's weights, and
    `precision` is set. ValueError from `check`."""

    factor: int = 4
    """side of a picture / side of its latent: 2, 4 or 8"""
    channels: int = 4
    """of a latent"""
    widths: tuple[int, ...] = ()
    """channels of the network at each resolution, from the pictures' to the latents' (factor 4: three numbers; 16 32 64 suit
    a CPU); none: 64, doubled up to 256"""
    depth: int = 1
    """residual blocks at each resolution (decoder: one more)"""
    attention: bool = True
    """self-attention at the lowest resolution"""
    steps: int = 20_000
    """of training; may be raised later"""
    batch_size: int = 32
    """pictures per step"""
    lr: float = 5e-4
    """peak learning rate of AdamW; half a cosine brings it to zero"""
    warmup: int = 200
    """steps until the peak"""
    loss: Literal["l1", "l2"] = "l1"
    """of the reconstruction: absolute or squared differences"""
    kl_weight: float = 1e-3
    """of the KL divergence of the posterior from a standard normal; both terms summed over a picture"""
    perceptual: str | None = None
    """file of a classifier (`selftrans classifier`): adds the distance in its middle layer; None: no such term"""
    perceptual_weight: float = 1.0
    """of that distance"""
    ema: float = 0.999
    """decay of the averaged weights, which are the result"""
    clip: float = 1.0
    """largest norm of the gradient"""
    held_out: int = 1000
    """pictures that are not trained on, a tenth at most"""
    precision: Literal["fp32", "bf16"] | None = None
    """None: bf16 on a GPU, fp32 on a CPU"""
    seed: int = 0
    """of weights, order, noise and held-out pictures"""

    def check(self) -> AutoencoderSettings:
        """The settings with their widths; ValueError names the option that is wrong."""
        if self.factor not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"--factor {self.factor} is not a power of two up to 32; choose 2, 4 or 8")
        levels = self.factor.bit_length()
        widths = self.widths or tuple(min(64 << level, 256) for level in range(levels))
        if len(widths) != levels:
            raise ValueError(
                f"--widths has {len(widths)} numbers; factor {self.factor} needs {levels}, one per resolution"
            )
        if any(width < 4 or width % 4 for width in widths):
            raise ValueError(f"--widths {' '.join(map(str, widths))}: each should be a multiple of 4")
        for name, low in {"channels": 1, "depth": 1, "batch_size": 1, "steps": 1, "warmup": 0, "held_out": 1}.items():
            if getattr(self, name) < low:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} should be at least {low}")
        for name in ("lr", "clip", "kl_weight", "perceptual_weight"):
            value = getattr(self, name)
            above = name in ("lr", "clip")
            if not math.isfinite(value) or value < 0 or (above and not value):
                expected = "above zero" if above else "zero or above"
                raise ValueError(f"--{name.replace('_', '-')} {value} should be a finite number, {expected}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema {self.ema} should be in [0, 1)")
        return replace(self, widths=widths)

    def learning_rate(self, step: int) -> float:
        """Rate of the 0-based step: linear warm-up, then half a cosine down to zero at the last step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))
