"""Classes of samples by name, by number and with counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selftrans.cli.main import main
from selftrans.sampling.chosen_labels import chosen_labels, in_words, per_class
from selftrans.types import Conditions
from tests.support import toy
from tests.unit.cli.lines import one_line

NAMES = ("cat", "dog", "1", "a:2")  # the class of number 1 is dog, and one called 1 has number 2
LABELS = Conditions("labels", 4)


@pytest.mark.parametrize(
    ("words", "expected", "counts"),
    [
        ("balanced", "balanced", False),
        ("random", "random", False),
        ("dog", (1,), False),
        ("cat dog cat", (0, 1, 0), False),
        ("0 3 3", (0, 3, 3), False),
        ("1", (2,), False),  # a name comes before a number
        ("cat:2 dog:1 3:2", (0, 0, 1, 3, 3), True),
        ("a:2", (3,), False),
        ("a:2:2 dog", (3, 3, 1), True),
        ("4", (4,), False),  # the null label
    ],
)
def test_words_name_classes(words: str, expected: object, counts: bool) -> None:
    assert chosen_labels(words.split(), NAMES, LABELS) == (expected, counts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("dgo", r"^class 'dgo' is unknown; did you mean dog\?; the model has 4 classes: cat, dog, 1, a:2, or 0 to 3$"),
        ("", "no classes are given; write --labels CLASS"),
        ("5", "class '5' is unknown"),
        ("-1", "class '-1' is unknown"),
        ("cat random", "class 'random' is unknown"),
        ("cat:x", "class 'cat:x' is unknown"),
        ("cat:0", "add up to 0; ask for 1 to"),
        ("cat:999999999", "add up to 999,999,999; ask"),
    ],
)
def test_classes_that_the_model_does_not_have_are_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen_labels(words.split(), NAMES, LABELS)


def test_models_without_classes() -> None:
    with pytest.raises(
        ValueError, match=r"labels are for models of classes, this one has no condition; leave them out"
    ):
        chosen_labels(["cat"], (), Conditions("none"))
    with pytest.raises(ValueError, match=r"class 'cat' is unknown; the model has 3 classes, or 0 to 2$"):
        chosen_labels(["cat"], (), Conditions("labels", 3))


def test_counts_in_words() -> None:
    counts = per_class([0, 1, 1, 5], ("cat", "dog"))
    assert counts == {"cat": 1, "dog": 2, "5": 1} and in_words(counts) == "1 of cat, 2 of dog, 1 of 5"
    assert per_class([1, 2, 2], ("0", "1")) == {"1": 1, "no class": 2} and per_class([0], ()) == {"0": 1}
    assert in_words(dict.fromkeys(map(str, range(20)), 3)) == "3 of each of 20 classes"
    assert in_words({str(k): 3 + k % 2 for k in range(20)}) == "3 to 4 of each of 20 classes"


def test_sample_of_chosen_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["sample", str(toy.finished()), "--steps=1", f"--out={tmp_path / 'a'}"]
    assert main([*argv, "--labels", "7:2", "3:1"]) == 0
    assert "3 samples -> " in (shown := capsys.readouterr().out) and "samples of each class: 1 of 3, 2 of 7" in shown
    assert json.loads((tmp_path / "a" / "samples.json").read_text())["per_class"] == {"3": 1, "7": 2}
    argv[-1] = f"--out={tmp_path / 'b'}"
    assert main([*argv, "--classes", "7", "--num=2"]) == 0
    assert "samples of each class: 2 of 7" in capsys.readouterr().out
    for k in range(2):  # the same pictures
        one, two = ((tmp_path / name / f"{k:06d}.png").read_bytes() for name in "ab")
        assert one == two
    assert main([*argv, "--classes", "eleven"]) == 1
    assert "class 'eleven' is unknown; the model has 10 classes: 0, 1, 2" in one_line(capsys)
    argv[-1] = f"--out={tmp_path / 'c'}"
    assert main([*argv, "--labels=3:3", "--num=1"]) == 0
    assert "warning: 1 image of the 3 that the labels ask for" in capsys.readouterr().err


def test_name_with_characters_that_are_not_printed_may_be_given_as_messages_show_it() -> None:
    classes = ["two\nlines", "no\xa0break"]
    for words in (classes, [r"two\nlines", r"no\xa0break"], [r"two\nlines:1", r"no\xa0break:1"]):
        assert chosen_labels(words, classes, Conditions("labels", num_classes=2))[0] == (0, 1)
