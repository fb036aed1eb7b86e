"""Pictures with captions: files next to them, COCO's annotations, columns; what is missing is named, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selftrans.data.sources.captions import MAX_FILE_BYTES, CaptionSource, caption_table, captioned
from selftrans.data.sources.decode import BadSample
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.source import Entries, Source
from selftrans.messages import page
from tests.support.pictures import encoded, noise, write, zipped


def opened(path: Path, file: Path | None = None, column: str | None = None) -> Source:
    return open_source(path, resolution=8, captions=CaptionSource(file, column))


def picture(seed: int) -> bytes:
    return encoded(noise(8, seed))


FILES = {
    "a.png": picture(0),
    "a.txt": b"a cat\n\n  two   dogs \n",
    "a.json": b'{"caption": "the .txt comes first", "url": "x"}',
    "deep/er/b.JPG": picture(1),
    "deep/er/b.caption": "\ufeffein Hündchen 猫".encode(),
    "deep/c.png": picture(2),
    "deep/c.json": json.dumps({"captions": ["one", "", "two"], "width": 3}).encode(),
    "d.png": picture(3),
    "d.json": json.dumps({"text": "just one"}).encode(),
    ".hidden.txt": b"x",
    "list.csv": b"x",
}


def placed(root: Path, files: dict[str, bytes], packed: bool) -> Path:
    """A zip or a folder of these files."""
    return zipped(root / "x.zip", files) if packed else write(root / "x", files)


@pytest.mark.parametrize("packed", [False, True])
def test_folder_or_zip_with_caption_files(tmp_path: Path, packed: bool) -> None:
    source = opened(placed(tmp_path, FILES, packed))
    assert list(source.names) == ["a.png", "d.png", "deep/c.png", "deep/er/b.JPG"]
    assert source.captions == [("a cat", "two dogs"), ("just one",), ("one", "two"), ("ein Hündchen 猫",)]
    assert not source.faults and source.classes == () and source.labels.tolist() == [0] * 4
    assert np.array_equal(source.read(2), noise(8, 2))
    assert source.ignored["empty captions"] == 1 and sum(source.ignored.values()) == 3


@pytest.mark.parametrize("packed", [False, True])
def test_missing_halves_and_invalid_files_are_named(tmp_path: Path, packed: bool) -> None:
    files = {f"{name}.png": picture(i) for i, name in enumerate("abcdefgh")} | {
        "a.txt": b"good",
        "c.txt": b"  \n \t\n",
        "d.json": b'{"caption": 3}',
        "e.json": b"[" * 100_000,
        "f.txt": b"\xff\xfa",
        "g.txt": b"x" * (MAX_FILE_BYTES + 1),
        "h.json": b'["a list"]',
        "orphan.txt": b"no picture",
        "b.txt.bak": b"x",
    }
    source = opened(placed(tmp_path, files, packed))
    reasons = {source.names[i]: reason for i, reason in source.faults.items()}
    assert reasons.pop("b.png") == "a picture without a caption"
    assert reasons.pop("orphan.txt") == "a caption without its picture"
    assert reasons.pop("c.png") == "its captions are empty"
    assert reasons.pop("d.png") == reasons.pop("h.png") == "its .json has no text under caption, captions, text"
    assert reasons.pop("e.png").startswith("its captions cannot be read (")
    assert reasons.pop("f.png").startswith("its captions cannot be read ('utf-8' codec")
    assert reasons.pop("g.png") == f"its captions take more than {MAX_FILE_BYTES} bytes"
    assert not reasons and source.captions is not None and source.captions[0] == ("good",)
    for i in source.faults:
        with pytest.raises(BadSample, match=r"cannot be used \(") as caught:
            source.read(i)
        assert "\n" not in str(caught.value)


def test_file_above_the_limit_is_not_read() -> None:
    """An archive reads a member as a whole."""
    opened = list[int]()
    source = captioned(Entries(["a.png", "a.txt"], [1, MAX_FILE_BYTES + 1], opened.append, {}))  # type: ignore[arg-type]
    assert source.faults == {0: f"its captions take more than {MAX_FILE_BYTES} bytes"} and not opened


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.TXT", b"a cat"),
        ("a.Caption", b"a cat"),
        ("a.JSON", b'{"text": "a cat"}'),
        ("a.txt", "\ufeffa cat".encode()),
        ("a.txt", "a cat".encode("utf-16")),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_caption_files_of_any_case_and_of_windows(tmp_path: Path, name: str, data: bytes, packed: bool) -> None:
    files = {"a.png": encoded(noise(8)), name: data}
    source = open_source(
        zipped(tmp_path / "x.zip", files) if packed else write(tmp_path / "x", files), captions=CaptionSource()
    )
    assert source.captions == [("a cat",)] and not source.faults


def test_the_fingerprint_depends_on_captions(tmp_path: Path) -> None:
    first = opened(write(tmp_path / "a", FILES)).fingerprint
    assert opened(write(tmp_path / "b", FILES)).fingerprint == first
    assert opened(write(tmp_path / "b", {"a.txt": b"a cat\ntwo cats"})).fingerprint != first


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"secret.txt": b"secret", "x/a.png": picture(0)})
    (tmp_path / "x" / "a.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match=r"a.txt in .* is a symbolic link out of the folder"):
        opened(tmp_path / "x")


COCO: dict[str, Any] = {
    "info": {},
    "images": [{"id": 7, "file_name": "one.png", "width": 8}, {"id": 3, "file_name": "two.png"}],
    "annotations": [
        {"image_id": 3, "id": 1, "caption": "second picture."},
        {"image_id": 7, "id": 2, "caption": "A first picture\n"},
        {"image_id": 3, "id": 3, "caption": "again the second"},
    ],
}


def coco(folder: Path, change: Any = COCO) -> Path:
    return write(folder, {"captions.json": change if isinstance(change, bytes) else json.dumps(change).encode()})


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("prefix", ["", "train2014/"])
def test_coco_annotations_of_a_folder_or_a_zip(tmp_path: Path, packed: bool, prefix: str) -> None:
    files = {f"{prefix}one.png": picture(1), "two.png": picture(2), "more/about.md": b"no class"}
    where = placed(tmp_path, files, packed)
    source = opened(where, coco(tmp_path) / "captions.json")
    assert list(source.names) == [f"{prefix}one.png", "two.png"] and not source.faults
    assert source.captions == [("A first picture",), ("second picture.", "again the second")]
    assert np.array_equal(source.read(0), noise(8, 1)) and np.array_equal(source.read(1), noise(8, 2))
    assert source.classes == ()


def test_coco_annotations_that_do_not_fit_the_pictures(tmp_path: Path) -> None:
    write(
        tmp_path / "x",
        {"two.png": picture(2), "more.png": picture(3), "p/same.png": picture(4), "q/same.png": picture(5)},
    )
    images = [*COCO["images"], {"id": 9, "file_name": "same.png"}]
    captions = [
        *COCO["annotations"],
        {"image_id": 99, "caption": "of nothing"},
        {"image_id": 9, "caption": "of which?"},
    ]
    source = opened(tmp_path / "x", coco(tmp_path, {"images": images, "annotations": captions}) / "captions.json")
    assert {source.names[i]: reason for i, reason in source.faults.items()} == {
        "image_id 99 in captions.json": "a caption without its picture",
        "one.png": "a caption without its picture",
        "same.png": "a caption without its picture",
        "more.png": "a picture without a caption in captions.json",
        "p/same.png": "a picture without a caption in captions.json",
        "q/same.png": "a picture without a caption in captions.json",
    }
    good = [i for i in range(len(source)) if i not in source.faults]
    assert [source.names[i] for i in good] == ["two.png"] and np.array_equal(source.read(good[0]), noise(8, 2))
    for i in source.faults:
        with pytest.raises(BadSample):
            source.read(i)


def test_a_folder_without_any_caption_says_where_they_are_read(tmp_path: Path) -> None:
    write(
        tmp_path / "x",
        {"one.png": picture(1), "two.png": picture(2), "captions.csv": b"file_name,caption\none.png,x\n"},
    )
    with pytest.raises(ValueError, match=r"none of the 2 pictures has a caption: .*name\.txt.*give --captions FILE"):
        opened(tmp_path / "x")


NOT_COCO = "does not hold captions as COCO's annotations do"
INVALID = {
    "empty": (b"", NOT_COCO),
    "list": ([], NOT_COCO),
    "nested": (b"[" * 100_000, NOT_COCO),
    "instances": ({"images": COCO["images"], "annotations": [{"image_id": 3, "bbox": []}]}, r"\(no 'caption'\)"),
    "no annotations": ({"images": []}, r"\(no 'annotations'\)"),
    "name": ({"images": [{"id": 1, "file_name": 3}], "annotations": []}, "its file_name is not text"),
    "twice": ({"images": [COCO["images"][0]] * 2, "annotations": []}, "image 7 occurs twice"),
    "id": ({"images": [{"id": [1], "file_name": "x"}], "annotations": []}, NOT_COCO),
    "text": ({"images": [], "annotations": [{"image_id": 3, "caption": 3}]}, "the caption of image 3 is not text"),
    "latin": (b'{"images": "\xff"}', NOT_COCO),
    "up": ({"images": [{"id": 1, "file_name": "../one.png"}], "annotations": []}, "which leads out of the source"),
    "root": ({"images": [{"id": 1, "file_name": "/etc/one.png"}], "annotations": []}, "which leads out"),
    "drive": ({"images": [{"id": 1, "file_name": "C:\\one.png"}], "annotations": []}, "which leads out"),
}


@pytest.mark.parametrize("case", INVALID)
def test_other_json_is_not_coco(tmp_path: Path, case: str) -> None:
    write(tmp_path / "x", {"one.png": picture(1)})
    content, message = INVALID[case]
    with pytest.raises(ValueError, match=message) as caught:
        opened(tmp_path / "x", coco(tmp_path, content) / "captions.json")
    assert "\n" not in str(caught.value) and "captions.json" in str(caught.value)


def test_missing_annotations_and_other_sources(tmp_path: Path) -> None:
    write(tmp_path / "x", {"one.png": picture(1)})
    with pytest.raises(ValueError, match=NOT_COCO + r" \(No such file"):
        opened(tmp_path / "x", tmp_path / "nothing.json")
    for source in (Path("digits"), tmp_path / "nothing"):
        with pytest.raises(ValueError, match=r"no source of pictures with captions '.*or 'digits_t2i'"):
            opened(source)
    with pytest.raises(ValueError, match=r"x\.7z is an archive of a kind that is not read"):
        opened(write(tmp_path, {"x.7z": b"x"}) / "x.7z")
    with pytest.raises(ValueError, match=r"is not a folder or a zip of pictures, which --captions .* needs"):
        opened(tmp_path / "x.tar", tmp_path / "captions.json")
    with pytest.warns(UserWarning, match="caption_column is ignored: .* is not a table"):
        opened(write(tmp_path / "x", {"one.txt": b"a"}), column="text")
    with pytest.warns(UserWarning, match="label_column is ignored: with captions there are no labels"):
        open_source(tmp_path / "x", label_column="label", captions=CaptionSource())


# ---- tables

TABLES = {
    "comma.csv": b'image,caption\r\na/one.png,"a cat, asleep"\r\ntwo.png,a dog\r\na/one.png,again\r\n',
    "semicolon.csv": b"text;File_Name\na cat, asleep;./a/one.png\na dog;two.png\nagain;a/one.png\n",
    "mark.csv": '\ufefffile_name,caption\na\\one.png,"a cat, asleep"\ntwo.png,a dog\na\\one.png,again\n'.encode(),
    "tabs.tsv": b"path\tnumber\tcaption\na/one.png\t1\ta cat, asleep\ntwo.png\t2\ta dog\na/one.png\t3\tagain\n",
    "metadata.jsonl": b'{"file_name": "a/one.png", "text": ["a cat, asleep", "again"]}\n\n'
    b'{"file_name": "two.png", "text": "a dog"}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_pictures_have_the_captions_of_the_table(tmp_path: Path, name: str) -> None:
    write(tmp_path / "x", {"a/one.png": encoded(noise(8, 1)), "two.png": encoded(noise(8, 2))})
    file = write(tmp_path, {name: TABLES[name]}) / name
    source = open_source(tmp_path / "x", resolution=8, captions=CaptionSource(file))
    assert list(source.names) == ["a/one.png", "two.png"] and not source.faults
    assert source.captions == [("a cat, asleep", "again"), ("a dog",)]


def test_what_of_a_table_does_not_fit_the_pictures_is_named(tmp_path: Path) -> None:
    write(tmp_path / "x", {"one.png": encoded(noise(8, 1)), "bare.png": encoded(noise(8, 2))})
    file = write(tmp_path, {"c.csv": b"file,caption\none.png,a\nother.png,b\n"}) / "c.csv"
    source = open_source(tmp_path / "x", resolution=8, captions=CaptionSource(file))
    assert {source.names[i]: reason for i, reason in source.faults.items()} == {
        "bare.png": "a picture without a caption in c.csv",
        "other.png": "a caption without its picture",
    }


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "c.csv",
            b"file,caption\none.png,a cat, asleep\n",
            "line 2 has more cells than the first line; put captions with the separator",
        ),
        ("c.csv", b"caption,file\nonly a caption\n", "line 2 has no name of a file"),
        ("c.csv", b"file,title\none.png,a\n", "line 2 has no column caption, .*, among file, title"),
        ("c.csv", b"file,caption,text\none.png,a,b\n", "line 2 has the columns caption and text: keep one"),
        ("c.csv", b"which,caption\none.png,a\n", "line 2 has no name of a file"),
        ("c.csv", b"file,caption\n\xff\xffone.png,a\n", "store it as UTF-8: 'utf-8'"),
        ("c.jsonl", b'{"file_name": "one.png"}\n', "line 1 has no column caption"),
        (
            "c.jsonl",
            b'{"file_name": "one.png", "text": 3}\n',
            "line 1 has no name of a file, or a caption that is not text",
        ),
        ("c.jsonl", b"[1]\n", "line 1 is no object"),
        (
            "c.jsonl",
            b'{"file_name": "one.png", "text": "a"}\n\n{"file_name" 1}\n',
            "line 3 is not valid json: Expecting ':' delimiter at character 14",
        ),
    ],
)
def test_other_tables_are_refused_with_their_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} cannot be read as captions \(.*{said}") as caught:
        caption_table(write(tmp_path, {name: content}) / name)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(
        f"give a csv, tsv or jsonl with file_name and caption ({page('data.md')}), or name the column of captions by "
        "--caption-column"
    )


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        (
            "c.csv",
            "image_name| comment_number| comment\none.png| 0| a cat\none.png| 1| 一只猫\nx/two.png|0|قطة\n",
            "comment",
        ),
        (
            "c.jsonl",
            '{"Scan": "one", "text": "no", "Finding": ["a cat", "一只猫"]}\n{"Scan": "two", "text": "", "Finding": "قطة"}\n',
            "finding",
        ),
        ("c.csv", "Scan,Name\none.png,a cat\none.png,一只猫\ntwo.png,قطة\n", "Name"),
        ("c.csv", "Scan,caption\none.png,a cat\none.png,一只猫\ntwo.png,قطة\n", None),
    ],
)
def test_columns_of_other_names(tmp_path: Path, name: str, content: str, column: str | None) -> None:
    write(tmp_path / "x", {"one.png": encoded(noise(8)), "two.png": encoded(noise(8, 1))})
    (tmp_path / name).write_text(content, encoding="utf-8")
    source = open_source(tmp_path / "x", resolution=8, captions=CaptionSource(tmp_path / name, column))
    assert source.captions == [("a cat", "一只猫"), ("قطة",)] and not source.faults
