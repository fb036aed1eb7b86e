"""Files with the label of each picture, in place of folders: csv, json, and `dataset.json` as StyleGAN's tools write it.

path,label              {"labels": [["00000/img00000000.png", 6], ...]}              "labels" null or missing: no classes
a/001.jpg,cat           {"a/001.jpg": "cat", ...}, [["a/001.jpg", "cat"], ...], [{"path": "a/001.jpg", "label": "cat"}, ...]
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from selftrans.data.sources.labelling import Label, as_label, with_labels
from selftrans.data.sources.source import MAX_CLASSES, Source
from selftrans.messages import decoded_text, first_line, plural, printable

NAME = "dataset.json"
MAX_BYTES = 1 << 28  #: of the file
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
#: names of columns and fields, in lower case
NAMES = (
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "name",
    "image",
    "image_path",
    "picture",
    "id",
)
LABELS = ("label", "class", "class_name", "category", "target")
_FORMS = "give a csv of path,label, or a json of paths and labels (docs/data.md)"


def labelled_folder(source: Source, root: Path, prefix: str = "") -> Source | None:
    """The source with the labels of the `dataset.json` in a folder, in which each picture is `prefix` and its name.

    None without one. Raises ValueError as `labelled`.
    """
    path = root / NAME
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return labelled(source, file.read(MAX_BYTES + 1), str(path), [prefix + name for name in source.names])


def labelled(source: Source, data: bytes, where: str, names: Sequence[str]) -> Source | None:
    """The source with the labels of a `dataset.json`; `names`: of the pictures, from the folder of this file on.

    None for a json of another kind, without `labels`. Pictures without a label become faults of the source. Raises
    ValueError for labels other than words and integers from 0, and where no picture has one.
    """
    if not len(source):
        return None
    if len(data) > MAX_BYTES:
        raise ValueError(f"{where} is larger than {MAX_BYTES} bytes; remove it")
    content = _json(data, where, "repair it, or remove it")
    if not isinstance(content, _Object) or "labels" not in content:
        return None
    content.check(["labels"], where, "repair it, or remove it")
    ignored = dict(Counter(source.ignored) - Counter({"*.json": 1}))
    if content["labels"] is None:
        return replace(source, labels=np.zeros(len(source), np.int64), classes=(), ignored=ignored)
    entries = content["labels"]
    of = _pairs(entries if isinstance(entries, list) else [entries], where, "repair it, or remove it")
    return replace(with_labels(source, of, where, names), ignored=ignored)


def given_labels(source: Source, path: str | Path) -> Source:
    """The source with the labels of a csv, tsv, json or json-lines file (see the head of this module), by `with_labels`.

    Raises ValueError for a file that is not of this kind, and as `with_labels`.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"the file of labels {printable(path)} does not end in {', '.join(SUFFIXES)}; {_FORMS}")
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"the file of labels {printable(path)} cannot be read ({error.strerror}); {_FORMS}") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES >> 20} MB; {_FORMS}")
    where, suffix = str(path), path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        of = _unique(
            _csv(_text(data, where), "\t" if suffix == ".tsv" else None, {*source.names}, where), where, _FORMS
        )
    else:
        of = _pairs(_entries(data, suffix, where), where, _FORMS)
    return with_labels(source, of, where)


