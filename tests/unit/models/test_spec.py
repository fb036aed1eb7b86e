"""Tensors of a file against those that a model expects."""

import pytest
import torch

from selftrans.models.spec import check_shapes, count_and_names

EXPECTED = {"a": (2, 3), "b": (4,)}


def test_equal_names_and_shapes_are_accepted():
    check_shapes("here", {"b": torch.zeros(4), "a": torch.zeros(2, 3)}, EXPECTED)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a": (2, 3)}, r"^here is not as expected: missing: 1 \(b\)$"),
        ({"a": (2, 3), "b": (4,), "c": (1,)}, r"unknown: 1 \(c\)$"),
        ({"a": (3, 2), "b": (4,)}, r"misshapen: 1 \(a \(3, 2\) instead of \(2, 3\)\)$"),
        ({"c": (1,)}, r"unknown: 1 \(c\); missing: 2 \(a, b\)$"),
    ],
)
def test_every_fault_is_listed(shapes, message):
    with pytest.raises(ValueError, match=message):
        check_shapes("here", {name: torch.zeros(shape) for name, shape in shapes.items()}, EXPECTED)


def test_long_lists_are_shortened_and_names_are_safe_to_print():
    assert count_and_names(["a", "b"]) == "2 (a, b)"
    assert count_and_names(iter("abcde")) == "5 (a, b, c, ...)"
    assert "\x1b" not in count_and_names(["\x1b[2J"])
