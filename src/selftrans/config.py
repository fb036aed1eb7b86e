"""The complete description of a run: frozen dataclasses, to and from json, with dotted overrides from the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch

from selftrans.flow import PATHS, TIMES
from selftrans.methods.dispersive import Dispersive
from selftrans.methods.layersync import LayerSync
from selftrans.methods.repa import Repa
from selftrans.methods.self_transcendence import Stage1, Stage2
from selftrans.methods.sra import SRA
from selftrans.models.sit import SIT, SiT
from selftrans.suggest import nearest

VERSION = 1  #: of the json layout
Labels: TypeAlias = Literal["balanced", "random"] | tuple[int, ...]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLER_NAMES = ("euler", "heun", "ode", "sde")
LARGEST = 1 << 20  #: size of a model's part: what is beyond is a mistake, or means to take all time and memory


@dataclass(frozen=True)
class Data:
    """Prepared data (`selftrans prepare`), and what is expected of it."""

    path: str | None = None
    """directory of shards; `--data DIR` sets it"""
    autoencoder: str | None = None
    """what decodes previews and samples; None: what the data was prepared with"""
    shape: tuple[int, int, int] | None = None
    """(C, H, W) of a latent; None: as prepared; otherwise the data must agree"""
    classes: int | None = None
    """number of classes; None: as prepared; otherwise the data must agree"""
    on_device: bool = False
    """keep the whole set in the memory of the training device and index it there; changes no number, only speed"""
    verify: bool = False
    """compare every shard with its sha256 before training, which reads all of it once"""


@dataclass(frozen=True)
class Model:
    """The student. A field left at None comes from the published size `name`."""

    name: str = "SiT-S/2"
    """published size, SiT-{S,B,L,XL}/{1,2,4,8}"""
    width: int | None = None
    """channels of a token"""
    depth: int | None = None
    """number of blocks"""
    heads: int | None = None
    """attention heads; with a width of your own, None means one per 64 channels"""
    patch: int | None = None
    """side of a token in latent pixels"""
    qk_norm: bool = True
    """LayerNorm on queries and keys, as in the released models"""

    def sizes(self) -> dict[str, int]:
        """Constructor arguments width, depth, heads, patch. ValueError for an unknown name or a size below one."""
        if self.name not in SIT:
            raise ValueError(f"model.name '{self.name}' is unknown{nearest(self.name, SIT)}")
        chosen = {key: getattr(self, key) for key in ("width", "depth", "heads", "patch")}
        for key, value in chosen.items():
            if value is not None and value < 1:
                raise ValueError(f"model.{key} must be above zero, not {value}")
            if value is not None and value > LARGEST:
                raise ValueError(f"model.{key} must be at most {LARGEST}, not {value}")
        sizes = SIT[self.name] | {key: value for key, value in chosen.items() if value is not None}
        if self.heads is None and sizes["width"] != SIT[self.name]["width"]:
            width = sizes["width"]
            sizes["heads"] = next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)
        return sizes

    def build(self, shape: tuple[int, int, int], num_classes: int) -> SiT:
        """A student for latents (C, H, W) and this many classes, freshly initialised."""
        sizes = self.sizes()
        return SiT(shape, num_classes, qk_norm=self.qk_norm, **sizes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Train:
    """Optimisation of the student, and how the run is kept."""

    steps: int = 400_000
    """student steps (of the last stage; `stage1.steps` has its own)"""
    batch_size: int = 256
    """images per step over all processes"""
    accumulate: int = 1
    """micro-batches per step and process"""
    lr: float = 1e-4
    """AdamW learning rate after warm-up, constant"""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: int = 0
    """steps over which the learning rate rises linearly from zero"""
    clip: float = 1.0
    """largest gradient norm"""
    ema: float = 0.9999
    """decay of the weight average; warmed up as min(ema, (1 + step) / (10 + step))"""
    drop: float = 0.1
    """probability of training a sample on the null condition"""
    path: str = "linear"
    """probability path: linear or cosine"""
    times: str = "systematic"
    """timestep sampler: systematic (evenly spread over the batch), uniform (independent) or lognormal"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool | None = None
    """torch.compile each block; None: on a GPU"""
    recompute: bool = False
    """activation checkpointing: less memory, one more forward pass"""
    shard: bool = False
    """with several processes: FSDP2, which splits weights, gradients, moments and average over them; not with fp16"""
    timeout: float = 1800.0
    """seconds that a process waits for the others of the run before it ends with an error"""
    seed: int = 0
    checkpoint_every: int = 10_000
    preview_every: int = 10_000
    """a grid of samples from the EMA; 0: never"""
    keep: int = 2
    """checkpoints kept per stage, the newest; 0: all"""
    keep_best: int = 1
    """and those of the lowest mean flow loss since the checkpoint before"""
    keep_every: int = 0
    """and those at every multiple of so many steps; 0: none"""
    max_skips: int = 25
    """updates in a row skipped for want of a finite gradient that end the training (fp16 needs a few to find its scale)"""
    allow_changes: bool = False
    """continue a run with another lr, warmup, clip, weight_decay, drop, precision or guidance weight; said, and written to
    changes.json"""


