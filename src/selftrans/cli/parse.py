"""Words of the command line ⇒ a command, by tyro; wrong words become a `UsageError` of one line.

tyro reports a parse error as an event to a hook (`tyro._errors.on_parse_error`), whose API it does not promise to keep.
Where a release of tyro differs, its own text is shown instead; the exit status is 2 in both cases.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import itertools
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from selftrans.cli.options import Inline
from selftrans.cli.unknown_option import unrecognised
from selftrans.messages import DOCS, escaped

HELP = {"-h", "--help"}
MANUAL = f"Pages of docs/ are in {escaped(DOCS)}"
#: start of Python's message about a value that it cannot convert -> what the value should be
NO_NUMBER = {
    "invalid literal for int() with base 10: ": "a whole number",
    "could not convert string to float: ": "a number",
}
#: tyro's messages about values, listed at their end, of an option that takes several, or values of several types
SEVERAL = re.compile(
    r"(?:Could not find valid parse for arguments: |no type matching .*? could be instantiated from )(\[.*\])"
)


class UsageError(Exception):
    """Wrong arguments: what is wrong, and the command whose help page lists the right ones."""

    def __init__(self, message: str, see: str) -> None:
        super().__init__(f"{message} (see {see} --help)")


def parse(command: Any, words: Sequence[str], prog: str, *, kind: Any, see: str, description: str | None = None) -> Any:
    """The command that `words` describe.

    Args:
        command: an instance with the defaults; required arguments are `tyro.MISSING` (see `blank`).
        prog: `selftrans NAME`, as the help page prints it. see: the command whose help page errors refer to.
        kind: the type of `command`, with its type parameters.
        description: opens the help page; None: the docstring of `command`.
    Raises UsageError for wrong words, and SystemExit(0) after printing a help page.
    """
    if HELP & set(words):
        words = ["--help"]  # after other words, tyro would leave those out of the page
        description = f"{description or inspect.getdoc(type(command)) or ''}\n\n{MANUAL}"
    known = option_names(command)
    _check_for_empty_values(words, see)

    def report(event: Any) -> None:
        with contextlib.suppress(AttributeError):  # another release of tyro: let it print its own text
            message = _describe(event, known, words)
            if message:
                raise UsageError(message, see)

    hook = getattr(getattr(tyro, "_errors", None), "on_parse_error", None)
    with hook(report) if hook else contextlib.nullcontext(), _descriptions_on_one_line():
        return tyro.cli(
            kind,
            args=words,
            prog=prog,
            default=command,
            description=wrapped(description or inspect.getdoc(type(command)) or ""),
            config=(tyro.conf.PositionalMetavarFromFieldName,),
        )


def blank(kind: Any, **given: Any) -> Any:
    """A command of this class with its defaults, except what is `given`; required arguments are `tyro.MISSING`."""
    missing = dataclasses.MISSING
    required = [f.name for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing]
    return kind(**dict.fromkeys(required, tyro.MISSING) | given)


def option_names(section: Any, prefix: str = "") -> list[str]:
    """Every option of a command, or of a section of a run's settings: without the leading `--`, with dashes and dots."""
    hints = typing.get_type_hints(type(section), include_extras=True)
    names: list[str] = []
    for field in dataclasses.fields(section):
        value, marks = getattr(section, field.name), getattr(hints[field.name], "__metadata__", ())
        name = f"{prefix}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            names += option_names(value, prefix if Inline in marks else f"{name}.")
        elif not any(mark in (tyro.conf.Positional, tyro.conf.Fixed) for mark in marks):
            names.append(name)
    return names


def wrapped(text: str) -> str:
    """Paragraphs wrapped to the terminal; lines that are indented (lists, tables) stay lines, and continue below their text."""
    width = max(40, min(shutil.get_terminal_size().columns, 120))
    paragraphs = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        prose = list(itertools.takewhile(lambda line: not line.startswith(" "), lines))
        # an option such as --dry-run stays whole; tyro joins lines that are not indented
        filled = textwrap.wrap(" ".join(prose), width, subsequent_indent="  ", break_on_hyphens=False)
        listed = (each for line in lines[len(prose) :] for each in _hanging(line, width))
        paragraphs.append("\n".join([*filled, *listed]))
    return "\n\n".join(paragraphs)


def _hanging(line: str, width: int) -> list[str]:
    """An indented line in lines of this width: what follows a name and two spaces or more stays to the right of the name."""
    own = len(line) - len(line.lstrip())
    named = re.match(r" *\S+(?: \S+)* {2,}", line)
    # a sentence that two spaces end is no name
    indent = " " * min(named.end() if named and named.end() <= width // 2 else own, width // 2)
    return textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False)


