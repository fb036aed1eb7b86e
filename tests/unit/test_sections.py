"""Sections of settings: their types, and what may change when a run continues."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest

from selftrans.sections import Section, checked, fields_of, setting


@dataclass(frozen=True)
class Inner:
    size: int
    name: str = "x"


@dataclass(frozen=True)
class Outer(Section):
    key = "outer"
    resume = "free"

    rate: float = 0.5
    steps: int | None = setting(3, resume="fixed", length=True)
    mode: Literal["a", "b"] = setting("a", resume="consent")
    span: tuple[float, float] | None = None
    labels: Literal["all"] | tuple[int, ...] = "all"
    inner: Inner = field(default_factory=lambda: Inner(1))


def test_fields_with_their_rule_and_length():
    assert [(name, rule, length) for name, _, rule, length in fields_of(Outer())] == [
        ("rate", "free", False),
        ("steps", "fixed", True),
        ("mode", "consent", False),
        ("span", "free", False),
        ("labels", "free", False),
        ("inner", "free", False),
    ]
    values = {name: value for name, value, _, _ in fields_of(Outer(rate=2.0))}
    assert values == {each.name: getattr(Outer(rate=2.0), each.name) for each in dataclasses.fields(Outer)}


def test_section_has_no_check_and_no_ineffective_field_by_default():
    Outer().check()
    assert Outer().ineffective() == {}


def test_section_made_in_python_is_checked_by_type():
    given = Outer(1, span=(0, 1), labels=(4,), inner=Inner(2))
    assert checked(given, Outer) == Outer(1.0, span=(0.0, 1.0), labels=(4,), inner=Inner(2))
    with pytest.raises(ValueError, match=r"outer\.mode should be one of 'a', 'b', not 'c'"):
        checked(Outer(mode="c"), Outer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the settings must be Outer\(\.\.\.\), not Section"):
        checked(Section(), Outer)
