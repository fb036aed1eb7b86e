"""Plain json of files that may be damaged or written by others: read as text, as an object, and as values of declared types.

A dataclass declares what its object in json holds, and `from_plain` checks each field. `int`, `float` and `str` are any
numbers and texts; the types below allow fewer, and a field may declare its own: `Annotated[int, within(1, 3)]`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import numbers
import re
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar

from selftrans.messages import first_line, printable
from selftrans.suggest import nearest

T = TypeVar("T")
MAX_BYTES = 1 << 28  #: of a file
REPAIR = "repair it, or remove it"
#: errors of reading a json file that is damaged, or does not hold what is expected
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


class Rule(NamedTuple):
    """Which values of a type are allowed, as `Annotated[type, Rule(...)]`."""

    expected: str  #: what an error says that the value should be
    holds: Callable[[Any], bool]


def within(low: int, high: int = 1 << 48) -> Rule:
    """For `Annotated[int, within(low, high)]`: both bounds are allowed."""
    expected = str(low) if low == high else f"an integer from {low} to {high}"
    return Rule(expected, lambda value: low <= value <= high)


def matching(pattern: str, expected: str) -> Rule:
    """For `Annotated[str, matching(pattern, expected)]`: the whole text matches the regular expression."""
    return Rule(expected, lambda text: re.fullmatch(pattern, text) is not None)


def one_of(choices: Sequence[str]) -> Rule:
    """For `Annotated[str, one_of(choices)]`."""
    return Rule(f"one of {', '.join(choices)}", lambda text: text in choices)


Count: TypeAlias = Annotated[int, within(0)]
Number: TypeAlias = Annotated[float, Rule("a finite number", lambda value: abs(value) < 1e30)]
Name: TypeAlias = Annotated[str, Rule("text that is not empty", bool)]
Sha256: TypeAlias = Annotated[str, matching("[0-9a-f]{64}", "a sha256 in hexadecimal")]
Option: TypeAlias = Annotated[
    str | int | float | bool | None, Rule("text, a number, true, false or null", lambda value: True)
]


def read_text(path: Path) -> str:
    """Read a small text file. Raises ValueError when it is larger than MAX_BYTES or not UTF-8."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.name} is larger than {MAX_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} cannot be read ({first_line(error)})") from error


def recorded(path: Path, parse: Callable[[Any], T], otherwise: T) -> T:
    """`parse` applied to the json in a file; `otherwise` if the file is missing or damaged, or `parse` fails."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except UNREADABLE:
        return otherwise


def parse_object(text: str, where: str, remedy: str = REPAIR) -> dict[str, Any]:
    """The object in a json text. Raises ValueError when it is invalid, nested too deeply, or no object."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds no object; {remedy}")
    return content


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a small JSON file; None where the file is missing. Raises ValueError for anything else in it."""
    if not path.exists():
        return None
    try:
        return parse_object(read_text(path).removeprefix("\ufeff"), path.name)  # as some editors begin UTF-8
    except ValueError as error:
        raise ValueError(f"{printable(path.parent)}: {error}") from error


def to_plain(value: Any) -> Any:
    """A value as json holds it: an object for a dataclass, a list for a tuple, Python's numbers for numpy's."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: to_plain(each) for name, each in value.items()}
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return [to_plain(each) for each in value] if isinstance(value, tuple | list) else value


def from_plain(kind: Any, raw: Any, where: str) -> Any:
    """A value of type `kind` from plain json: the inverse of `to_plain`.

    ValueError names a field that is unknown, missing or of another type, or a value that its `Rule` does not allow.
    where: as errors name the value. With "", for the object of a file that the caller names, they begin with its field.
    """
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, raw, where)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if raw is None and type(None) in inner:
            return None
        # the type that the error is about comes first: of a list, the one with entries
        kinds = [k for k in inner if k is not type(None)]
        likeliest, *others = sorted(kinds, key=lambda k: isinstance(raw, list) != _is_list(k))
        for other in others:
            with contextlib.suppress(ValueError):
                return from_plain(other, raw, where)
        return from_plain(likeliest, raw, where)
    if origin is Annotated:
        rules = [each for each in inner[1:] if isinstance(each, Rule)]
        if not rules:
            return from_plain(inner[0], raw, where)
        with contextlib.suppress(ValueError):
            value = from_plain(inner[0], raw, where)
            if all(rule.holds(value) for rule in rules):
                return value
        raise ValueError(f"{where} should be {rules[0].expected}, not {raw!r:.60}")
    if origin is Literal and any(type(raw) is type(choice) and raw == choice for choice in inner):
        return raw
    if origin is dict and isinstance(raw, dict):
        return {name: from_plain(inner[1], value, f"{where}.{printable(name, 60)}") for name, value in raw.items()}
    if origin is tuple and isinstance(raw, list):
        kinds = [inner[0]] * len(raw) if inner[-1] is Ellipsis else list(inner)
        if len(kinds) == len(raw):
            return tuple(from_plain(k, raw[i], f"{where}[{i}]") for i, k in enumerate(kinds))
    if isinstance(kind, type) and origin is None:
        integer = isinstance(raw, int) and not isinstance(raw, bool)
        if integer and not abs(raw) < 1 << 63:
            raise ValueError(f"{where} is beyond 64 bits")
        if kind is float and integer:
            return float(raw)
        if isinstance(raw, kind) and not (kind is int and not integer):
            return raw
    raise ValueError(f"{where} should be {_expected(kind)}, not {raw!r:.60}")


def _is_list(kind: Any) -> bool:
    """Whether a type is a list in json."""
    return typing.get_origin(kind) is tuple


def _expected(kind: Any) -> str:
    """As errors name a type that is no dataclass."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return "a list" if inner[-1] is Ellipsis else f"a list of {len(inner)}"
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    return "an object" if origin is dict else str(getattr(kind, "__name__", kind))


def _dataclass(kind: Any, raw: Any, where: str) -> Any:
    hints, known, at = _hints(kind), dataclasses.fields(kind), f"{where}." if where else ""
    if not isinstance(raw, dict):
        raise ValueError(f"{where} should be an object, not {raw!r:.60}")
    for name in raw:
        if name not in hints:
            raise ValueError(f"{at}{printable(name, 60)} is unknown{nearest(name, hints)}")
    unset = dataclasses.MISSING
    for f in known:
        if f.default is unset and f.default_factory is unset and f.name not in raw:
            raise ValueError(f"{at}{f.name} is missing")
    return kind(**{name: from_plain(hints[name], value, f"{at}{name}") for name, value in raw.items()})


@functools.cache  # since a manifest may list thousands of shards
def _hints(kind: Any) -> dict[str, Any]:
    """Type of each field of a dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}
