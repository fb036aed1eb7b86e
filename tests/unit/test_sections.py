"""Sections of settings: from plain json by type, and what may change when a run continues."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest

from selftrans.sections import Section, checked, fields_of, from_plain, setting


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


@pytest.mark.parametrize(
    ("kind", "raw", "expected"),
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (float, 0.25, 0.25),
        (bool, False, False),
        (str, "é", "é"),
        (int | None, None, None),
        (int | None, 7, 7),
        (Literal["a", "b"], "b", "b"),
        (tuple[int, int], [1, 2], (1, 2)),
        (tuple[int, ...], [1, 2, 3], (1, 2, 3)),
        (tuple[int, ...], [], ()),
        (Literal["all"] | tuple[int, ...], "all", "all"),
        (Literal["all"] | tuple[int, ...], [4], (4,)),
        (Inner, {"size": 2}, Inner(2)),
        (Outer, {"rate": 1, "span": [0, 1]}, Outer(1.0, span=(0.0, 1.0))),
        (Outer, {"inner": {"size": 5, "name": "y"}}, Outer(inner=Inner(5, "y"))),
    ],
)
def test_value_of_each_type(kind, raw, expected):
    value = from_plain(kind, raw, "here")
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("kind", "raw", "message"),
    [
        (int, 1.0, r"^here should be int, not 1\.0$"),
        (int, True, "here should be"),
        (float, True, "here should be"),
        (float, "1", "here should be"),
        (int, 1 << 63, "here is beyond 64 bits"),
        (str, None, "here should be"),
        (int | None, "x", "here should be"),
        (Literal["a", "b"], "c", "^here should be one of 'a', 'b', not 'c'$"),
        (Literal["a", "b"], np.array([1, 2]), r"^here should be one of 'a', 'b', not array\(\[1, 2\]\)$"),
        (tuple[int, int], [1], "here should be"),
        (tuple[int, int], "ab", "here should be"),
        (Inner, [], r"here should be an object, not \[\]"),
        (Inner, {}, r"here\.size is missing"),
        (Inner, {"size": 1, "nam": "x"}, r"here\.nam is unknown; did you mean name\?"),
        (Inner, {"size": 1, "\x1b[2J": 1}, r"here\.\\x1b\[2J is unknown"),
        (Outer, {"inner": {"size": "x"}}, r"here\.inner\.size should be"),
    ],
)
def test_other_values_are_refused_by_field(kind, raw, message):
    with pytest.raises(ValueError, match=message):
        from_plain(kind, raw, "here")


def test_long_value_is_shortened_in_the_message():
    with pytest.raises(ValueError, match="here should be") as caught:
        from_plain(int, "x" * 10_000, "here")
    assert len(str(caught.value)) < 200


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
