"""Words and numbers as labels: their classes, what counts as none, and names that are compared loosely."""

from __future__ import annotations

import re

import numpy as np
import pytest

from selftrans.data.sources.labelling import numbered, with_labels
from selftrans.data.sources.source import Source


def source(*names: str) -> Source:
    return Source(list(names), lambda i: None, labels=np.zeros(len(names), np.int64))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("given", "labels", "classes", "missing"),
    [
        (["dog", "cat", "dog"], [1, 0, 1], ("cat", "dog"), []),
        ([3, 1, 3], [3, 1, 3], ("0", "1", "2", "3"), []),
        (["3", "1.0", "03"], [3, 1, 3], ("0", "1", "2", "3"), []),
        (["2", -1, None, ""], [2, 0, 0, 0], ("0", "1", "2"), [1, 2, 3]),
        (["1", "cat", 2], [0, 2, 1], ("1", "2", "cat"), []),  # a word among them: all are words
        ([" wild \n cat ", "wild cat", "  "], [0, 0, 0], ("wild cat",), [2]),
        (["\ud800", "é"], [0, 1], ("?", "é"), []),
        (["1e3", "2"], [0, 1], ("1e3", "2"), []),
        (["9" * 30, "2"], [1, 0], ("2", "9" * 30), []),
        (["1", "nan", "N/A", "0", 0], [1, 0, 0, 0, 0], ("0", "1"), [1, 2]),  # as pandas writes what is missing
        (["0", "1", "none"], [0, 1, 0], ("0", "1"), [2]),
        (["none", "none", "none", "1"], [1, 1, 1, 0], ("1", "none"), []),  # too many for a missing label
        (["nan", "1", None], [1, 0, 0], ("1", "nan"), [2]),  # half of those that are there
        (["nan", "cat"], [1, 0], ("cat", "nan"), []),
        (["nan", "None"], [1, 0], ("None", "nan"), []),
    ],
)
def test_classes_of_words_and_numbers(given: list, labels: list, classes: tuple, missing: list) -> None:
    found = numbered(given, "x")
    assert (found.labels.tolist(), found.classes, list(found.missing)) == (labels, classes, missing)


@pytest.mark.parametrize(
    ("given", "said"), [([None, ""], "neither a label from 0"), ([-1], "neither a label"), ([10**6], "1,000,000 cl")]
)
def test_labels_that_make_no_classes_are_refused(given: list, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^x has .*{said}"):
        numbered(given, "x")


def test_names_are_compared_as_they_are_then_without_folders_then_without_extension() -> None:
    pictures = source("a/1.png", "a/2.png", "b/2.png", "b/3.png", "c/4.jpg")
    absent = r"^1 name in l.csv is not in the source, such as 5; its label is ignored$"
    unclear = (
        r"^1 name in l.csv does not say which picture it is of, such as 2.png; name each by its path in the source$"
    )
    with pytest.warns(UserWarning, match=absent), pytest.warns(UserWarning, match=unclear):
        found = with_labels(pictures, {"a/1.png": "p", "2.png": "q", "x/3.png": "r", "4": "s", "5": "t"}, "l.csv")
    assert found.classes == ("p", "r", "s")  # 2.png is ambiguous
    assert [found.classes[k] for k in found.labels[[0, 3, 4]]] == ["p", "r", "s"]
    assert found.faults == dict.fromkeys((1, 2), "no label in l.csv")


def test_word_that_is_read_as_a_missing_label_is_named() -> None:
    found = with_labels(
        source("1.png", "2.png", "3.png", "4.png"), {"1.png": 0, "2.png": 1, "3.png": "None"}, "d/l.csv"
    )
    none = "no label in l.csv: None among numbers is read as none; rename it there if it is a class"
    assert found.faults == {2: none, 3: "no label in l.csv"}


def test_file_of_other_names_is_refused() -> None:
    expected = (
        "l.csv does not label the only file: its first name is y.png, theirs x.png; name each by its path in the source"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        with_labels(source("x.png"), {"y.png": 1}, "l.csv")
