"""Commands on a recipe (train, compare): their own options, and `--a.b VALUE` for every setting of the recipe."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from selftrans.cli import snapshot
from selftrans.cli.options import RecipeCommand
from selftrans.cli.parse import HELP, UsageError, blank, option_names, parse
from selftrans.plugins import trust
from selftrans.suggest import closest, did_you_mean

if TYPE_CHECKING:
    from selftrans.config import RunConfig


@dataclass(frozen=True)
class _NoOverrides:
    """Takes the place of a recipe's settings while the recipe is not known yet."""


def override_type(config: RunConfig, words: Sequence[str]) -> tuple[Any, Any]:
    """(the dataclass whose fields are the overrides, an instance with their defaults) for a recipe's `config`.

    The overrides are the settings of the run, of its model, and of every method that is known. `words` are the arguments of
    the command: a method or model that they name as module:function is imported, and so known. ValueError for unknown names.
    """
    from selftrans.config import Data, Log, SampleConfig, Train
    from selftrans.fine_tuning import Init, Lora
    from selftrans.methods import registry as methods
    from selftrans.sections import RUN_SECTIONS

    method = (values_of(words, "method") or [config.method])[-1]
    for name in (method, *values_of(words, "methods")):
        if ":" in name:
            trust(name)
            methods.find(name)
    methods.find(method)
    model = config.model
    for name in values_of(words, "model.name")[-1:]:
        if ":" in name:
            trust(name)
        model = config.model_of(name)
    kinds = methods.sections_of(methods.REGISTRY.every())
    types = {"data": Data, "model": type(model), "init": Init, "lora": Lora, "train": Train}
    types |= {**kinds, "sample": SampleConfig, "log": Log}
    values = {key: getattr(config, key) for key in RUN_SECTIONS} | {"model": model}
    values |= {key: config.section(kind) for key, kind in kinds.items()}
    fields: list[Any] = [("method", method_type(methods.REGISTRY.known()), dataclasses.field(default=method))]
    fields += [(key, kind, dataclasses.field(default=values[key])) for key, kind in types.items()]
    overrides = dataclasses.make_dataclass("Overrides", fields, frozen=True)
    return overrides, overrides()


def overridden(config: RunConfig, parsed: Any) -> RunConfig:
    """The recipe's configuration with parsed overrides; it still holds the sections of every method."""
    from selftrans.sections import RUN_SECTIONS

    values = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(parsed)}
    own = {name: values.pop(name) for name in ("method", *RUN_SECTIONS)}
    return dataclasses.replace(config, **own, sections=values)


def method_type(known: Sequence[str]) -> Any:
    """The type of the option --method, where these methods are known."""
    return Annotated[str, tyro.conf.arg(help=f"one of {', '.join(known)}, or module:function")]


def values_of(words: Sequence[str], name: str) -> list[str]:
    """Every value of `--name a b` and `--name=a`, in their order."""
    found, taking = [], False
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            taking = flag.replace("_", "-") == f"--{name}" and not equals
            found += [value] if equals and flag.replace("_", "-") == f"--{name}" else []
        elif taking:
            found.append(word)
    return found


