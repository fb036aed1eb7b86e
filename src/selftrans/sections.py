"""Sections of a run's settings: frozen dataclasses that methods, models and the run itself declare, to and from json.

Each field says, where it is declared, what may happen to it when a run continues (`setting`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from selftrans.plain_json import from_plain, to_plain

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
    found: S = from_plain(type(section), to_plain(section), section.key)
    return found
