"""`settings.json`: the settings of every recipe as data, so that help and wrong arguments need no torch.

The settings themselves are dataclasses next to the code of methods and models, which imports torch for seconds. The snapshot
has their names, types, defaults and descriptions. It is used only while the hash in it is that of the installed sources.
Otherwise, and where code outside the package adds methods or models, the dataclasses themselves are imported.
`python -m selftrans.cli.snapshot` writes it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

PACKAGE = Path(__file__).parent.parent
FILE = PACKAGE / "cli" / "settings.json"
#: sources that the snapshot depends on, within the package
SOURCES = ("config.py", "sample_config.py", "fine_tuning.py", "recipes/*.py", "methods/*.py", "models/*.py")
GROUPS = ("selftrans.methods", "selftrans.models")  #: entry points that add settings


class Recipe(NamedTuple):
    """What the help page of a recipe and the check of arguments need."""

    about: str  #: its docstring
    overrides: Callable[[Sequence[str]], Any]  #: arguments -> an instance of the dataclass of overrides, with defaults


def recipes(words: Sequence[str]) -> dict[str, Recipe] | None:
    """The recipes by name from the snapshot; None where it cannot serve these arguments, or torch is loaded anyway."""
    if (
        "torch" in sys.modules
        or any(":" in word.replace("://", "") for word in words)
        or any(entry_points(group=g) for g in GROUPS)
    ):
        return None
    try:
        known = json.loads(FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if known.get("sources") != sources():
        return None
    described: dict[str, Any] = known["recipes"]
    return {name: Recipe(each["about"], functools.partial(_overrides, known, each)) for name, each in described.items()}


def sources() -> str:
    """The hash of the sources that the snapshot depends on."""
    found = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(PACKAGE.glob(pattern)):
            found.update(f"{path.relative_to(PACKAGE).as_posix()}\n".encode() + path.read_bytes())
    return found.hexdigest()


# ---- data => dataclasses


def _overrides(known: dict[str, Any], recipe: dict[str, Any], words: Sequence[str]) -> Any:
    """As `overrides.default_overrides`; None where the arguments name a method or a model that the snapshot does not have."""
    from selftrans.cli.overrides import method_type, values_of

    method = (values_of(words, "method") or [recipe["method"]])[-1]
    chosen = values_of(words, "model.name")[-1:]
    family = known["models"].get(chosen[0]) if chosen else recipe["sections"]["model"]
    if family is None or {method, *values_of(words, "methods")} - set(known["methods"]):
        return None
    fields: list[Any] = [("method", method_type(known["methods"]), dataclasses.field(default=method))]
    for key, section in (recipe["sections"] | {"model": family}).items():
        values = recipe["values"][key] if section == recipe["sections"][key] else {}
        values = values | ({"name": chosen[0]} if key == "model" and chosen else {})
        kind = _section(known["sections"][section], values)
        fields.append((key, kind, dataclasses.field(default=kind())))
    return dataclasses.make_dataclass("Overrides", fields, frozen=True)()


def _section(known: dict[str, Any], values: dict[str, Any]) -> Any:
    """A frozen dataclass of a section's settings, whose defaults are its own but for these `values`."""
    from selftrans.plain_json import from_plain

    scope = {"typing": typing, "NoneType": types.NoneType}
    hints = typing.get_type_hints(type("Hints", (), {"__annotations__": known["types"]}), scope)
    fields: list[Any] = []
    for name, hint in hints.items():
        helped = Annotated[hint, tyro.conf.arg(help=known["help"][name])] if name in known["help"] else hint
        default = from_plain(hint, values.get(name, known["defaults"].get(name)), name)
        fields.append((name, helped, dataclasses.field(default=default)))
    made = dataclasses.make_dataclass(known["name"], fields, frozen=True)
    made.__doc__ = known["about"]
    return made


# ---- dataclasses => data


def snapshot() -> dict[str, Any]:
    """The content of the file, computed from the dataclasses."""
    from selftrans.cli.overrides import default_overrides
    from selftrans.methods import registry as methods
    from selftrans.models import registry as models
    from selftrans.recipes import RECIPES

    kinds: dict[str, Any] = {spec.Config.__name__: spec.Config for spec in models.MODELS.values()}
    described: dict[str, Any] = {}
    for name, recipe in RECIPES.items():
        sections = dict(vars(default_overrides(recipe(), [])))
        method = sections.pop("method")
        kinds |= {type(section).__name__: type(section) for section in sections.values()}
        described[name] = {
            "about": inspect.getdoc(recipe),
            "method": method,
            "sections": {key: type(section).__name__ for key, section in sections.items()},
            "values": {key: _changed(section) for key, section in sections.items()},
        }
    names = {name: spec.Config.__name__ for spec in models.MODELS.values() for name in (*spec.names, spec.name)}
    return {
        "sources": sources(),
        "methods": methods.REGISTRY.known(),
        "models": names,
        "recipes": described,
        "sections": {name: _section_record(kind) for name, kind in sorted(kinds.items())},
    }


def _changed(section: Any) -> dict[str, Any]:
    """The settings of a section that are not its defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(section)}
    return {
        name: value
        for name, value in vars(section).items()
        if defaults[name] is dataclasses.MISSING or json.dumps(value) != json.dumps(defaults[name])
    }


def _section_record(kind: Any) -> dict[str, Any]:
    """Name and description of a section; type, description and default of each field, where it has them."""
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unset = dataclasses.MISSING
    return {
        "name": kind.__name__,
        "about": inspect.getdoc(kind),
        "types": {
            name: hints[name].__name__ if isinstance(hints[name], type) else repr(hints[name]) for name in fields
        },
        "help": {name: found for name in fields if (found := text_below(kind, name))},
        "defaults": {name: field.default for name, field in fields.items() if field.default is not unset},
    }


def text_below(kind: Any, field: str) -> str:
    """The string below a field of a dataclass on one line, as help pages have it; empty where there is none."""
    from tyro._docstrings import get_field_docstring

    return " ".join((get_field_docstring(kind, field, ()) or "").split())


def text() -> str:
    """The text of the file for the present sources."""
    return json.dumps(snapshot(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(f"{FILE} is written")
