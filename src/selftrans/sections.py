"""Sections of a run's settings: frozen dataclasses that methods, models and the run itself declare, to and from json.

Each field says, where it is declared, what may happen to it when a run continues (`setting`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import numbers
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from selftrans.suggest import nearest

Resume = Literal["fixed", "free", "consent"]
RUN_SECTIONS = ("data", "model", "init", "lora", "train", "sample", "log")  #: keys of the sections that every run has
RESERVED_KEYS = ("version", "recipe", "method")  #: other names at the top of config.json


@dataclass(frozen=True)
class Section:
    """Settings under one name: fields of `--<key>.*` and of the object `<key>` in config.json."""

    key: ClassVar[str]
    resume: ClassVar[Resume] = "fixed"  #: of fields that do not say it themselves

    def check(self) -> None:
        """ValueError naming the first field that cannot work."""

    def ineffective(self) -> dict[str, str]:
        """Fields that another setting makes ineffective -> why."""
        return {}


def setting(default: Any, *, resume: Resume | None = None, length: bool = False) -> Any:
    """A field of a section, with what a run in progress allows.

    resume: `fixed` fields must stay as they were when the run began, `free` ones may change when it is continued, `consent`
    ones may with `train.allow_changes`, which is recorded. length: the field is the number of steps of a stage, and no
    step depends on it.
    """
    return field(default=default, metadata={"resume": resume, "length": length})


def fields_of(section: Section) -> Iterator[tuple[str, Any, Resume, bool]]:
    """(name, value, what may happen to it when a run continues, whether it is a length) of every field."""
    for each in dataclasses.fields(section):
        rule = each.metadata.get("resume") or type(section).resume
        yield each.name, getattr(section, each.name), rule, bool(each.metadata.get("length"))


def from_plain(kind: Any, raw: Any, where: str) -> Any:
    """A value of type `kind` from plain json. ValueError names a field that is unknown, missing or of another type."""
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, raw, where)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if raw is None and type(None) in inner:
            return None
        kinds = [k for k in inner if k is not type(None)]
        for other in kinds[1:]:
            with contextlib.suppress(ValueError):
                return from_plain(other, raw, where)
        return from_plain(kinds[0], raw, where)
    if origin is Literal and any(type(raw) is type(choice) and raw == choice for choice in inner):
        return raw
    if origin is tuple and isinstance(raw, list):
        kinds = [inner[0]] * len(raw) if inner[-1] is Ellipsis else list(inner)
        if len(kinds) == len(raw):
            return tuple(from_plain(k, value, where) for k, value in zip(kinds, raw, strict=True))
    if isinstance(kind, type) and origin is None:
        integer = isinstance(raw, int) and not isinstance(raw, bool)
        if integer and not abs(raw) < 1 << 63:
            raise ValueError(f"{where} is beyond 64 bits")
        if kind is float and integer:
            return float(raw)
        if isinstance(raw, kind) and not (kind is int and not integer):
            return raw
    plain = kind.__name__ if isinstance(kind, type) and origin is None else kind
    expected = f"one of {', '.join(map(repr, inner))}" if origin is Literal else plain
    raise ValueError(f"{where} should be {expected}, not {raw!r:.60}")


S = TypeVar("S", bound=Section)


def checked(section: S, kind: type[S]) -> S:
    """Settings that were made in Python, and not read from json or options. ValueError unless they are of class `kind`, each
    field is of its type (of a choice: one of them), and `check` finds nothing."""
    if not isinstance(section, kind):
        found = f"the class {section.__name__}" if isinstance(section, type) else type(section).__name__
        raise ValueError(f"the settings must be {kind.__name__}(...), not {found}")
    section = checked_types(section)
    section.check()
    return section


def checked_types(section: S) -> S:
    """The section with each field of its type. ValueError for one that is not (of a choice: one of them)."""
    found: S = from_plain(type(section), _plain(dataclasses.asdict(section)), section.key)
    return found


def _plain(value: Any) -> Any:
    """As in json: lists in place of tuples, Python's numbers in place of numpy's."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


def _dataclass(kind: Any, raw: Any, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    if not isinstance(raw, dict):
        raise ValueError(f"{where} should be an object, not {raw!r:.60}")
    for name in raw:
        if name not in known:
            raise ValueError(f"{where}.{ascii(name)[1:-1][:60]} is unknown{nearest(name, known)}")
    unset = dataclasses.MISSING
    for f in dataclasses.fields(kind):
        if f.default is unset and f.default_factory is unset and f.name not in raw:
            raise ValueError(f"{where}.{f.name} is missing")
    return kind(**{name: from_plain(hints[name], value, f"{where}.{name}") for name, value in raw.items()})
