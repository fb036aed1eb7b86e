"""How images are sampled: a section of every run's settings, and options of the commands that sample."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from selftrans.sections import Section, checked_types

Labels: TypeAlias = Literal["balanced", "random"] | tuple[int, ...]
#: settings that a record of samples holds only where they differ from their defaults, and what is said of them there
LATER = {
    "autoguidance": "guided by a weaker model",
    "guidance_channels": "guided channels",
    "time_shift": "time shift",
    "velocity_scale": "velocity times",
    "early_guidance": "early guidance",
    "early_interval": "early guidance for t in",
    "decode_with": "decoded with",
    "rounding": "pixels rounded",
}


@dataclass(frozen=True)
class SampleConfig(Section):
    """How images are sampled; sampler and steps are the published ones (SiT, REPA)."""

    key, resume = "sample", "free"

    num: int = 64
    """images"""
    steps: int = 250
    """time steps (Heun's method evaluates the model twice in each)"""
    sampler: Literal["euler", "heun", "ode", "sde"] = "sde"
    """ode: euler, or heun, which is also called ode; sde: Euler-Maruyama"""
    guidance_scale: float = 1.0
    """classifier-free guidance; 1: none"""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """t within which guidance is on; 0 is data, 1 is noise"""
    guidance_channels: int | None = None
    """guide only the first channels of the latents; 3 as in the code of DiT, SiT and LightningDiT; None: all"""
    time_shift: float = 1.0
    """k moves the time steps t to k t / (1 + (k - 1) t): above 1 more of them are near the noise; 1: equal steps"""
    velocity_scale: float = 1.0
    """k multiplies the velocity, after any guidance: slightly above 1, such as 1.05, adds contrast to samples of a model of few
    training steps; 1: as predicted"""
    autoguidance: str | None = None
    """guidance_scale extrapolates from this weaker model (a run, checkpoint or weights file) instead of the null condition"""
    early_guidance: float = 1.0
    """w extrapolates from the velocity of the model's second output, where it has one: v_early + w (v - v_early); 1: none"""
    early_interval: tuple[float, float] = (0.0, 1.0)
    """t within which early_guidance is on"""
    seed: int = 0
    batch_size: int = 64
    """changes nothing but speed and memory"""
    capture: Literal["off", "on"] = "off"
    """on: passes of the model are recorded as CUDA graphs and replayed, which changes nothing but speed and memory"""
    labels: Labels = "balanced"
    """balanced, random, or a list of classes that repeats"""
    prompts: tuple[str, ...] | None = None
    """of models of text: prompts that repeat; None: captions of the data, the same ones every time"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of the model; the integration itself is float32"""
    decode_with: str | None = None
    """another VAE that decodes the samples, by hub id or folder; None: the one that encoded the data"""
    rounding: Literal["nearest", "down"] = "nearest"
    """of pixels to whole numbers; down: truncated, as REPA's release does"""

    def check(self) -> None:
        """Raise ValueError for the first value that cannot be."""
        checked_types(self)
        (low, high), (first, last), channels = self.guidance_interval, self.early_interval, self.guidance_channels
        for good, message in (
            (self.num >= 1, f"sample.num is {self.num}; ask for at least one image"),
            (self.batch_size >= 1, f"sample.batch_size is {self.batch_size}; use at least 1"),
            (self.steps >= 1, f"sample.steps is {self.steps}; use at least 1"),
            (self.sampler != "sde" or self.steps >= 2, "sample.steps is 1; the SDE needs at least 2"),
            (0 <= self.guidance_scale < math.inf, f"sample.guidance_scale is {self.guidance_scale}; use 1 for none"),
            (0 <= low < high <= 1, f"sample.guidance_interval {low} to {high} is no part of [0, 1]; 0 is data"),
            (0 <= self.early_guidance < math.inf, f"sample.early_guidance is {self.early_guidance}; use 1 for none"),
            (0 <= first < last <= 1, f"sample.early_interval {first} to {last} is no part of [0, 1]; 0 is data"),
            (
                channels is None or channels >= 1,
                f"sample.guidance_channels is {channels}; leave it out for all channels",
            ),
            (channels is None or self.autoguidance is None, "sample.guidance_channels does not apply to autoguidance"),
            (0 < self.time_shift < math.inf, f"sample.time_shift is {self.time_shift}; use 1 for equal steps"),
            (0 < self.velocity_scale < math.inf, f"sample.velocity_scale is {self.velocity_scale}; use 1 for none"),
            (self.prompts is None or self.prompts, "sample.prompts is empty; give one prompt at least"),
            (self.seed >= 0, f"sample.seed is {self.seed}; use a whole number from 0"),
        ):
            if not good:
                raise ValueError(message)

    def settings(self) -> dict[str, Any]:
        """What an image depends on besides its condition: not number, batch size and graphs, nor later settings at default."""
        other: tuple[str, ...] = ("num", "batch_size", "capture", "labels", "prompts")
        other += tuple(key for key in LATER if getattr(self, key) == getattr(type(self), key))
        kept = {key: value for key, value in dataclasses.asdict(self).items() if key not in other}
        return kept | {"sampler": "heun" if self.sampler == "ode" else self.sampler}


def beyond_defaults(record: Mapping[str, Any]) -> list[str]:
    """What a record of samples (`settings` of samples.json, `made` of a report) says of the settings in LATER, in words."""
    found = {name: record[name] for name in LATER if record.get(name) is not None}
    weak = found.get("autoguidance")
    if isinstance(weak, Mapping):
        found["autoguidance"] = f"({weak.get('stage')}, step {weak.get('step')}, {weak.get('weights')})"
    return [f"{LATER[name]} {value}" for name, value in found.items()]
