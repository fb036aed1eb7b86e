"""Exact copies are counted, those with another label apart, within 8 bytes a sample; `prepare` says them once."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from selftrans.data.prepare import prepare
from selftrans.data.prepare_buckets import prepare_buckets
from selftrans.data.sources import duplicates
from selftrans.data.sources.duplicates import DuplicateFinder, Duplicates, describe_duplicates
from tests.support.pictures import encoded, noise, write


def said_by(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "as stored" in str(w.message)]


def found(values: list[int], labels: list[int]) -> Duplicates:
    compared = DuplicateFinder(len(values))
    for i in reversed(range(len(values))):  # threads finish in any order
        compared.add([i], [np.full((2, 2), values[i])])
    return compared.find(np.array(labels), str)


@pytest.mark.parametrize(
    ("values", "labels", "expected"),
    [
        ([], [], Duplicates(0)),
        ([1, 2, 3], [0, 0, 0], Duplicates(3)),
        ([1, 2, 1, 1, 2], [0, 0, 0, 0, 0], Duplicates(5, 3, 0, ("2", "0"))),
        ([1, 2, 1, 1, 2], [0, 0, 0, 1, 1], Duplicates(5, 3, 2, ("3", "0"))),
        ([7, 7], [1, 0], Duplicates(2, 1, 1, ("1", "0"))),
    ],
)
def test_copies_and_those_with_another_label(values: list[int], labels: list[int], expected: Duplicates) -> None:
    assert found(values, labels) == expected


def test_samples_that_were_not_decoded_or_are_beyond_the_limit_are_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MOST", 3)
    compared = DuplicateFinder(9)
    compared.add([0, 2, 3, 8], [np.zeros(2)] * 4)
    assert compared.find(np.zeros(9, int), str) == Duplicates(2, 1, 0, ("2", "0"))


def test_words_for_copies() -> None:
    assert describe_duplicates([Duplicates(4)], "picture") == ""
    assert describe_duplicates([Duplicates(1), Duplicates(1200, 1, 0, ("b\n", "a"))], "sample") == (
        "1 of 1,201 samples is, as stored, an exact copy of an earlier one, such as b\\n (a); copies count several times"
    )
    assert describe_duplicates([Duplicates(5, 2, 0, ("b", "a")), Duplicates(5, 2, 1, ("d", "c"))], "picture") == (
        "4 of 10 pictures are, as stored, exact copies of earlier ones, and 1 of these has another label, such as "
        "d (c); check their labels"
    )


def test_copies_among_some_of_the_samples_are_said_to_be_that() -> None:
    compared = DuplicateFinder(9, partial=True)
    compared.add([2, 5], [np.zeros(2)] * 2)
    found = compared.find(np.zeros(9, int), str)
    assert found == Duplicates(2, 1, 0, ("5", "2"), partial=True)
    assert describe_duplicates([Duplicates(4), found], "picture").endswith("; only what is encoded now was compared")
    assert describe_duplicates([DuplicateFinder(3, partial=True).find(np.zeros(3, int), str)], "picture") == ""


def test_part_of_the_data_says_that_only_it_was_compared(tmp_path: Path) -> None:
    source = write(tmp_path / "x", {f"{k}.png": encoded(noise(8, k // 2)) for k in range(4)})
    options = {"batch_size": 2, "shard_size": 2, "progress": False}
    (said,) = said_by(lambda: prepare(source, tmp_path / "data", part="1/2", **options))
    assert said.startswith("1 of 2 pictures is") and said.endswith("; only what is encoded now was compared")


def test_prepare_says_copies_with_another_label_once(tmp_path: Path) -> None:
    same = noise(8, 1)
    files = {
        "cat/a.png": encoded(same),
        "cat/b.bmp": encoded(same, "BMP"),  # the same pixels in another file
        "cat/c.png": encoded(noise(8, 2)),
        "dog/a.png": encoded(same),
    }
    source = write(tmp_path / "x", files)
    expected = "2 of 4 pictures are, as stored, exact copies of earlier ones, and 1 of these has another label"
    said = said_by(lambda: prepare(source, tmp_path / "data", batch_size=1, shard_size=2, progress=False))
    assert said == [f"{expected}, such as dog/a.png (cat/a.png); check their labels"]
    in_buckets = {"resolution": 8, "buckets": 3, "progress": False}
    assert said_by(lambda: prepare_buckets(source, tmp_path / "b", **in_buckets)) == said
    assert (
        said_by(lambda: prepare(source, tmp_path / "data", shard_size=2, progress=False)) == []
    )  # nothing is decoded again


def test_copies_of_arrays_are_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", data=np.zeros((3, 1, 4), np.float32), labels=[0, 1, 1])
    said = said_by(lambda: prepare(tmp_path / "x.npz", tmp_path / "data", autoencoder="values", progress=False))
    assert (
        len(said) == 1 and "and 2 of these have another label, such as sample 1 of x.npz (sample 0 of x.npz)" in said[0]
    )


def test_different_pictures_are_not_mentioned(tmp_path: Path) -> None:
    source = write(tmp_path / "x", {f"{k}.png": encoded(noise(8, k)) for k in range(5)})
    assert said_by(lambda: prepare(source, tmp_path / "data", progress=False)) == []