def parse_on_recipe(kind: type[RecipeCommand[Any]], words: Sequence[str], prog: str) -> Any:
    """The command that `words` describe, its `config` complete. Raises as `parse` does.

    The words are read twice: for the recipe and for the code to import, on which the overrides depend, and then in full.
    """
    known = snapshot.recipes(words)
    if known:  # prints help and refuses wrong arguments without importing torch
        first = _command_of_recipe(kind, words, prog, {name: recipe.about for name, recipe in known.items()})
        default = known[first.recipe].overrides(words)
        if default is not None:
            _parsed_with(kind, words, prog, first.recipe, known[first.recipe].about, default)
    from selftrans.recipes import RECIPES

    first = _command_of_recipe(
        kind, words, prog, {name: inspect.getdoc(function) or "" for name, function in RECIPES.items()}
    )
    for name in first.trust:
        trust(name)
    recipe = RECIPES[first.recipe]
    _, config = override_type(recipe(), words)
    command = _parsed_with(kind, words, prog, first.recipe, inspect.getdoc(recipe) or "", config)
    command.config = overridden(recipe(), _converted(type(config), command.config))
    command.typed = tuple(word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--"))
    return command


def _command_of_recipe(
    kind: type[RecipeCommand[Any]], words: Sequence[str], prog: str, recipes: Mapping[str, str]
) -> Any:
    """The command without overrides. Raises as `parse` does, and unless its recipe is one of these (name -> description)."""
    first = _own_options(kind, words, prog)
    if not first.recipe:
        _show_recipes(kind, words, prog, recipes)
    if first.recipe not in recipes:
        raise UsageError(f"recipe '{first.recipe}' is unknown{did_you_mean(closest(first.recipe, recipes))}", prog)
    return first


def _parsed_with(
    kind: type[RecipeCommand[Any]], words: Sequence[str], prog: str, recipe: str, about: str, default: Any
) -> Any:
    """The command on a recipe, with `default` as its overrides' defaults. Raises as `parse` does."""
    shown = _with_fixed(type(default), kind.NO_OVERRIDES)
    return parse(
        blank(kind, config=_converted(shown, default)),
        words,
        prog,
        kind=kind[shown],  # type: ignore[index]
        see=f"{prog} {recipe}",
        description=f"{_first_line(inspect.getdoc(kind))}\n\nRecipe {recipe}: {about}",
    )


def _own_options(kind: type[RecipeCommand[Any]], words: Sequence[str], prog: str) -> Any:
    """The command without overrides; `recipe` is empty where none is named, and `out` need not be given."""
    command = blank(kind, recipe="", out=Path(), config=_NoOverrides())
    names, own, mine = option_names(command), [], True
    for word in words:
        if re.match(r"--|-[A-Za-z]", word) and word not in HELP:  # but -3 is a value
            mine = word.startswith("--") and word[2:].partition("=")[0].replace("_", "-") in names
        if mine and word not in HELP:
            own.append(word)
    return parse(command, own, prog, kind=kind[_NoOverrides], see=prog)  # type: ignore[index]


def _show_recipes(kind: type[RecipeCommand[Any]], words: Sequence[str], prog: str, recipes: Mapping[str, str]) -> None:
    """Print the help page that lists the recipes; UsageError where help was not asked for."""
    if not HELP & set(words):
        raise UsageError(f"RECIPE is missing; it comes first: {prog} RECIPE ...", prog)
    width = max(map(len, recipes))
    listed = "\n".join(f"  {name:<{width}}  {_first_line(about)}" for name, about in recipes.items())
    about = f"{inspect.getdoc(kind)}\n\nRecipes, each with its own page ({prog} RECIPE --help):\n{listed}"
    command = blank(kind, config=_NoOverrides())
    parse(command, ["--help"], prog, kind=kind[_NoOverrides], see=prog, description=about)  # type: ignore[index]


def _with_fixed(kind: Any, names: Sequence[str]) -> Any:
    """A subclass of a dataclass in which these fields are fixed: neither options nor on the help page."""
    fixed = Annotated[Any, tyro.conf.Fixed, tyro.conf.SuppressFixed]
    hidden: list[Any] = [
        (each.name, fixed, dataclasses.field(default=each.default))
        for each in dataclasses.fields(kind)
        if each.name in names
    ]
    return dataclasses.make_dataclass(kind.__name__, hidden, bases=(kind,), frozen=kind.__dataclass_params__.frozen)


def _converted(kind: Any, instance: Any) -> Any:
    """An instance of the dataclass `kind` with the values of `instance`, which has the same fields."""
    return kind(**{field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)})


def _first_line(text: str | None) -> str:
    return (text or "").splitlines()[0]