@dataclass(frozen=True)
class SampleConfig:
    """How images are sampled; sampler and steps are the published ones (SiT, REPA)."""

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
    seed: int = 0
    batch_size: int = 64
    """changes nothing but speed and memory"""
    labels: Labels = "balanced"
    """balanced, random, or a list of classes that repeats"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of the model; the integration itself is float32"""

    def check(self) -> None:
        """Raise ValueError for the first value that cannot be."""
        low, high = self.guidance_interval
        for good, message in (
            (self.num >= 1, f"sample.num is {self.num}; ask for at least one image"),
            (self.batch_size >= 1, f"sample.batch_size is {self.batch_size}; use at least 1"),
            (
                self.sampler in SAMPLER_NAMES,
                f"sample.sampler {self.sampler!r} is unknown; choose from {sorted(SAMPLER_NAMES)}",
            ),
            (self.steps >= 1, f"sample.steps is {self.steps}; use at least 1"),
            (self.sampler != "sde" or self.steps >= 2, "sample.steps is 1; the SDE needs at least 2"),
            (0 <= self.guidance_scale < math.inf, f"sample.guidance_scale is {self.guidance_scale}; use 1 for none"),
            (0 <= low < high <= 1, f"sample.guidance_interval {low} to {high} is no part of [0, 1]; 0 is data"),
            (self.seed >= 0, f"sample.seed is {self.seed}; use a whole number from 0"),
            (self.precision in DTYPES, f"sample.precision {self.precision!r} is unknown; choose from {list(DTYPES)}"),
            (
                not isinstance(self.labels, str) or self.labels in ("balanced", "random"),
                f"sample.labels {self.labels!r} are unknown; use balanced, random or a list of classes",
            ),
        ):
            if not good:
                raise ValueError(message)

    def settings(self) -> dict[str, Any]:
        """What an image depends on: everything but their number and the batch size, with the sampler's own name."""
        kept = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("num", "batch_size")}
        return kept | {"sampler": "heun" if self.sampler == "ode" else self.sampler}


