"""Settings of `selftrans autoencoder`: how an autoencoder is built and trained, with the defaults of the command.

Nothing here loads torch: the help page shows these defaults.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

CHECKPOINT_EVERY = 500  #: steps from one checkpoint to the next


@dataclass(frozen=True)
class AutoencoderSettings:
    """How an autoencoder is built and trained. ValueError from `check`."""

    channels: int = 4  #: D
    factor: int = 4  #: side of a picture / side of its latent
    widths: tuple[int, ...] = ()  #: channels of the network at each resolution; (): 64, doubled up to 256
    depth: int = 1  #: residual blocks of the encoder at each resolution; the decoder has one more
    attention: bool = True  #: at the lowest resolution
    loss: Literal["l1", "l2"] = "l1"
    kl_weight: float = 1e-3
    perceptual: str | None = None  #: sha256 of the extractor's weights
    perceptual_weight: float = 1.0
    batch_size: int = 32
    steps: int = 20_000
    lr: float = 5e-4
    warmup: int = 200
    ema: float = 0.999
    clip: float = 1.0
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    held_out: int = 1000

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
