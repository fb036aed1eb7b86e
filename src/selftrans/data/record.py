"""Strict reading of small JSON files: every field is taken by name and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from selftrans.messages import first_line, printable

Option: TypeAlias = str | int | float | bool | None

MAX_BYTES = 1 << 28  #: of a file
REMEDY = "prepare the data again"
REPAIR = "repair it, or remove it"


def read_text(path: Path) -> str:
    """Read a small text file. Raises ValueError when it is larger than MAX_BYTES or not UTF-8."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.name} is larger than {MAX_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} cannot be read ({first_line(error)})") from error


def parse_json(text: str, where: str, remedy: str = REMEDY) -> object:
    """Parse JSON. Raises ValueError when it is invalid or nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}); {remedy}") from error


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a small JSON file; None where the file is missing. Raises ValueError for anything else in it."""
    if not path.exists():
        return None
    try:
        content = parse_json(read_text(path).removeprefix("\ufeff"), path.name, REPAIR)  # as some editors begin UTF-8
    except ValueError as error:
        raise ValueError(f"{printable(path.parent)}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{printable(path)} holds no object; {REPAIR}")
    return content


class Record:
    """A JSON object whose fields are taken one by one, each checked; `where` names it in errors.

    Every method raises ValueError naming the field that is missing or wrong.
    """

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            raise ValueError(f"{where} should be a JSON object, not {data!r:.40}; {REMEDY}")
        self.data, self.where = data, where

    def only(self, names: Iterable[str]) -> None:
        """Refuse any field that is not in `names`."""
        unknown = sorted(set(self.data) - set(names))
        if unknown:
            raise ValueError(f"{self.where}: field {unknown[0]!r:.60} is unknown; {REMEDY}")

    def take(self, name: str, check: Callable[[object], Any]) -> Any:
        """The value of a field after `check`, whose ValueError says what the field should be."""
        if name not in self.data:
            raise ValueError(f"{self.where}: field {name!r} is missing; {REMEDY}")
        value = self.data[name]
        try:
            return check(value)
        except ValueError as error:
            raise ValueError(f"{self.where}: field {name!r} should be {error}, not {value!r:.60}; {REMEDY}") from None

    def record(self, name: str) -> Record:
        return Record(self.take(name, lambda x: x), f"{self.where}: field {name!r}")

    def integer(self, name: str, low: int, high: int = 1 << 48) -> int:
        return self.take(name, lambda x: as_integer(x, low, high))

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        return self.take(name, lambda x: None if x is None else as_integer(x, low, high))

    def text(self, name: str) -> str:
        return self.take(name, as_text)

    def boolean(self, name: str) -> bool:
        return self.take(name, lambda x: _is(x, bool, "true or false"))

    def one_of(self, name: str, choices: Iterable[str]) -> Any:
        return self.take(name, lambda x: _matches(x, "|".join(choices), f"one of {', '.join(choices)}"))

    def sha256(self, name: str) -> str:
        return self.take(name, lambda x: _matches(x, "[0-9a-f]{64}", "a sha256 in hexadecimal"))

    def items(self, name: str, check: Callable[[object], Any]) -> tuple[Any, ...]:
        items = self.take(name, lambda x: _is(x, list, "a list"))
        entries = Record({f"{name}[{i}]": item for i, item in enumerate(items)}, self.where)
        return tuple(entries.take(key, check) for key in entries.data)

    def options(self, name: str) -> dict[str, Option]:
        options = Record(self.take(name, lambda x: _is(x, dict, "an object")), f"{self.where}: {name}")
        return {key: options.take(key, _option) for key in options.data}


def as_integer(value: object, low: int, high: int) -> int:
    """An integer within bounds. The ValueError of this and the functions below says what the value should be."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"an integer from {low} to {high}")
    return value


def as_number(value: object) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise ValueError("a finite number")
    return float(value)


def as_text(value: object) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError("text")
    return value


def as_pair(value: object) -> tuple[str, str]:
    """A name and a reason."""
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("a name and a reason")
    return as_text(value[0]), as_text(value[1])


def _is(value: object, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(name)
    return value


def _matches(value: object, pattern: str, name: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise ValueError(name)
    return value


def _option(value: object) -> Option:
    if value is not None and not isinstance(value, str | int | float | bool):
        raise ValueError("text, a number, true, false or null")
    return value
