"""Text files with a line for each picture, of labels or captions: csv, tsv, json and json lines.

Errors say what is wrong, with the line; the caller adds the name of the file.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from selftrans.messages import decoded_text, first_line, printable

MAX_BYTES = 1 << 28  #: of a file
MOST_LINES = 1000  #: of a file, by which its columns are found
#: names of columns and fields that name the picture, in lower case
NAMES = (
    *("path", "file", "filename", "file_name", "filepath", "file_path"),
    *("name", "image", "image_path", "picture", "id"),
)


class JsonObject(dict[str, Any]):
    """A json object that remembers its keys with several different values; the last value counts."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        repeated = pairs if len(self) < len(pairs) else ()
        self._first = {name: value for name, value in reversed(repeated) if self[name] != value}

    def check(self, keys: Iterable[str]) -> None:
        """Raise ValueError for one of `keys` with two values, of which the first would be lost."""
        for key in keys if self._first else ():
            if key in self._first:
                values = (printable(repr(value), 40) for value in (self._first[key], self[key]))
                raise ValueError(f"it has {printable(key)} twice, as {' and '.join(values)}")


def first_bytes(file: Path, most: int) -> bytes:
    """At most so many bytes of a file. Raises OSError."""
    with open(file, "rb") as stream:
        return stream.read(most)


def read_text(file: Path) -> str:
    """The text of a file. Raises OSError, and ValueError as `text_of`."""
    return text_of(first_bytes(file, MAX_BYTES + 1))


def text_of(data: bytes) -> str:
    """The text in the bytes of a file, see `decoded_text`. Raises ValueError for other bytes, and for more than MAX_BYTES."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES >> 20} MB")
    try:
        return decoded_text(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not text in UTF-8, so store it as UTF-8: {first_line(error)}") from error


def parse_json(text: str) -> Any:
    """The content of a json file, with objects as JsonObject. Raises ValueError for another file."""
    try:
        return json.loads(text, object_pairs_hook=JsonObject)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid json: {first_line(error)}") from error


def json_lines(text: str) -> Iterator[tuple[int, Any]]:
    """Number and content of each line of json. Raises ValueError for another line."""
    # not `splitlines`: other ends of lines may be part of a json text
    for number, line in enumerate(_with_line_feeds(text).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line, object_pairs_hook=JsonObject)
            except (ValueError, RecursionError) as error:
                said = first_line(error)
                if isinstance(error, json.JSONDecodeError):  # its text counts the lines of this one
                    said = f"{error.msg} at character {error.pos + 1}"
                raise ValueError(f"line {number} is not valid json: {said}") from error


def csv_rows(text: str, suffix: str) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of each line of a csv that is not empty. Raises ValueError for a line that cannot be read.

    A .tsv has tabs between its cells, a .csv what its first line has most often: commas, semicolons, tabs or vertical bars.
    """
    text = _with_line_feeds(text)
    found = max(",;\t|", key=text.split("\n", 1)[0].count)
    rows = csv.reader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else found)
    try:
        for row in rows:
            if any(cell.strip() for cell in row):
                yield rows.line_num, row
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: {first_line(error)}") from error


def column_of_names(rows: Iterable[Mapping[Any, Any]], names: Iterable[str], but: Collection[Any]) -> Any:
    """The column, not one of `but`, with the most names of pictures, with or without folders and extension; None without one.

    rows: the cells of each line, by column. names: those of the pictures.
    """
    paths = map(PurePosixPath, names)
    known = {form for path in paths for form in (path.name, path.stem)}
    found = Counter(
        key
        for row in rows
        for key, cell in row.items()
        if key not in but and isinstance(cell, str) and picture_name(cell.strip()).rsplit("/", 1)[-1] in known
    )
    return found.most_common(1)[0][0] if found else None


def _with_line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def picture_name(given: str) -> str:
    """The name of a picture in a file of labels or captions, as sources have it."""
    return given.replace("\\", "/").removeprefix("./")
