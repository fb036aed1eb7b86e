"""Parquet files: columns, labels, and cells that name files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from selftrans.data.sources.captions import CaptionSource
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.source import Source
from tests.support.pictures import encoded, noise, write

PNG = encoded(noise(8))


def test_parquet_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "x").mkdir()
    for name in ("private.parquet", "x/a.parquet"):
        parquet.write_table(arrow.table({"image": [encoded(noise(8))]}), tmp_path / name)
    (tmp_path / "x" / "again.parquet").symlink_to(tmp_path / "x" / "a.parquet")
    assert len(open_source(tmp_path / "x")) == 2
    (tmp_path / "x" / "b.parquet").symlink_to(tmp_path / "private.parquet")
    with pytest.raises(ValueError, match=r"^b.parquet in .* is a symbolic link out of the folder"):
        open_source(tmp_path / "x")


def test_parquet(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": encoded(noise(8, i)), "path": None} for i in range(4)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = datasets.Dataset.from_dict({"image": cells, "label": [1, 0, 1, 0]}, features=features)
    (tmp_path / "x").mkdir()
    rows.to_parquet(tmp_path / "x" / "train.parquet")
    (tmp_path / "x" / "._train.parquet").write_bytes(b"hidden")
    for where in (tmp_path / "x", tmp_path / "x" / "train.parquet"):
        source = open_source(where)
        assert source.classes == ("cat", "dog") and source.labels.tolist() == [1, 0, 1, 0]
        assert np.array_equal(source.read(2), noise(8, 2))


def test_plain_parquet_columns_and_invalid_cells(tmp_path: Path) -> None:
    """Columns of bytes and integers, as other tools write them; invalid labels; a cell with a file name."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def table(name: str, image: list, **columns: list) -> Path:
        parquet.write_table(arrow.table({"image": image, **columns}), tmp_path / name)
        return tmp_path / name

    pictures = [encoded(noise(8, i)) for i in range(3)]
    source = open_source(table("a.parquet", pictures, label=[2, 0, 2]))
    assert source.classes == ("0", "1", "2") and np.array_equal(source.read(1), noise(8, 1))
    assert open_source(table("b.parquet", pictures)).classes == ()
    for name, label in {"c.parquet": -1, "d.parquet": None}.items():
        source = open_source(table(name, pictures, label=[2, label, 2]))
        assert source.faults == {1: "no label in column 'label'"} and source.labels[[0, 2]].tolist() == [2, 2]
        with pytest.raises(ValueError, match=r"row 00000001: cannot be used \(no label in column 'label'\)"):
            source.read(1)
    worded = open_source(table("w.parquet", pictures, label=["0", "None", "1"]), label_column="label")
    assert worded.classes == ("0", "1") and list(worded.faults) == [1]
    assert worded.faults[1].startswith("no label in column 'label': None among numbers is read as none; rename it")
    with pytest.raises(ValueError, match="holds neither integers nor words"):
        open_source(table("d.parquet", pictures, kind=[[1], [2], []]), label_column="kind")
    with pytest.raises(ValueError, match=r"several label columns: label, class; choose"):
        open_source(table("e.parquet", pictures, label=[0, 1, 2], **{"class": [0, 0, 0]}))
    assert open_source(tmp_path / "e.parquet", label_column="class").classes == ("0",)
    secret = write(tmp_path / "s", {"secret.png": encoded(noise(8))}) / "secret.png"
    named = table("f.parquet", [{"bytes": None, "path": str(secret)}, {"bytes": pictures[0], "path": None}])
    source = open_source(named)
    assert np.array_equal(source.read(1), noise(8, 0))
    with pytest.raises(ValueError, match="holds a file name instead of the picture"):
        source.read(0)