@dataclass(frozen=True)
class Log:
    """What is written while a run goes on."""

    every: int = 100
    """steps between lines of log.jsonl"""
    tensorboard: bool = True
    preview_images: int = 36
    preview_steps: int = 25
    """Heun steps of a preview"""


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on. Saved as config.json in the run directory and in every checkpoint."""

    recipe: str
    method: str = "self_transcendence"
    """a name in METHODS (vanilla, structure, self_transcendence, repa, sra, layersync, dispersive, ...) or module:function"""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    stage1: Stage1 = field(default_factory=Stage1)
    stage2: Stage2 = field(default_factory=Stage2)
    repa: Repa = field(default_factory=Repa)
    sra: SRA = field(default_factory=SRA)
    layersync: LayerSync = field(default_factory=LayerSync)
    dispersive: Dispersive = field(default_factory=Dispersive)
    train: Train = field(default_factory=Train)
    sample: SampleConfig = field(default_factory=SampleConfig)
    log: Log = field(default_factory=Log)

    def check(self) -> RunConfig:
        """Itself, or a ValueError that names the first field that cannot work."""
        self.model.sizes()
        for name, known in {"path": list(PATHS), "times": list(TIMES)}.items():
            if getattr(self.train, name) not in known:
                raise ValueError(f"train.{name} '{getattr(self.train, name)}' is unknown; choose {', '.join(known)}")
        positive = ("steps", "batch_size", "accumulate", "lr", "clip", "checkpoint_every", "max_skips", "timeout")
        for section, name in [("train", key) for key in positive] + [
            ("log", key) for key in ("every", "preview_images", "preview_steps")
        ]:
            if not getattr(getattr(self, section), name) > 0:
                raise ValueError(f"{section}.{name} must be above zero, not {getattr(getattr(self, section), name)}")
        for name in ("warmup", "preview_every", "keep", "keep_best", "keep_every", "seed", "weight_decay"):
            if getattr(self.train, name) < 0:
                raise ValueError(f"train.{name} must not be negative, not {getattr(self.train, name)}")
        if not 0 <= self.train.ema < 1 or not 0 <= self.train.drop <= 1:
            raise ValueError(
                f"train.ema must be in [0, 1) and train.drop in [0, 1], not {self.train.ema}, {self.train.drop}"
            )
        if self.stage1.steps is not None and self.stage1.steps < 1:
            raise ValueError(
                f"stage1.steps must be above zero, not {self.stage1.steps}; to skip stage 1 give --teacher"
            )
        for section in ("stage1", "stage2", "repa", "sra", "layersync", "dispersive"):
            method = getattr(self, section)
            if not 0 <= method.weight < math.inf or getattr(method, "head_width", 1) < 1:
                raise ValueError(f"{section}.weight must be a number from 0 and {section}.head_width at least 1")
        if not math.isfinite(self.stage2.scale):
            raise ValueError(f"stage2.scale must be a number, not {self.stage2.scale}")
        self.sample.check()
        return self


def to_json(config: RunConfig) -> str:
    """A configuration and the version of its layout, as indented json."""
    return json.dumps({"version": VERSION, **dataclasses.asdict(config)}, indent=2)


def from_json(text: str) -> RunConfig:
    """Inverse of `to_json`. ValueError names a field that is unknown, missing or of another type, and other versions."""
    try:
        raw = json.loads(text)
    except RecursionError as error:
        raise ValueError("this configuration is nested beyond reason") from error
    if not isinstance(raw, dict) or raw.pop("version", None) != VERSION:
        raise ValueError(
            f"this configuration is not of version {VERSION}; it was written by another version of selftrans"
        )
    return _build(RunConfig, raw, "config")


def _build(kind: Any, raw: Any, where: str) -> Any:
    """A value of type `kind` from plain json."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(raw, dict):
            raise ValueError(f"{where} should be an object, not {raw!r:.60}")
        for name in raw:
            if name not in hints:
                raise ValueError(f"{where}.{ascii(name)[1:-1][:60]} is unknown{nearest(name, hints)}")
        unset = dataclasses.MISSING
        required = [f.name for f in dataclasses.fields(kind) if f.default is unset and f.default_factory is unset]
        missing = [name for name in required if name not in raw]
        if missing:
            raise ValueError(f"{where}.{missing[0]} is missing")
        return kind(**{name: _build(hints[name], value, f"{where}.{name}") for name, value in raw.items()})  # type: ignore[operator]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if raw is None and type(None) in inner:
            return None
        kinds = [k for k in inner if k is not type(None)]
        for other in kinds[1:]:
            with contextlib.suppress(ValueError):
                return _build(other, raw, where)
        return _build(kinds[0], raw, where)
    if origin is Literal and raw in inner:
        return raw
    if origin is tuple and isinstance(raw, list):
        kinds = [inner[0]] * len(raw) if inner[-1] is Ellipsis else list(inner)
        if len(kinds) == len(raw):
            return tuple(_build(k, value, where) for k, value in zip(kinds, raw, strict=True))
    if isinstance(kind, type) and origin is None:
        whole = isinstance(raw, int) and not isinstance(raw, bool)
        if whole and not abs(raw) < 1 << 63:
            raise ValueError(f"{where} is beyond 64 bits")
        if kind is float and whole:
            return float(raw)
        if isinstance(raw, kind) and not (kind is int and not whole):
            return raw
    raise ValueError(f"{where} should be {kind}, not {raw!r:.60}")
