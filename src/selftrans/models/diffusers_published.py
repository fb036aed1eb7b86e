"""Folders of diffusers' transformers, in and out: config.json and diffusion_pytorch_model.safetensors (or several of them).

`import` takes the weights file of such a folder and reads the config.json next to it; `export` writes a folder that diffusers'
`from_pretrained` loads. Its config.json has an entry `_selftrans` with settings for which diffusers has no name, such as what
the output means; diffusers ignores names with an underscore. Without that entry a DiT or PixArt is read as a predictor of
noise, as released. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from selftrans.messages import first_line, printable
from selftrans.models import diffusers_dit, diffusers_flux, diffusers_pixart, diffusers_sd3
from selftrans.models.diffusers_backbone import DiffusersBackbone, DiffusersConfig
from selftrans.models.spec import Layout, Named, Published, PublishedFile, check_shapes
from selftrans.plain_json import from_plain
from selftrans.types import Conditions

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
OWN = "_selftrans"  #: our entry of config.json
LARGEST = 1 << 20  #: bytes of a config.json
Settings = dict[str, Any]  #: of a diffusers class: its defaults, and what config.json says


class Family(NamedTuple):
    """One of diffusers' classes."""

    kind: str  #: its name
    module: Any  #: ours: `build`, `wrap`
    Config: type[DiffusersConfig]
    convert: Callable[[Settings], dict[str, Any]]  #: its settings => fields of `Config`
    #: name of the setting with the width of text tokens, and tokens per text in the release
    text: tuple[str, int] | None


def _sizes(raw: Settings) -> dict[str, Any]:
    return {"layers": raw["num_layers"], "heads": raw["num_attention_heads"], "head_dim": raw["attention_head_dim"]}


def _variance(raw: Settings) -> dict[str, Any]:
    doubled = raw["out_channels"] == 2 * raw["in_channels"]
    return {
        "patch": raw["patch_size"],
        "sample_size": raw["sample_size"],
        "learn_sigma": doubled,
        "prediction": "noise",
    }


