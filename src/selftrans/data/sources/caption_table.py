"""Captions in a table next to the pictures: csv, tsv or json lines with a column of names and one of captions.

file_name,caption                               {"file_name": "a/001.jpg", "text": "a cat"}
a/001.jpg,"a cat, asleep"                       {"file_name": "a/002.jpg", "captions": ["a dog", "two ears"]}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from selftrans.data.sources.table_file import NAMES, csv_rows, json_lines, picture_name, read_text
from selftrans.messages import first_line, printable

SUFFIXES = (".csv", ".tsv", ".jsonl")
#: names of columns, in lower case
CAPTIONS = ("caption", "captions", "text", "txt", "sentence", "sentences", "prompt")


def caption_table(file: Path) -> dict[str, list[str]]:
    """The captions by the name of the picture, in the order of the lines; a name may have several lines.

    Raises ValueError, with the line, for a file that is not of this kind.
    """
    found: dict[str, list[str]] = {}
    try:
        text, suffix = read_text(file), file.suffix.lower()
        for number, row in json_lines(text) if suffix == ".jsonl" else _rows(text, suffix):
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object")
            name, captions = _entry({str(key).strip().lower(): value for key, value in row.items()}, f"line {number}")
            found.setdefault(picture_name(name.strip()), []).extend(captions)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{printable(file)} cannot be read as captions ({first_line(error)}): give a csv, tsv or jsonl with file_name and "
            "caption (docs/data.md)"
        ) from error
    return found


def _rows(text: str, suffix: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Number of each line after the first, and its cells by the titles in the first; missing cells are empty."""
    lines = csv_rows(text, suffix)
    _, titles = next(lines, (0, []))
    for number, row in lines:
        if len(row) > len(titles):
            raise ValueError(f"line {number} has more cells than the first line; put captions with commas in quotes")
        yield number, dict(zip_longest(titles, row, fillvalue=""))


def _entry(row: Mapping[str, Any], where: str) -> tuple[str, list[str]]:
    """Name and captions of one line. ValueError unless it has a name, and captions under one of CAPTIONS."""
    name = next((row[key] for key in NAMES if key in row), None)
    columns = [key for key in CAPTIONS if key in row]
    if len(columns) != 1:
        which = f"the columns {' and '.join(columns)}: keep one" if columns else f"no column {', '.join(CAPTIONS)}"
        raise ValueError(f"{where} has {which}, among {', '.join(map(printable, row))}")
    given = row[columns[0]]
    captions = given if isinstance(given, list) else [given or ""]
    if not isinstance(name, str) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{where} has no name of a file, or a caption that is not text")
    return name, captions