def _text(data: bytes, where: str) -> str:
    try:
        return decoded_text(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not text in UTF-8 ({first_line(error)}); store it as UTF-8") from error


def _json(data: bytes, where: str, remedy: str) -> object:
    try:
        return json.loads(data, object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid json ({first_line(error)}); {remedy}") from error


class _Object(dict[str, object]):
    """A json object that remembers its keys with several different values; the last value counts."""

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        super().__init__(pairs)
        repeated = pairs if len(self) < len(pairs) else ()
        self._first = {name: value for name, value in reversed(repeated) if self[name] != value}

    def check(self, keys: Iterable[str], where: str, remedy: str) -> None:
        """Raise ValueError for one of `keys` with two values, of which the first would be lost."""
        for key in keys if self._first else ():
            if key in self._first:
                raise ValueError(
                    f"{where} has {printable(key)} twice, as {printable(repr(self._first[key]), 40)} and "
                    f"{printable(repr(self[key]), 40)}; {remedy}"
                )


def _entries(data: bytes, suffix: str, where: str) -> Iterable[object]:
    """The entries of json: of its `labels` if it has that key, else of its dict or list; of json lines, one a line."""
    if suffix == ".jsonl":
        lines = _text(data, where).splitlines()
        return [_json(line.encode(), f"{where}, line {i},", _FORMS) for i, line in enumerate(lines, 1) if line.strip()]
    content = _json(data, where, _FORMS)
    if isinstance(content, _Object) and isinstance(content.get("labels"), list | dict):
        content.check(["labels"], where, _FORMS)
        content = content["labels"]
    if isinstance(content, _Object):
        content.check(content, where, _FORMS)  # its keys are names of pictures
        return [[*item] for item in content.items()]
    if not isinstance(content, list):
        raise ValueError(f"{where} holds no list of labels; {_FORMS}")
    return content


def _pairs(entries: Iterable[object], where: str, remedy: str) -> dict[str, Label]:
    """Name and label of each entry of a json. Raises ValueError for any other entry."""

    def pairs() -> Iterator[tuple[str, Label]]:
        for entry in entries:
            found = entry
            if isinstance(entry, _Object):
                keys = [_column(entry, names, where) for names in (NAMES, LABELS)]
                entry.check(keys, where, remedy)
                found = [entry.get(key) for key in keys]
            name, given = found if isinstance(found, list) and len(found) == 2 else (None, -1)
            label = as_label(given)
            number = type(label) is int and 0 <= label < MAX_CLASSES
            if not isinstance(name, str) or not (number or label is None or isinstance(label, str)):
                raise ValueError(
                    f"{where}: labels should list a name and a word or an integer from 0 to {MAX_CLASSES - 1} each, not "
                    f"{printable(repr(entry), 80)}; {remedy}"
                )
            yield name, label

    return _unique(pairs(), where, remedy)


def picture_name(given: str) -> str:
    """The name of a picture in a file of labels or captions, as sources have it."""
    return given.replace("\\", "/").removeprefix("./")


def csv_lines(text: str, delimiters: str) -> tuple[io.StringIO, str]:
    """The lines of a csv, each ended by a line feed, and the delimiter that its first line has most often."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return io.StringIO(text), max(delimiters, key=text.split("\n", 1)[0].count)


def _unique(pairs: Iterable[tuple[str, Label]], where: str, remedy: str) -> dict[str, Label]:
    """The pairs as a dict, with names as sources have them. Raises ValueError for a name with two labels."""
    of = dict[str, Label]()
    for given, label in pairs:
        name = picture_name(given)
        if of.setdefault(name, label) != label:
            first = printable(of[name], 40)
            raise ValueError(f"{where} gives {printable(name)} the labels {first} and {printable(label, 40)}; {remedy}")
    return of


def _csv(text: str, delimiter: str | None, names: Collection[str], where: str) -> Iterator[tuple[str, Label]]:
    """Name and label of each line; `names` of the pictures: a first line with one of them is no header."""
    lines, found = csv_lines(text, ",;\t")
    rows = csv.reader(lines, delimiter=delimiter or found)
    at: tuple[int, int] | None = None
    same: list[tuple[int, int]] = []  # pairs of columns with the same title
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if at is None:
                at = _columns(row, where)
                titles = [cell.strip().lower() for cell in row]
                same = [(i, k) for i in at for k, title in enumerate(titles) if k > i and title == titles[i]]
                if at != (0, 1) or row[0].strip().lower() in NAMES or not _is_name(row[0], names):
                    continue
            if len(row) <= max(at):
                raise ValueError(f"line {rows.line_num} has {len(row)} of the columns")
            for i, k in same:
                if k < len(row) and row[i].strip() != row[k].strip():
                    raise ValueError(
                        f"line {rows.line_num} has two values in the columns {printable(titles[i])}, "
                        f"{printable(row[i].strip(), 40)} and {printable(row[k].strip(), 40)}; keep one of them"
                    )
            yield row[at[0]].strip(), row[at[1]].strip() or None
    except (csv.Error, ValueError) as error:
        raise (
            error if str(error).startswith(where) else ValueError(f"{where}: {first_line(error)}; {_FORMS}")
        ) from error


def _columns(row: list[str], where: str) -> tuple[int, int]:
    """The columns of names and labels, by the first line. Raises ValueError where that is not clear."""
    cells = [cell.strip().lower() for cell in row]
    known = dict.fromkeys(cells)
    if any(cell in LABELS for cell in cells) and any(cell in NAMES for cell in cells):
        return cells.index(_column(known, NAMES, where)), cells.index(_column(known, LABELS, where))
    if len(row) != 2 or (len(known) == 1 and cells[0] in (*NAMES, *LABELS)):
        shown = printable(", ".join(row), 80)
        raise ValueError(
            f"{where} has {plural(len(row), 'column')} ({shown}), and none are named path and label; {_FORMS}"
        )
    return 0, 1


def _column(entry: Collection[str], names: tuple[str, ...], where: str) -> str:
    """The one of `names` that an entry has; of several, the first. Raises ValueError where it has several of LABELS."""
    found = [name for name in names if name in entry]
    if names is LABELS and len(found) > 1:
        raise ValueError(f"{where} has the labels {' and '.join(found)}; keep one of them")
    return found[0] if found else names[0]


def _is_name(cell: str, names: Collection[str]) -> bool:
    """Whether the first cell of a file is the path of a picture, not the title of a column."""
    name = picture_name(cell.strip())
    return name in names or "." in name or "/" in name or any(char.isdigit() for char in name)