def _pixart(raw: Settings) -> dict[str, Any]:
    scale, sizes = raw["interpolation_scale"], raw["use_additional_conditions"]
    scale = max(raw["sample_size"] // 64, 1) if scale is None else scale
    return (
        _sizes(raw)
        | _variance(raw)
        | {"interpolation": scale, "sizes": raw["sample_size"] == 128 if sizes is None else sizes}
    )


def _sd3(raw: Settings) -> dict[str, Any]:
    own = {"patch": raw["patch_size"], "sample_size": raw["sample_size"], "positions": raw["pos_embed_max_size"]}
    own |= {"qk_norm": raw["qk_norm"] is not None, "dual": [k + 1 for k in raw["dual_attention_layers"]]}
    return _sizes(raw) | own | {"pooled": "none", "pooled_width": raw["pooled_projection_dim"]}


def _flux(raw: Settings) -> dict[str, Any]:
    guidance = diffusers_flux.GUIDANCE if raw["guidance_embeds"] else None
    own = {"single_layers": raw["num_single_layers"], "axes": list(raw["axes_dims_rope"]), "guidance": guidance}
    return _sizes(raw) | own | {"pooled": "none", "pooled_width": raw["pooled_projection_dim"]}


#: by the name of our family of models
FAMILIES = {
    "diffusers-dit": Family(
        "DiTTransformer2DModel",
        diffusers_dit,
        diffusers_dit.DiffusersDiTConfig,
        lambda raw: _sizes(raw) | _variance(raw),
        None,
    ),
    "diffusers-pixart": Family(
        "PixArtTransformer2DModel",
        diffusers_pixart,
        diffusers_pixart.DiffusersPixArtConfig,
        _pixart,
        ("caption_channels", 120),
    ),
    "diffusers-sd3": Family(
        "SD3Transformer2DModel", diffusers_sd3, diffusers_sd3.DiffusersSD3Config, _sd3, ("joint_attention_dim", 333)
    ),
    "diffusers-flux": Family(
        "FluxTransformer2DModel",
        diffusers_flux,
        diffusers_flux.DiffusersFluxConfig,
        _flux,
        ("joint_attention_dim", 512),
    ),
}


class Described(NamedTuple):
    """The content of a config.json as settings of this package."""

    family: Family
    config: DiffusersConfig
    shape: tuple[int, ...]
    conditions: Conditions


def _json(path: Path) -> Settings | None:
    """A config.json as an object; None where there is none. ValueError if it is damaged."""
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError("it is too large")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not the config.json of a model ({first_line(error)})") from error
    return found if isinstance(found, dict) else None


def describe(name: str, raw: Settings, where: str) -> Described:
    """A model of the family `name` from its config.json, `raw`. ValueError for settings that the adapter does not support."""
    import diffusers

    family = FAMILIES[name]
    parameters = inspect.signature(getattr(diffusers, family.kind).__init__).parameters
    defaults = {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
    settings = defaults | {key: value for key, value in raw.items() if key in defaults}
    own = raw.get(OWN)
    try:
        if own is not None:
            config = from_plain(family.Config, own["model"], f"{OWN}.model")
            shape = from_plain(tuple[int, int, int], own["shape"], f"{OWN}.shape")
            conditions = from_plain(Conditions, own["conditions"], f"{OWN}.conditions")
        else:
            config = from_plain(family.Config, {"name": name, **family.convert(settings)}, CONFIG)
            shape, conditions = _shape(settings, config), _conditions(settings, family)
        config.check()
        expected = defaults | config.arguments(shape, conditions)
    except (ArithmeticError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} does not describe a {family.kind} ({first_line(error)})") from error
    for key, value in expected.items():
        given = tuple(settings[key]) if isinstance(settings[key], list) else settings[key]
        if given != value and (given is not None or value != _implied(key, settings)):
            raise ValueError(f"{where} has {key} {printable(given, 60)}; only {printable(value, 60)} is supported")
    return Described(family, config, shape, conditions)


def _implied(key: str, settings: Settings) -> Any:
    """The value that diffusers takes for a setting of None."""
    if key == "out_channels":
        return settings["in_channels"]
    if key == "interpolation_scale":
        return max(settings["sample_size"] // 64, 1)
    return settings["sample_size"] == 128 if key == "use_additional_conditions" else None


def _shape(settings: Settings, config: DiffusersConfig) -> tuple[int, ...]:
    """Latents that the model was made for. Flux has no size of its own: those of its pictures of 1024 pixels."""
    if "sample_size" not in settings:
        return settings["in_channels"] // config.patch**2, 128, 128
    return settings["in_channels"], settings["sample_size"], settings["sample_size"]


def _conditions(settings: Settings, family: Family) -> Conditions:
    """Labels, or text of an encoder that config.json does not name."""
    if family.text is None:
        classes = settings["num_embeds_ada_norm"]
        return Conditions("labels" if classes else "none", classes)
    width, tokens = settings[family.text[0]], family.text[1]
    if not isinstance(width, int):
        raise ValueError(f"{family.text[0]} is {width!r:.60}; expected the width of the text")
    return Conditions("text", tokens=tokens, width=width)


def from_pretrained(
    folder: str | Path, *, shape: tuple[int, ...] | None = None, conditions: Conditions | None = None, **settings: Any
) -> DiffusersBackbone:
    """A folder of diffusers (such as `transformer` in that of a pipeline) as a backbone.

    `shape` (C, H, W) and `conditions` replace what config.json says; `settings` those of the model (`prediction`, `pooled`,
    `guidance`). ValueError for a folder of another model, a damaged one, and one without safetensors.
    """
    import diffusers

    path = Path(folder) / CONFIG
    raw = _json(path)
    names = [name for name, family in FAMILIES.items() if raw and raw.get("_class_name") == family.kind]
    if raw is None or not names:
        kinds = ", ".join(family.kind for family in FAMILIES.values())
        raise ValueError(f"{path} is of none of the classes {kinds}; give the folder of a transformer of diffusers")
    if "quantization_config" in raw:
        raise ValueError(f"{path} is of quantised weights, which are not read; use those of full precision")
    found = describe(names[0], raw, str(path))
    config = dataclasses.replace(found.config, **settings)
    try:
        net = getattr(diffusers, found.family.kind).from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
    except Exception as error:  # diffusers and safetensors raise types of their own for damaged files
        raise ValueError(f"{folder} cannot be loaded by diffusers ({first_line(error)})") from error
    return found.family.module.wrap(config, net, shape or found.shape, conditions or found.conditions)


def reader(name: str) -> Callable[[PublishedFile, int | None, str | None], Published | None]:
    """`ModelSpec.reader` of the family `name`."""

    def read(file: PublishedFile, heads: int | None, chosen: str | None) -> Published | None:
        if chosen not in (None, "diffusers"):
            return None
        path = file.path.parent / CONFIG
        raw = _json(path) if any("transformer_blocks." in key for key in file.weights.get("ema", ())) else None
        if raw is None or raw.get("_class_name") != FAMILIES[name].kind:
            if chosen and (raw is None or raw.get("_class_name") not in {each.kind for each in FAMILIES.values()}):
                raise ValueError(
                    f"{file.path} is no transformer of diffusers with its {CONFIG} next to it; set another --convention"
                )
            return None
        return _published(file, name, describe(name, raw, str(path)))

    return read


def _published(file: PublishedFile, name: str, found: Described) -> Published:
    """A recognised file. ValueError unless it has all the tensors."""
    config, named = found.config, file.weights["ema"]
    if config.blocks() > len(named):
        raise ValueError(f"{file.path} has {len(named)} tensors, its {CONFIG} {config.blocks()} blocks")
    with torch.device("meta"):
        model = found.family.module.build(config, found.shape, found.conditions)
    check_shapes(
        f"{file.path}, by its {CONFIG},", named, {k: tuple(v.shape) for k, v in model.net.state_dict().items()}
    )
    text = found.conditions

    def translate(tensors: Named, squares: bool) -> Named:
        null = {
            "null_text": torch.zeros(1, text.tokens, text.width),
            "null_mask": torch.zeros(1, text.tokens, dtype=torch.bool),  # all zero: not known yet
        }
        return {f"net.{key}": x.float() for key, x in tensors.items()} | (null if text.kind == "text" else {})

    return Published(
        name=found.family.kind,
        sizes=f"{config.blocks()} blocks, width {config.heads * config.head_dim}",
        config=config,
        shape=found.shape,
        conditions=text,
        convention="diffusers",
        reason=f"from its {CONFIG}",
        source={"heads": config.heads},
        translate=translate,
    )


def _arguments(model: DiffusersBackbone, config: DiffusersConfig) -> dict[str, Any]:
    """The content of config.json."""
    own = {
        "model": dataclasses.asdict(config),
        "shape": list(model.shape),
        "conditions": dataclasses.asdict(model.conditions),
    }
    return {**json.loads(model.net.to_json_string()), OWN: own}


LAYOUTS = {
    "diffusers": Layout(
        "t = 0 is data, embedded as 1000 t", lambda model: dict(model.net.state_dict()), _arguments, WEIGHTS
    )
}
