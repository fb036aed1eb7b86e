"""Commands on a recipe (train, compare): their own options, and `--a.b VALUE` for every setting of the recipe."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from selftrans.cli import snapshot
from selftrans.cli.options import RecipeCommand
from selftrans.cli.parse import HELP, UsageError, blank, option_names, parse
from selftrans.cli.snapshot import Recipe
from selftrans.plugins import trust
from selftrans.suggest import closest, did_you_mean

if TYPE_CHECKING:
    from selftrans.config import RunConfig


@dataclass(frozen=True)
class _NoOverrides:
    """Takes the place of a recipe's settings while the recipe is not known yet."""


def default_overrides(config: RunConfig, words: Sequence[str]) -> Any:
    """A dataclass whose fields are the overrides of a recipe, with the values of its `config`.

    The overrides are the settings of the run, of its model, and of every method that is known. `words` are the arguments of
    the command: a method or model that they name as module:function is imported, and so known. ValueError for unknown names.
    """
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
    sections = {key: getattr(config, key) for key in RUN_SECTIONS} | {"model": model}
    last = {key: sections.pop(key) for key in ("sample", "log")}  # on the help page after those of the methods
    of_methods = methods.sections_of(methods.REGISTRY.every())
    sections |= {key: config.section(kind) for key, kind in of_methods.items()} | last
    fields: list[Any] = [("method", method_type(methods.REGISTRY.known()), dataclasses.field(default=method))]
    fields += [(key, type(value), dataclasses.field(default=value)) for key, value in sections.items()]
    return dataclasses.make_dataclass("Overrides", fields, frozen=True)()


def _with_overrides(config: RunConfig, parsed: Any) -> RunConfig:
    """The recipe's configuration with parsed overrides; it still holds the sections of every method."""
    from selftrans.sections import RUN_SECTIONS

    values = dict(vars(parsed))
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
    """The command that `words` describe, its `config` complete. Raises as `parse` does."""
    if known := snapshot.recipes(words):
        _parsed(kind, words, prog, known)  # prints help and refuses wrong arguments without importing torch
    from selftrans.recipes import RECIPES

    recipes = {name: Recipe(inspect.getdoc(made) or "", partial(_defaults_of, made)) for name, made in RECIPES.items()}
    command = _parsed(kind, words, prog, recipes)
    command.config = _with_overrides(RECIPES[command.recipe](), command.config)
    command.typed = tuple(word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--"))
    return command


def _defaults_of(recipe: Callable[[], RunConfig], words: Sequence[str]) -> Any:
    return default_overrides(recipe(), words)


def _parsed(kind: type[RecipeCommand[Any]], words: Sequence[str], prog: str, recipes: Mapping[str, Recipe]) -> Any:
    """The command with the overrides of its recipe, which must be one of these. Raises as `parse` does.

    The words are read twice: for the recipe and for the code to import, on which the overrides depend, and then in full.
    None where `recipes` do not have a method or a model that the words name.
    """
    first = _own_options(kind, words, prog)
    if not first.recipe:
        _show_recipes(kind, words, prog, recipes)
    if first.recipe not in recipes:
        raise UsageError(f"recipe '{first.recipe}' is unknown{did_you_mean(closest(first.recipe, recipes))}", prog)
    for name in first.trust:
        trust(name)
    recipe = recipes[first.recipe]
    default = recipe.overrides(words)
    if default is None:
        return None
    if not kind.HAS_METHOD:
        default = _without_method(default)
    return parse(
        blank(kind, config=default),
        words,
        prog,
        kind=kind[type(default)],  # type: ignore[index]
        see=f"{prog} {first.recipe}",
        description=f"{_first_line(inspect.getdoc(kind))}\n\nRecipe {first.recipe}: {recipe.about}",
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


def _show_recipes(
    kind: type[RecipeCommand[Any]], words: Sequence[str], prog: str, recipes: Mapping[str, Recipe]
) -> None:
    """Print the help page that lists the recipes; UsageError where help was not asked for."""
    if not HELP & set(words):
        raise UsageError(f"RECIPE is missing; it comes first: {prog} RECIPE ...", prog)
    width = max(map(len, recipes))
    listed = "\n".join(f"  {name:<{width}}  {_first_line(recipe.about)}" for name, recipe in recipes.items())
    about = f"{inspect.getdoc(kind)}\n\nRecipes, each with its own page ({prog} RECIPE --help):\n{listed}"
    command = blank(kind, config=_NoOverrides())
    parse(command, ["--help"], prog, kind=kind[_NoOverrides], see=prog, description=about)  # type: ignore[index]


def _without_method(overrides: Any) -> Any:
    """The same overrides without the option --method."""
    fixed: Any = Annotated[str, tyro.conf.Fixed, tyro.conf.SuppressFixed]
    return dataclasses.make_dataclass("Overrides", [("method", fixed)], bases=(type(overrides),), frozen=True)(
        **vars(overrides)
    )


def _first_line(text: str | None) -> str:
    return (text or "").splitlines()[0]
