"""The generated pages of the reference: commands, recipes, settings, library, contracts, modules. No torch is imported.

What they say is read from the code: commands from their dataclasses, settings from `cli/settings.json`, the library from
`__all__` and the imports of library.py, modules from their docstrings.
"""

from __future__ import annotations

import ast
import dataclasses
import html
import inspect
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from selftrans.cli.commands import COMMANDS
from selftrans.cli.options import Inline, RecipeCommand
from selftrans.cli.snapshot import FILE, sources, text_below

#: an option in a sentence: browsers would break it after a hyphen, which they do not do in code (see hooks.py)
OPTION = re.compile(r"(?<![\w-])--[a-z][\w.-]*\w")
SRC = Path(__file__).parents[2] / "src" / "selftrans"
#: modules that a method, a model or a training loop of one's own builds on
CONTRACTS = ("types", "methods.guidance", "methods.spec", "models.spec", "sections")
SETTINGS_HEAD = """# Settings

Every setting of a run, by section, as an option of `train` and `compare`. Defaults are those of the section; a recipe may have
others ([recipes](recipes.md)). `config.json` of a run holds all of them.
"""


class Row(NamedTuple):
    """A line of a table of options."""

    name: str
    kind: str
    default: str
    text: str


def pages() -> dict[str, str]:
    """Name of the page, from docs/ -> its markdown."""
    known = json.loads(FILE.read_text(encoding="utf-8"))
    if known["sources"] != sources():
        raise ValueError(f"{FILE} is not of these sources; run python -m selftrans.cli.snapshot")
    return {
        "reference/commands.md": commands(),
        "reference/recipes.md": recipes(known),
        "reference/settings.md": settings(known),
        "reference/library.md": library(),
        "reference/contracts.md": contracts(),
        "reference/modules.md": modules(),
    }


# ---- commands


def commands() -> str:
    """Every command with its description and its options."""
    parts = ["# Commands\n\n`selftrans COMMAND --help` prints the same."]
    for name, kind in COMMANDS.items():
        rows = list(options(kind))
        positional = [row.name for row in rows if not row.name.startswith("--")]
        needed = [f"{row.name} {row.kind}" for row in rows if row.name.startswith("--") and row.default == "required"]
        usage = " ".join([f"selftrans {name}", *positional, *needed, "[OPTIONS]"])
        parts += [f"## {name}", f"```text\n{usage}\n```", prose(inspect.getdoc(kind) or ""), table(rows, "option")]
        if issubclass(kind, RecipeCommand):
            parts.append("All [settings](settings.md) of the recipe are options, too: `--train.steps 20000`.")
    return "\n\n".join(parts) + "\n"


def options(kind: Any) -> Iterator[Row]:
    """The options of a command, those of a nested dataclass without a prefix included."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        plain, *marks = (hint.__origin__, *hint.__metadata__) if hasattr(hint, "__metadata__") else (hint,)
        if tyro.conf.Fixed in marks or isinstance(plain, typing.TypeVar):
            continue
        if Inline in marks:
            yield from options(plain)
            continue
        shown = next((mark for mark in marks if getattr(mark, "metavar", None)), None)
        helped = next((mark.help for mark in marks if getattr(mark, "help", None)), "")
        metavar = shown.metavar if shown else written(plain)
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = "required" if required else value(field.default)
        name = field.name.replace("_", "-")
        positional = tyro.conf.Positional in marks
        yield Row(
            metavar if positional and shown else name.upper() if positional else f"--{name}",
            metavar,
            default,
            text_below(kind, field.name) or helped,
        )


# ---- settings


def recipes(known: dict[str, Any]) -> str:
    """Every recipe: its docstring, and what differs from the defaults of the sections."""
    parts = [
        "# Recipes",
        "A recipe is a function that returns every setting of a run. Below each stands what differs from the defaults of the "
        "[settings](settings.md).",
    ]
    for name, recipe in known["recipes"].items():
        rows = []
        for key, values in recipe["values"].items():
            section = known["sections"][recipe["sections"][key]]
            for field, given in values.items():
                if field not in section["defaults"] or plain(section["defaults"][field]) != plain(given):
                    rows.append(f"| `{key}.{field}` | {value(given)} | {value(section['defaults'].get(field))} |")
        parts += [f"## {name}", prose(recipe["about"]), f"Method: `{recipe['method']}`."]
        parts.append("\n".join(["| setting | here | default |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def settings(known: dict[str, Any]) -> str:
    """Every section of a run's settings, models and methods included."""
    keys: dict[str, str] = {}
    for recipe in known["recipes"].values():
        keys |= {section: key for key, section in recipe["sections"].items()}
    keys |= dict.fromkeys(known["models"].values(), "model")
    order = {name: place for place, name in enumerate(["Data", "Train", "Stage1", "Stage2", "SampleConfig", "Log"])}
    parts = [SETTINGS_HEAD]
    for name, section in sorted(
        known["sections"].items(), key=lambda each: (order.get(each[0], 99), keys[each[0]], each[0])
    ):
        key = keys[name]
        models = [model for model, kind in known["models"].items() if kind == name]
        parts.append(f"## {key}" + (f": {models[-1]}" if models else ""))
        parts.append(prose(section["about"]))
        if models:
            parts.append("`--model.name` is one of " + ", ".join(f"`{model}`" for model in models) + ".")
        rows = [
            Row(
                f"--{key}.{field.replace('_', '-')}",
                cleaned(kind),
                value(section["defaults"].get(field)),
                section["help"].get(field, ""),
            )
            for field, kind in section["types"].items()
        ]
        parts.append(table(rows, "setting"))
    return "\n\n".join(parts) + "\n"


