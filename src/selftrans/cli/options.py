"""Options that several commands share, and the base class of all commands."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import tyro

Config = TypeVar("Config")  #: the dataclass of a run's settings, which depends on the recipe and its method

#: a nested dataclass whose fields are options of the command itself, without a prefix
Inline = tyro.conf.arg(name="")
#: overrides are all written `--a.b VALUE`, `True` and `False` included
Overrides = (Inline, tyro.conf.FlagConversionOff)

RunOrFile = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="RUN_OR_FILE",
        help="run directory, checkpoint or weights file, or hf://owner/name[@revision] of the hub",
    ),
]
Weights = Annotated[
    Literal["ema", "raw"], tyro.conf.arg(help="ema: the moving average of the weights; raw: the weights themselves")
]
TextEncoder = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="PATH",
        help="hub id or folder of the run's text encoder; None: where it was when the data were prepared",
    ),
]
Stage = Annotated[str | None, tyro.conf.arg(metavar="NAME", help="stage of the run; None: its last")]
Trust = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(
        metavar="MODULE:FUNCTION",
        help="import this code outside selftrans: a method or model that the run names; it runs with your permissions",
    ),
]


#: type of the last field of commands on a recipe, which is no option: names of the settings that were given, as model.depth
Typed = Annotated[tuple[str, ...], tyro.conf.Fixed, tyro.conf.SuppressFixed]


CONTINUES, STARTS_AGAIN = "the same command continues", "the same command starts again"


@dataclass
class Command:
    """A command: its fields are its arguments, its docstring opens its help page, `run()` executes it."""

    REPEATED: ClassVar[str] = STARTS_AGAIN  #: what the same command does after it was interrupted

    def options(self, *but: str) -> dict[str, Any]:
        """The arguments by name, without those in `but`, and without `trust`, which is used before `run`."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in (*but, "trust")]
        return {name: getattr(self, name) for name in names}


@dataclass
class RecipeCommand(Command, Generic[Config]):
    """A command on a recipe, with the fields `recipe`, `out` and `trust`.

    `config`: the recipe with its overrides. `typed`: the names of the overrides that were given.
    """

    HAS_METHOD: ClassVar[bool] = True  #: whether --method is an option


@dataclass
class SamplingOptions:
    """How images are sampled: fields of SampleConfig. None: as in the run's configuration."""

    num: int | None = None
    """number of images; None, here and below: as in the run's configuration (--sample.num and so on at training)"""
    steps: int | None = None
    """time steps of the sampler"""
    sampler: Literal["ode", "sde", "euler", "heun"] | None = None
    """ode is Heun's method, sde is Euler-Maruyama"""
    guidance_scale: float | None = None
    """strength of classifier-free guidance; 1: none"""
    guidance_interval: tuple[float, float] | None = None
    """t within which guidance acts; 0 is data, 1 is noise"""
    guidance_channels: int | None = None
    """guide only the first channels of the latents (3 in the code of DiT, SiT and LightningDiT); None: as in the run, all"""
    time_shift: float | None = None
    """k moves the time steps t to k t / (1 + (k - 1) t); 1: equal steps (LightningDiT's timestep_shift 0.3 is 1 / 0.3)"""
    velocity_scale: float | None = None
    """k multiplies the velocity; slightly above 1, such as 1.05, adds contrast to samples of a model of few training steps"""
    autoguidance: Annotated[str | None, tyro.conf.arg(metavar="RUN_OR_FILE")] = None
    """a weaker model of the same data, such as RUN/stage1 or a run of fewer steps: the guidance scale w then extrapolates from
    its velocity, v_weak + w (v - v_weak), instead of from the null condition"""
    early_guidance: float | None = None
    """w for a model with a second output, as Internal Guidance trains it: the velocity is extrapolated from that output,
    v_early + w (v - v_early); 1: none. Can be combined with classifier-free guidance and autoguidance"""
    early_interval: tuple[float, float] | None = None
    """t within which early guidance acts; 0 is data, 1 is noise"""
    seed: int | None = None
    """image k depends on the seed and k alone"""
    batch_size: int | None = None
    """images at a time; changes speed and memory only"""
    capture: Literal["off", "on"] | None = None
    """on: passes of the model are recorded as CUDA graphs and replayed, for small models and few images at a time, where the
    host is slower than the GPU; changes speed and memory only"""
    labels: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="CLASS [CLASS ...]", aliases=("--classes",))] = None
    """classes of the images. balanced: each equally often; random: drawn at random; names or numbers of classes, which repeat;
    cat:10 dog:5 makes 10 and 5 images (and sets --num)"""
    prompts: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="PROMPT [PROMPT ...]")] = None
    """prompts for a model of text, or a file with one in each line; image k has prompt k modulo their number. None: those of
    the run's previews"""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """precision of the model; the sampler itself computes in fp32"""
    decode_with: str | None = None
    """another VAE that decodes the samples, by hub id or folder (published figures: stabilityai/sd-vae-ft-ema); its latents
    must have the same shape"""
    rounding: Literal["nearest", "down"] | None = None
    """how pixels become whole numbers; down: truncated, as in REPA's release"""

    def given(self) -> dict[str, Any]:
        """The options that were set, by name; prompts from a file as its lines. ValueError where it cannot be read."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if self.prompts is not None:
            from selftrans.sampling.conditioning import read_prompts

            given["prompts"] = read_prompts(self.prompts)
        return given