@contextlib.contextmanager
def _descriptions_on_one_line() -> Iterator[None]:
    """Join the lines of the strings below fields: tyro would keep their line breaks and wrap each line by itself.

    Where a release of tyro differs, help pages have these line breaks.
    """
    docstrings = getattr(tyro, "_docstrings", None)
    original = getattr(docstrings, "get_field_docstring", None)
    if original is None:
        yield
        return

    def joined(*arguments: Any) -> str | None:
        found = original(*arguments)
        return found and " ".join(found.split())

    docstrings.get_field_docstring = joined  # type: ignore[union-attr]
    try:
        yield
    finally:
        docstrings.get_field_docstring = original  # type: ignore[union-attr]


def _check_for_empty_values(words: Sequence[str], see: str) -> None:
    """Raise UsageError for an empty value, as of an unset variable: `--out "$RUN"` would write to the current directory,
    and `sample "$RUN"` would read from it."""
    if list(words[:1]) == [""]:
        raise UsageError("the first argument is empty", see)
    for at, word in enumerate(words):
        if word.startswith("--") and (word.endswith("=") or ("=" not in word and list(words[at + 1 : at + 2]) == [""])):
            raise UsageError(f"{word.removesuffix('=')} needs a value", see)


def _describe(event: Any, known: Sequence[str], words: Sequence[str]) -> str | None:
    """One line about a parse error of tyro in `words`; None for an event that is unknown."""
    match type(event).__name__:
        case "UnrecognizedArgs":
            return unrecognised(event.tokens, known)
        case "MissingArgs":
            if any(word.startswith("-") for word in event.unrecognized_tokens):  # a misspelt --out: name that
                return unrecognised(event.unrecognized_tokens, known)
            missing = [_with_metavar(each.arg) for each in event.missing_arguments]
            return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        case "BadValue" if event.reason == "too_few_values":
            if event.argument.is_positional():
                return f"{_flag(event.argument)} is missing"
            count, shape = event.argument.lowered.nargs, event.argument.lowered.metavar
            return f"{_flag(event.argument, words)} needs {'a value' if count in (None, 1) else f'{count} values'}: {shape}"
        case "InvalidChoice":
            return f"{_flag(event.argument, words)} '{event.value}' is not one of {', '.join(sorted(event.choices))}"
        case "InstantiationFailure" if event.argument is not None:
            message = event.message.splitlines()[0].rstrip(".")
            return f"{_flag(event.argument, words)}: {_conversion_message(message, event.argument)}"
    return None


def _conversion_message(message: str, argument: Any) -> str:
    """The message for values that cannot be converted, without a full stop; rewritten if they should be numbers."""
    if found := SEVERAL.fullmatch(message):
        values: list[str] = ast.literal_eval(found[1])
        said = _number_message(values, argument.field.type_stripped)
        return said or f"'{' '.join(values)}' is not {argument.lowered.metavar}"
    for start, kind in NO_NUMBER.items():
        if message.startswith(start):
            return f"{message.removeprefix(start)} is not {kind}"
    return message


def _number_message(values: Sequence[str], kind: Any) -> str | None:
    """The message for the first of `values` that is no number, or for a wrong number of them; None where both are right."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    forms = [form for form in (typing.get_args(kind) if union else (kind,)) if form is not type(None)]
    several = [typing.get_args(form) for form in forms if typing.get_origin(form) is tuple]
    held = {each for form in forms for each in (typing.get_args(form) or (form,))}
    if not held <= {int, float, ...}:
        return None
    number: type[int] | type[float] = float if float in held else int
    for value in values:
        try:
            number(value)
        except ValueError:
            return f"'{value}' is not {'a number' if number is float else 'a whole number'}"
    counts = {len(each) for each in several if ... not in each}
    return f"{' or '.join(map(str, sorted(counts)))} numbers are needed, not {len(values)}" if counts else None


def _flag(argument: Any, words: Sequence[str] = ()) -> str:
    """`--out`: of several names, the one in `words`; for a positional argument, its name."""
    flags = argument.lowered.name_or_flags
    flags = [flag for flag in flags if flag in {word.partition("=")[0] for word in words}] or flags
    return str(
        argument.lowered.metavar if argument.is_positional() else flags[-1] if flags else argument.field.extern_name
    )


def _with_metavar(argument: Any) -> str:
    """`--out PATH`, or the name of a positional argument."""
    return _flag(argument) if argument.is_positional() else f"{_flag(argument)} {argument.lowered.metavar}"