# ---- code


def exported() -> dict[str, str]:
    """Names of `import selftrans` -> the module that defines each."""
    tree = ast.parse((SRC / "library.py").read_text(encoding="utf-8"))
    found = {
        alias.name: node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    found |= {node.name: "selftrans.library" for node in tree.body if isinstance(node, ast.FunctionDef)}
    names = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    return {name: found[name] for name in names}


def library() -> str:
    """What `import selftrans` offers: each name, with those of the contracts on their own page."""
    names = exported()
    here = {name: module for name, module in names.items() if module.removeprefix("selftrans.") not in CONTRACTS}
    parts = [
        "# import selftrans",
        "All names that `import selftrans` offers. It needs torch alone. [library.md](../library.md) shows how they are used.",
        " · ".join(
            f"[`{name}`][{module}.{name}]" for name, module in sorted(names.items(), key=lambda each: each[0].lower())
        ),
        *(f"::: {module}.{name}" for name, module in here.items()),
    ]
    return "\n\n".join(parts) + "\n"


def contracts() -> str:
    """What backbones, guidances, methods and models are, as the code declares it."""
    parts = [
        "# Contracts",
        "What a backbone, a guidance, a method and a model must be. [extending.md](../extending.md) shows how they are used.",
    ]
    for module in CONTRACTS:
        parts.append(f"## {module.replace('.', '/')}.py")
        options = (
            "show_root_heading: false",
            "show_root_toc_entry: false",
            "show_if_no_docstring: true",
            "filters: ['!^_']",
        )
        parts.append("\n      ".join([f"::: selftrans.{module}\n    options:", *options]))
    return "\n\n".join(parts) + "\n"


def modules() -> str:
    """Every module with the first line of its docstring, by package."""
    parts = ["# Modules", "Every module of the package, with the first line of its docstring."]
    package = None
    for path in sorted(SRC.rglob("*.py"), key=lambda each: (each.parent.relative_to(SRC).as_posix(), each.name)):
        folder = path.parent.relative_to(SRC).as_posix()
        if folder != package:
            package = folder
            parts += [
                f"\n## selftrans{'' if folder == '.' else '/' + folder}\n",
                "| module | what is in it |",
                "|---|---|",
            ]
        first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        parts.append(f"| `{path.name}` | {cell(first)} |")
    return "\n".join(parts) + "\n"


# ---- text


def table(rows: list[Row], head: str) -> str:
    """A table of options; types and defaults as code."""
    lines = [f"| {head} | type | default | |", "|---|---|---|---|"]
    lines += [f"| `{row.name}` | `{row.kind}` | {row.default} | {cell(row.text)} |" for row in rows]
    return "\n".join(lines)


def cell(text: str) -> str:
    """Text for a cell of a table: one line, in which nothing but options and code in backticks is markdown."""
    parts = " ".join(text.split()).split("`")
    parts[::2] = [
        OPTION.sub(r"`\g<0>`", html.escape(part, quote=False))
        .replace("|", "&#124;")
        .replace("[", "&#91;")
        .replace("*", "&#42;")
        for part in parts[::2]
    ]
    return "`".join(parts)


def prose(text: str) -> str:
    """A docstring as markdown: indented lines (tables, formulas) keep their form."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        at = next((k for k, line in enumerate(lines) if line.startswith("    ")), len(lines))
        paragraphs.append("\n".join(lines[:at]))
        if at < len(lines):
            paragraphs.append("```text\n" + "\n".join(line[4:] for line in lines[at:]) + "\n```")
    linked = re.sub(r"\bdocs/([\w-]+\.md)", r"[\1](../\1)", "\n\n".join(paragraphs))
    return linked.replace("*", "\\*")


def plain(given: Any) -> Any:
    """Tuples and lists are the same setting."""
    return list(given) if isinstance(given, tuple | list) else given


def value(given: Any) -> str:
    """A default, as code."""
    if isinstance(given, tuple | list):
        given = " ".join(map(str, given)) or "()"
    return "" if given is dataclasses.MISSING else f"`{given}`" if str(given) else "`''`"


def written(hint: Any) -> str:
    """A type, as short as it can be written."""
    return cleaned(hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else repr(hint))


def cleaned(kind: str) -> str:
    """`typing.Literal['a', 'b'] | None` -> `a | b | None`."""
    kind = re.sub(r"(typing|pathlib|collections\.abc)\.", "", kind)
    kind = re.sub(r"Literal\[(.*?)\]", lambda match: match[1].replace("'", "").replace(", ", " | "), kind)
    return re.sub(r"^Optional\[(.*)\]$", r"\1 | None", kind)