@pytest.mark.parametrize(
    ("cells", "labels", "classes", "missing"),
    [
        (["dog", "cat", "dog"], [1, 0, 1], ("cat", "dog"), []),
        (["dog", None, ""], [0, 0, 0], ("dog",), [1, 2]),
        (
            [2.0, float("nan"), 0.0],
            [2, 0, 0],
            ("0", "1", "2"),
            [1],
        ),  # integers of which one is missing, as pandas stores them
        (["2", "0", "2"], [2, 0, 2], ("0", "1", "2"), []),
        ([True, None, False], [1, 0, 0], ("False", "True"), [1]),
    ],
)
def test_label_column_of_words_and_of_whole_floats(
    tmp_path: Path, cells: list, labels: list, classes: tuple, missing: list
) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"image": arrow.array([encoded(noise(8, i)) for i in range(3)]), "kind": arrow.array(cells)}
    for kind in (columns["kind"], columns["kind"].dictionary_encode()):  # the second as pandas' categories are stored
        parquet.write_table(arrow.table(columns | {"kind": kind}), tmp_path / "a.parquet")
        source = open_source(tmp_path / "a.parquet", label_column="kind")
        assert (source.labels.tolist(), source.classes, list(source.faults)) == (labels, classes, missing)
    parquet.write_table(arrow.table(columns | {"kind": arrow.array([0.5, 1.0, 2.0])}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="holds neither integers nor words"):
        open_source(tmp_path / "a.parquet", label_column="kind")


def test_columns_of_captions(tmp_path: Path) -> None:
    """A text or a list of texts; empty cells are named; the column is found by its name, or chosen."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def opened(column: str | None = None, **columns: list) -> Source:
        rows = arrow.table({"image": [encoded(noise(8, i)) for i in range(3)], "label": [2, 0, 1], **columns})
        parquet.write_table(rows, tmp_path / "a.parquet")
        return open_source(tmp_path / "a.parquet", captions=CaptionSource(column=column))

    source = opened(Caption=["a cat", None, " two\ndogs "])
    assert source.captions == [("a cat",), (), ("two dogs",)] and source.faults == {1: "a picture without a caption"}
    assert source.classes == () and np.array_equal(source.read(2), noise(8, 2))
    source = opened(captions=[["one", "two", ""], [], ["three"]])
    assert source.captions == [("one", "two"), (), ("three",)] and list(source.faults) == [1]
    assert source.ignored == {"empty captions": 1}
    several = {"text": ["x", "y", "z"], "alt": ["1", "2", "3"], "captions": [["a"], ["b"], ["c"]]}
    with pytest.raises(ValueError, match=r"has 2 columns with captions among .*; choose one by --caption-column"):
        opened(**several)
    assert opened("alt", **several).captions == [("1",), ("2",), ("3",)]
    with pytest.raises(ValueError, match="has 0 columns with captions"):
        opened()
    with pytest.raises(ValueError, match="has no column 'nothing'; it has image, label, text"):
        opened("nothing", text=["a", "b", "c"])
    for wrong in ([1, 2, 3], [[1], [2], []], [{"raw": "a"}, {"raw": "b"}, None]):
        with pytest.raises(ValueError, match=r"'text' of .* does not hold texts or lists of texts; choose another"):
            opened(text=wrong)


@pytest.mark.parametrize(
    ("name", "cells", "said"),
    [
        (
            "label",
            ["cat", "dog", "cat"],
            r"column 'label' of .*parquet \(string\) is not read as labels.* give --label-column label, if",
        ),
        ("label", [0.0, float("nan"), 1.0], r"column 'label' of .* \(float64\) is not read as labels"),
        (
            "Category",
            [0, 1, 0],
            r"column 'Category' of .* \(int64\) is not read.* give --label-column Category, if",
        ),
        (
            "caption",
            ["a cat", "a dog", "two"],
            r"column 'caption' of .* is not read, .*; give --text MODEL, if it holds",
        ),
    ],
)
def test_columns_that_look_like_labels_or_captions_are_named(tmp_path: Path, name: str, cells: list, said: str) -> None:
    """Classes stored as words, or as pandas stores integers of which one is missing, are not lost without a word."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pictures = [encoded(noise(8, i)) for i in range(3)]
    parquet.write_table(arrow.table({"image": pictures, name: cells}), tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match=said):
        assert open_source(tmp_path / "a.parquet").classes == ()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"image": [["a"], ["b"]]},
            "column 'image' of .* holds lists in place of pictures; store the bytes of one picture",
        ),
        ({"image": [[1, 2], [3, 4]]}, "column 'image' of .* holds lists in place of pictures"),
        ({"image": [[PNG], [PNG]]}, "column 'image' of .* holds lists in place of pictures"),
        (
            {"image": ["a.png", "b.png"]},
            "holds text in place of pictures.* give their folder, and the table's labels by --labels",
        ),
        ({"image": [1, 2]}, "holds values of type int64 in place of pictures"),
        ({"label": [1, 2]}, "has no column of pictures, among label; rename the one to read to `image`"),
        (
            {"left": [PNG] * 2, "right": [PNG] * 2},
            "has several columns of pictures: left, right, among left, right; rename the",
        ),
        ({"image": [], "label": []}, "cannot be read as parquet \\(it has no rows\\); make or download it again"),
    ],
)
def test_columns_that_are_no_pictures_are_refused_in_one_line(
    tmp_path: Path, columns: dict[str, list], said: str
) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=f"a.parquet {said}|{said}") as error:
        open_source(tmp_path / "a.parquet")
    assert "\n" not in str(error.value)


def test_the_only_column_with_bytes_holds_the_pictures(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pictures = [encoded(noise(8, i)) for i in range(2)]
    kinds = (
        arrow.array(pictures),
        arrow.array(pictures, arrow.large_binary()),
        arrow.array([{"bytes": p, "path": None} for p in pictures]),
    )
    for cells in kinds:
        parquet.write_table(arrow.table({"content": cells, "label": [1, 0]}), tmp_path / "a.parquet")
        source = open_source(tmp_path / "a.parquet")
        assert source.labels.tolist() == [1, 0] and np.array_equal(source.read(1), noise(8, 1))


def test_files_with_other_columns_and_damaged_ones_are_named(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name in ("a", "b"):
        parquet.write_table(arrow.table({"image": [PNG], name: [0]}), tmp_path / f"{name}.parquet")
    with pytest.raises(
        ValueError, match=r"a.parquet and 1 more cannot be read as parquet \(its files do not all have the same"
    ):
        open_source(tmp_path)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(ValueError, match=r"^\S+b.parquet cannot be read as parquet \(.*\); make or download it again$"):
        open_source(tmp_path / "b.parquet")
