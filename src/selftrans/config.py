"""The complete description of a run: frozen dataclasses, to and from json, with dotted overrides."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from selftrans.fine_tuning import Init, Lora, check_together
from selftrans.flow import PATHS, TIMES
from selftrans.methods import registry as methods
from selftrans.models import registry as models
from selftrans.models.sit import SiTConfig
from selftrans.models.spec import ModelConfig
from selftrans.plain_json import from_plain, to_plain
from selftrans.sample_config import SampleConfig
from selftrans.sections import RUN_SECTIONS, Resume, S, Section, fields_of, setting
from selftrans.suggest import nearest
from selftrans.types import Backbone, Conditions

VERSION = 2  #: of the json layout


@dataclass(frozen=True)
class Data(Section):
    """Prepared data (`selftrans prepare`), and what is expected of it."""

    key = "data"

    path: str | None = setting(None, resume="free")
    """directory of shards, or the URL of one (s3://, gs://, hf://, https://, ...); `--data DIR` sets it"""
    autoencoder: str | None = None
    """what decodes previews and samples; None: what the data was prepared with"""
    text_encoder: str | None = setting(None, resume="free")
    """hub id or folder of the text encoder of captions; None: where it was when the data were prepared"""
    builtin: Literal["digits", "digits_t2i"] | None = None
    """data that the run prepares by itself where no path is given; recipes of such data set it"""
    shape: tuple[int, ...] | None = None
    """shape of a latent, channels first: C H W of pictures; None: as prepared; otherwise the data must agree"""
    classes: int | None = None
    """number of classes; None: as prepared; otherwise the data must agree"""
    on_device: bool = setting(False, resume="free")
    """keep the whole set in the memory of the training device and index it there; changes no number, only speed"""
    verify: bool = setting(False, resume="free")
    """compare every shard with its sha256 before training, which reads all of it once"""
    cache_dir: str | None = setting(None, resume="free")
    """folder for shards fetched from a URL, which runs share; None: $SELFTRANS_CACHE_DIR, or ~/.cache/selftrans/data"""
    cache_gb: float | None = setting(None, resume="free")
    """most that this folder holds, in GB: those used last; None: $SELFTRANS_CACHE_GB, or 100"""
    window: int | None = None
    """shards whose rows are shuffled together, so that only few are needed at a time; None: all, or for data at a URL that
    are larger than the cache, as many as a third of it holds, which a run keeps"""
    held_out: float = 0.0
    """share of the samples that is never trained on, such as 0.02; the log has their loss and others' (docs/measuring.md)"""

    def check(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"data.held_out must be a share in [0, 1), not {self.held_out}")
        for name in ("cache_gb", "window"):
            if getattr(self, name) is not None:
                check_positive(self, name)


@dataclass(frozen=True)
class Train(Section):
    """Optimisation of the student, and how the run is kept."""

    key = "train"

    steps: int = setting(400_000, resume="free")
    """student steps, those of the last stage; earlier stages have lengths of their own"""
    batch_size: int = 256
    """samples per step over all processes"""
    accumulate: int = setting(1, resume="consent")
    """micro-batches per step and process"""
    lr: float = setting(1e-4, resume="consent")
    """AdamW learning rate after warm-up, constant unless lr_decay says otherwise"""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = setting(0.0, resume="consent")
    warmup: int = setting(0, resume="consent")
    """steps over which the learning rate rises linearly from zero"""
    lr_decay: tuple[int, int] | None = setting(None, resume="consent")
    """A B: from step A on the learning rate falls, to zero at step B, at each stage's own steps; None: never"""
    lr_decay_shape: Literal["linear", "cosine"] = setting("linear", resume="consent")
    """how it falls"""
    clip: float = setting(1.0, resume="consent")
    """largest gradient norm"""
    ema: float = 0.9999
    """decay of the weight average; warmed up as min(ema, (1 + step) / (10 + step))"""
    drop: float = setting(0.1, resume="consent")
    """probability of training a sample on the null condition"""
    path: str = "linear"
    """probability path: linear or cosine"""
    times: str = "systematic"
    """timestep sampler: systematic (uniform, evenly spread over the batch), uniform (independent), lognormal (EDM's),
    lognormal_standard (REPA's), logitnormal (SD3's and LightningDiT's) or systematic_logitnormal (evenly spread)"""
    time_shift: float = 1.0
    """k moves the drawn times t to k t / (1 + (k - 1) t), as sample.time_shift those of sampling: above 1 more of them are near
    the noise, for latents of many numbers (SD3: 3 at 1024 pixels); 1: none"""
    loss: Literal["own", "velocity", "noise"] = setting("own", resume="consent")
    """whose squared error the flow loss is: velocity, noise, or own, that of what the model predicts (DiT: noise)"""
    cosine: float = setting(0.0, resume="consent")
    """factor of 1 - cos between predicted and true velocity, which is added to the flow loss (LightningDiT: 1)"""
    contrastive: float = setting(0.0, resume="consent")
    """factor of the squared error to the velocity of another sample, which is subtracted from the flow loss (Contrastive Flow
    Matching: 0.05)"""
    precision: Literal["fp32", "bf16", "fp16"] = setting("fp32", resume="consent")
    fp8: Literal["none", "tensorwise", "rowwise"] = setting("none", resume="consent")
    """products of attention and MLP in eight bits, with one scale for each tensor or each row; needs bf16 and torchao"""
    compile: bool | None = setting(None, resume="free")
    """torch.compile each block; None: on a GPU"""
    capture: Literal["off", "on", "auto"] = setting("auto", resume="free")
    """replay the whole step as CUDA graphs instead of launching its kernels one by one, for small models; auto: on a GPU, where
    it can be and leaves memory; on: or say why not. On a CPU, on: the same step on the same buffers without a graph
    (docs/step.md)"""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit: moments of 8 bits (bitsandbytes, `pip install selftrans[8bit]`), a quarter of the memory"""
    recompute: bool | int | tuple[int, ...] = setting(False, resume="free")
    """activation checkpointing, less memory for one more forward pass: True, of all blocks; a number, of the first so many;
    several, of these (1-based)"""
    shard: bool = setting(False, resume="free")
    """with several processes: FSDP2, which splits weights, gradients, moments and average over them; not with fp16"""
    timeout: float = setting(1800.0, resume="free")
    """seconds that a process waits for the others of the run before it ends with an error"""
    seed: int = 0
    checkpoint_every: int = setting(10_000, resume="free")
    preview_every: int = setting(10_000, resume="free")
    """a grid of samples from the EMA; 0: never"""
    keep: int = setting(2, resume="free")
    """checkpoints kept per stage, the newest; 0: all"""
    keep_best: int = setting(1, resume="free")
    """and those of the lowest mean flow loss since the checkpoint before"""
    keep_every: int = setting(0, resume="free")
    """and those at every multiple of so many steps; 0: none"""
    max_skips: int = setting(25, resume="free")
    """updates skipped in a row, with gradients not finite, that end the training (fp16 needs a few to find its scale)"""
    allow_changes: bool = setting(False, resume="free")
    """continue a run with another lr, warmup, lr_decay, clip, weight_decay, drop, loss, cosine, contrastive, precision,
    accumulate or guidance weight, which is printed and written to changes.json"""

    def check(self) -> None:
        for name, known in {"path": list(PATHS), "times": list(TIMES)}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"train.{name} '{getattr(self, name)}' is unknown; choose {', '.join(known)}")
        positive = ("steps", "batch_size", "accumulate", "lr", "time_shift", "clip")
        for name in (*positive, "checkpoint_every", "max_skips", "timeout"):
            check_positive(self, name)
        for name in ("warmup", "preview_every", "keep", "keep_best", "keep_every", "seed", "weight_decay", "cosine"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} must not be negative, not {getattr(self, name)}")
        if self.lr_decay and not 0 <= self.lr_decay[0] < self.lr_decay[1]:
            raise ValueError(f"train.lr_decay {self.lr_decay} must be two increasing steps, or None")
        if self.optimizer != "adamw" and (self.shard or self.precision == "fp16"):
            other = "train.shard" if self.shard else "train.precision fp16"
            raise ValueError(f"train.optimizer {self.optimizer} does not go with {other}; use adamw")
        if self.fp8 != "none" and (self.precision != "bf16" or self.shard):
            raise ValueError(f"train.fp8 {self.fp8} goes with train.precision bf16 and without train.shard")
        if not 0 <= self.contrastive < 1:
            raise ValueError(f"train.contrastive must be in [0, 1), not {self.contrastive}")
        if not 0 <= self.ema < 1 or not 0 <= self.drop <= 1:
            raise ValueError(f"train.ema must be in [0, 1) and train.drop in [0, 1], not {self.ema}, {self.drop}")


def check_positive(section: Section, name: str) -> None:
    """ValueError unless a setting is above zero."""
    if not getattr(section, name) > 0:
        raise ValueError(f"{section.key}.{name} must be above zero, not {getattr(section, name)}")


@dataclass(frozen=True)
class Log(Section):
    """What is written while a run goes on."""

    key, resume = "log", "free"

    every: int = 100
    """steps between lines of log.jsonl"""
    held_out_every: int = 1000
    """with data.held_out: steps between measurements of the loss, each written with the next line, and with the last"""
    tensorboard: bool = True
    """TensorBoard files in RUN/tensorboard"""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """also these, with the settings of the run and its previews; each needs its package (pip install wandb), and one that is
    missing or fails does not stop the run"""
    preview_images: int = 36
    preview_steps: int = 25
    """Heun steps of a preview"""

    def check(self) -> None:
        for name in ("every", "held_out_every", "preview_images", "preview_steps"):
            check_positive(self, name)


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on. Saved as config.json in the run directory and in every checkpoint."""

    recipe: str
    method: str = methods.DEFAULT
    """a built-in method, one of an installed package, or module:function"""
    data: Data = field(default_factory=Data)
    model: ModelConfig = field(default_factory=SiTConfig)
    init: Init = field(default_factory=Init)
    lora: Lora = field(default_factory=Lora)
    train: Train = field(default_factory=Train)
    sample: SampleConfig = field(default_factory=SampleConfig)
    log: Log = field(default_factory=Log)
    sections: Mapping[str, Any] = field(default_factory=dict)
    """settings of methods, by key; a recipe may hold those of several, a run holds those of its own (`restricted`)"""

    def section(self, kind: type[S]) -> S:
        """The settings of one kind: as they are given, or their defaults."""
        found = self.sections.get(kind.key)
        return found if isinstance(found, kind) else kind()  # of a method that is not known here it is plain json

    def restricted(self) -> RunConfig:
        """The same with the sections of its own method only, with defaults for those that are not given."""
        own = {kind.key: self.section(kind) for kind in methods.find(self.method).sections}
        return dataclasses.replace(self, sections=own)

    def override(self, dotted: Mapping[str, Any]) -> RunConfig:
        """The same with some fields replaced: `{"method": "vanilla", "train.steps": 8, "stage1.block": 1}`.

        The order of the names does not matter: model.name, which may choose another family with other fields, comes first.
        """
        config = self
        for name, value in sorted(dotted.items(), key=lambda item: item[0] != "model.name"):
            key, _, leaf = name.rpartition(".")
            if not key:
                config = dataclasses.replace(config, **{leaf: value})
            elif key in RUN_SECTIONS:
                section: Any = config.model_of(value) if name == "model.name" else getattr(config, key)
                config = dataclasses.replace(config, **{key: dataclasses.replace(section, **{leaf: value})})
            else:
                section = dataclasses.replace(config.sections.get(key) or _section_kind(key)(), **{leaf: value})
                config = dataclasses.replace(config, sections={**config.sections, key: section})
        return config

    def model_of(self, name: str) -> ModelConfig:
        """The settings of the model `name`: those of this run where it is of the same family, else that family's defaults."""
        kind = models.find(name).Config
        return dataclasses.replace(self.model, name=name) if type(self.model) is kind else kind(name=name)

    def build_model(self, shape: tuple[int, ...], conditions: Conditions) -> Backbone:
        """A student for latents (C, *S) under these conditions, freshly initialised. ValueError where it cannot be."""
        model = models.find(self.model.name).build(self.model, tuple(shape), conditions)
        model.use_path(self.train.path)
        if self.model.early_block is not None:
            model.add_early(self.model.early_block)
        return model

    def check(self) -> RunConfig:
        """Returns this configuration. ValueError names the first field that cannot work."""
        known = (section for section in self.sections.values() if isinstance(section, Section))  # else plain json
        for section in (self.data, self.model, self.init, self.lora, self.train, self.log, *known, self.sample):
            section.check()
        check_together(self.init, self.lora, self.train.shard)
        if self.lora.rank and self.train.fp8 != "none":
            raise ValueError("train.fp8 does not go with lora.rank; leave one of them out")
        return self


def _section_kind(key: str) -> type[Section]:
    """The section of a method, by its key. ValueError where no known method has it."""
    known = methods.sections_of(methods.REGISTRY.every())
    if key not in known:
        raise ValueError(f"section '{key}' is unknown{nearest(key, known)}")
    return known[key]


def sections(*given: Section) -> dict[str, Section]:
    """Settings of methods by their keys, as `RunConfig.sections` takes them."""
    return {section.key: section for section in given}


def settings_of(config: RunConfig) -> Iterator[tuple[str, Any, Resume]]:
    """(dotted name, value, what may happen to it when a run continues) of every setting, such as `train.lr`, `method`."""
    yield "recipe", config.recipe, "fixed"
    yield "method", config.method, "fixed"
    for key, section in {**config.sections, **{key: getattr(config, key) for key in RUN_SECTIONS}}.items():
        if isinstance(section, Section):
            yield from ((f"{key}.{name}", value, rule) for name, value, rule, _ in fields_of(section))
        else:  # of a method that is not known here
            yield key, section, "fixed"


def to_object(config: RunConfig) -> dict[str, Any]:
    """A configuration and the version of its layout, as json holds it; sections of methods at the level of the others."""
    plain = to_plain(config)
    own = plain.pop("sections")
    return {"version": VERSION, **plain, **own}


def to_json(config: RunConfig) -> str:
    """`to_object` as indented json."""
    return json.dumps(to_object(config), indent=2)


def from_json(text: str, *, lenient: bool = False) -> RunConfig:
    """Inverse of `to_json`. ValueError as `from_object`."""
    try:
        raw = json.loads(text)
    except RecursionError as error:
        raise ValueError("this configuration is nested too deeply") from error
    return from_object(raw, lenient=lenient)


def from_object(raw: Any, *, lenient: bool = False) -> RunConfig:
    """Inverse of `to_object`. ValueError names a field that is unknown, missing or of another type, and other versions.

    The settings of a method that is not known here, or whose code may not be imported, stay plain json. So do, with
    `lenient`, sections that this version of a method does not understand: a model is loaded without them.
    """
    raw = dict(raw) if isinstance(raw, dict) else {}
    if raw.pop("version", None) != VERSION:
        raise ValueError(
            f"this configuration is not of version {VERSION}; it was written by another version of selftrans"
        )
    own = {f.name for f in dataclasses.fields(RunConfig)} - {"sections"}
    kinds = _section_kinds(raw.get("method"))
    found = {key: raw.pop(key) for key in list(raw) if key not in own and (kinds is None or key in kinds)}
    for key, kind in (kinds or {}).items():
        if key in found:
            with contextlib.suppress(ValueError) if lenient else contextlib.nullcontext():
                found[key] = from_plain(kind, found[key], f"config.{key}")
    model = _model_from(raw.pop("model", {}))
    config = from_plain(RunConfig, raw, "config")
    if model.predicts == "noise" and "loss" not in raw.get("train", {}):  # written before there was a choice
        config = config.override({"train.loss": "velocity"})
    return dataclasses.replace(config, model=model, sections=found)


def _section_kinds(method: object) -> dict[str, type[Section]] | None:
    """Sections of a method by key; None where the method is unknown, so that nothing is known of its settings."""
    try:
        return {kind.key: kind for kind in methods.find(str(method)).sections}
    except ValueError:
        return None


def _model_from(raw: Any) -> ModelConfig:
    """The settings of a model; its name says of which family. ValueError as `from_json`."""
    if not isinstance(raw, dict) or not isinstance(raw.get("name", ""), str):
        raise ValueError(f"config.model should be an object with a name, not {raw!r:.60}")
    kind = models.find(raw["name"]).Config if "name" in raw else SiTConfig
    return from_plain(kind, raw, "config.model")
