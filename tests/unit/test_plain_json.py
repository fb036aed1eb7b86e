"""Plain json: small files with or without a mark of UTF-8, and values by the types that a dataclass declares."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest

from selftrans.plain_json import (
    Count,
    Name,
    Number,
    Option,
    Sha256,
    from_plain,
    matching,
    one_of,
    read_object,
    recorded,
    to_plain,
    within,
)


@dataclass(frozen=True)
class Inner:
    size: int
    name: str = "x"


@dataclass(frozen=True)
class Outer:
    rate: float = 0.5
    steps: int | None = 3
    mode: Literal["a", "b"] = "a"
    span: tuple[float, float] | None = None
    labels: Literal["all"] | tuple[int, ...] = "all"
    inner: Inner = field(default_factory=lambda: Inner(1))
    side: Annotated[int, within(1, 9)] = 1


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_object_with_or_without_a_mark_of_utf_8(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "a.json").write_bytes(mark + b'{"a": 1}')
    assert read_object(tmp_path / "a.json") == {"a": 1}
    assert read_object(tmp_path / "missing.json") is None


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"[1]", "a.json holds no object"), (b"{", "a.json is not valid JSON"), (b"\xff\xfe{", "a.json cannot be read")],
)
def test_what_is_no_object_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match=said):
        read_object(tmp_path / "a.json")


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
        (Outer, {"side": 9}, Outer(side=9)),
        (dict[str, Option], {"a": True, "b": 2, "c": 0.5, "d": None}, {"a": True, "b": 2, "c": 0.5, "d": None}),
        (Count, 0, 0),
        (Number, 2, 2.0),
        (Sha256, "0a" * 32, "0a" * 32),
        (Number | tuple[Number, ...], [1, 2], (1.0, 2.0)),
        (Annotated[str, one_of(("a", "b"))], "a", "a"),
        (Annotated[int, "a note for another reader"], 3, 3),
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
        (tuple[int, int], "ab", "^here should be a list of 2, not 'ab'$"),
        (tuple[int, ...], [1, "2"], r"^here\[1\] should be int, not '2'$"),
        (Literal["all"] | tuple[int, ...], [1, "2"], r"^here\[1\] should be int, not '2'$"),
        (Number | tuple[Number, ...], "x", "^here should be a finite number, not 'x'$"),
        (Number, float("nan"), "^here should be a finite number, not nan$"),
        (Number, 10**400, "^here should be a finite number, not 1000"),
        (Count, -1, "^here should be an integer from 0 to 281474976710656, not -1$"),
        (Count, True, "^here should be an integer from 0"),
        (Name, "", "^here should be text that is not empty, not ''$"),
        (Sha256, "0" * 63, "^here should be a sha256 in hexadecimal"),
        (Sha256, "0" * 64 + "\n", "^here should be a sha256 in hexadecimal"),
        (Annotated[str, one_of(("a", "b"))], ["a"], r"^here should be one of a, b, not \['a'\]$"),
        (Annotated[str, matching("[ab]", "a or b")], "ab", "^here should be a or b, not 'ab'$"),
        (Outer, {"side": 10}, r"^here\.side should be an integer from 1 to 9, not 10$"),
        (dict[str, int], [], r"^here should be an object, not \[\]$"),
        (dict[str, int], {"\x1b[2J": "x"}, r"^here\.\\x1b\[2J should be int, not 'x'$"),
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


def test_plain_value_is_as_json_holds_it_and_returns_to_the_same():
    given = Outer(rate=1.0, span=(0.0, 1.0), labels=(4,), inner=Inner(5, "é"))
    plain = to_plain(given)
    assert plain == json.loads(json.dumps(dataclasses.asdict(given))) and plain["span"] == [0.0, 1.0]
    assert from_plain(Outer, plain, "here") == given
    assert json.dumps(to_plain({"a": (np.int64(1), np.float32(0.5), True, None)})) == '{"a": [1, 0.5, true, null]}'


def test_fields_of_a_file_are_named_alone():
    with pytest.raises(ValueError, match=r"^inner\.size should be int, not 'x'$"):
        from_plain(Outer, {"inner": {"size": "x"}}, "")
    with pytest.raises(ValueError, match=r"^sise is unknown; did you mean size\?$"):
        from_plain(Inner, {"sise": 1}, "")
    with pytest.raises(ValueError, match=r"^size is missing$"):
        from_plain(Inner, {}, "")


def test_long_value_is_shortened_in_the_message():
    with pytest.raises(ValueError, match="here should be") as caught:
        from_plain(int, "x" * 10_000, "here")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"a": 2}', 2),
        ('{"b": 2}', 0),
        ("[2]", 0),
        ("2", 0),
        ('{"a": "x"}', 0),
        ('{"a": Infinity}', 0),
        ('{"a"', 0),
        ("[" * 100_000, 0),
        (None, 0),
    ],
)
def test_recorded_value_or_the_default_for_a_damaged_file(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    assert recorded(tmp_path / "a.json", lambda held: int(held["a"]), 0) == expected
