"""Captions in a table next to the pictures: csv, tsv or json lines with a column of names and one of captions.

file_name,caption                               {"file_name": "a/001.jpg", "text": "a cat"}
a/001.jpg,"a cat, asleep"                       {"file_name": "a/002.jpg", "captions": ["a dog", "two ears"]}
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from selftrans.data.sources.label_file import MAX_BYTES, NAMES, csv_lines, picture_name
from selftrans.messages import decoded_text, first_line, printable

SUFFIXES = (".csv", ".tsv", ".jsonl")
#: names of columns, in lower case
CAPTIONS = ("caption", "captions", "text", "txt", "sentence", "sentences", "prompt")


def caption_table(file: Path) -> dict[str, list[str]]:
    """The captions by the name of the picture, in the order of the lines; a name may have several lines.

    Raises ValueError, with the line, for a file that is not of this kind.
    """
    found: dict[str, list[str]] = {}
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES >> 20} MB")
        text = decoded_text(file.read_bytes())
        for where, row in _lines(text) if file.suffix.lower() == ".jsonl" else _rows(text, file.suffix.lower()):
            name, captions = _entry({str(key).strip().lower(): value for key, value in row.items()}, where)
            found.setdefault(picture_name(name.strip()), []).extend(captions)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ValueError(
            f"{printable(file)} cannot be read as captions ({first_line(error)}): give a csv, tsv or jsonl with file_name and "
            "caption (docs/data.md)"
        ) from error
    return found


def _rows(text: str, suffix: str) -> Iterator[tuple[str, Mapping[str | None, Any]]]:
    lines, found = csv_lines(text, ",;\t|")
    delimiter = "\t" if suffix == ".tsv" else found
    rows = csv.DictReader(lines, delimiter=delimiter)
    for row in rows:
        if None in row:
            raise ValueError(
                f"line {rows.line_num} has more cells than the first line; put captions with {delimiter!r} in quotes"
            )
        yield f"line {rows.line_num}", row


def _lines(text: str) -> Iterator[tuple[str, Mapping[str | None, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:  # which counts the lines of this one
                raise ValueError(f"line {number} is no json: {error.msg} at character {error.pos + 1}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object")
            yield f"line {number}", row


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
