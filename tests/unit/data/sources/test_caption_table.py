"""Captions in a csv, tsv or jsonl: several of a picture, quotes, names in folders; other files are refused with their line."""

from __future__ import annotations

from pathlib import Path

import pytest

from selftrans.data.sources.caption_table import caption_table
from selftrans.data.sources.captions import CaptionSource
from selftrans.data.sources.open_source import open_source
from tests.support.pictures import encoded, noise, write

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


def test_what_does_not_fit_the_pictures_is_named(tmp_path: Path) -> None:
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
            "line 2 has more cells than the first line; put captions with commas",
        ),
        ("c.csv", b"file,title\none.png,a\n", "line 2 has no column caption, .*, among file, title"),
        ("c.csv", b"file,caption,text\none.png,a,b\n", "line 2 has the columns caption and text: keep one"),
        ("c.csv", b"which,caption\none.png,a\n", "line 2 has no name of a file"),
        ("c.csv", b"file,caption\n\xff\xffone.png,a\n", "utf-8"),
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
            "line 3: it is not valid json: Expecting ':' delimiter",
        ),
    ],
)
def test_other_tables_are_refused_with_their_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} cannot be read as captions \(.*{said}") as caught:
        caption_table(write(tmp_path, {name: content}) / name)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(
        "give a csv, tsv or jsonl with file_name and caption (docs/data.md)"
    )
