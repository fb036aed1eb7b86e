"""Files with the label of each picture, in place of folders: csv, json, and `dataset.json` as StyleGAN's tools write it.

path,label              {"labels": [["00000/img00000000.png", 6], ...]}              "labels" null or missing: no classes
a/001.jpg,cat           {"a/001.jpg": "cat", ...}, [["a/001.jpg", "cat"], ...], [{"path": "a/001.jpg", "label": "cat"}, ...]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from selftrans.data.sources.decode import fault_of
from selftrans.data.sources.labelling import Label, as_label, with_labels
from selftrans.data.sources.source import MAX_CLASSES, LabelFile, Source
from selftrans.data.sources.table_file import (
    MAX_BYTES,
    MOST_LINES,
    NAMES,
    JsonObject,
    column_of_names,
    csv_rows,
    json_lines,
    parse_json,
    picture_name,
    read_text,
    text_of,
)
from selftrans.messages import page, plural, printable

NAME = "dataset.json"
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
#: names of columns and fields, in lower case
LABELS = ("label", "class", "class_name", "category", "target")
UNREADABLE = "cannot be read as labels"
_FORMS = (
    f"give a csv of path,label, or a json of paths and labels ({page('data.md')}), or the column of labels by "
    "--label-column"
)


def labelled(source: Source, files: Iterable[LabelFile]) -> Source | None:
    """The source with the labels of the first `dataset.json` that has a field `labels`; None without one.

    Pictures without a label become faults of the source. Raises ValueError for labels other than words and integers from 0,
    and where no picture has one.
    """
    for file in files if len(source) else ():
        with fault_of(file.where, UNREADABLE, "repair it, or remove it"):
            content = parse_json(text_of(file.read(MAX_BYTES + 1)))
            if not isinstance(content, JsonObject) or "labels" not in content:
                continue
            content.check(["labels"])
            entries = content["labels"]
            of = None if entries is None else _unique(_pairs(entries if isinstance(entries, list) else [entries]))
        ignored = dict(Counter(source.ignored) - Counter({"*.json": 1}))
        names = list(map(file.inside, source.names))
        return replace(source if of is None else with_labels(source, of, file.where, names), ignored=ignored)
    return None


def given_labels(source: Source, path: str | Path, column: str | None = None) -> Source:
    """The source with the labels of a csv, tsv, json or json-lines file (see the head of this module), by `with_labels`.

    `column`: the column or field of the labels; None: the one with a usual name. Raises ValueError for a file that is not of
    this kind, and as `with_labels`.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"the file of labels {printable(path)} does not end in {', '.join(SUFFIXES)}; {_FORMS}")
    with fault_of(path, UNREADABLE, _FORMS):
        text = read_text(path)
        labels, of_lines = LABELS if column is None else (column.strip().lower(),), suffix in (".csv", ".tsv")
        pairs = _csv(text, suffix, source.names, labels) if of_lines else _pairs(_entries(text, suffix), labels)
        of = _unique(pairs)
    return with_labels(source, of, str(path))


def _entries(text: str, suffix: str) -> Iterable[object]:
    """The entries of json: of its `labels` if it has that key, else of its dict or list; of json lines, one a line."""
    if suffix == ".jsonl":
        return (entry for _, entry in json_lines(text))
    content = parse_json(text)
    if isinstance(content, JsonObject) and isinstance(content.get("labels"), list | dict):
        content.check(["labels"])
        content = content["labels"]
    if isinstance(content, JsonObject):
        content.check(content)  # its keys are names of pictures
        return [[*item] for item in content.items()]
    if not isinstance(content, list):
        raise ValueError("it holds no list of labels")
    return content


def _pairs(entries: Iterable[object], labels: tuple[str, ...] = LABELS) -> Iterator[tuple[str, Label]]:
    """Name and label (in one of the fields `labels`) of each entry of a json. Raises ValueError for any other entry."""
    for entry in entries:
        found = entry
        if isinstance(entry, JsonObject):
            titles = {title.strip().lower(): title for title in entry}
            keys = [titles.get(key, key) for key in (_column(titles, _names_but(labels)), _column(titles, labels))]
            entry.check(keys)
            found = [entry.get(key) for key in keys]
        name, given = found if isinstance(found, list) and len(found) == 2 else (None, -1)
        label = as_label(given)
        number = type(label) is int and 0 <= label < MAX_CLASSES
        if not isinstance(name, str) or not (number or label is None or isinstance(label, str)):
            raise ValueError(
                f"labels should list a name and a word or an integer from 0 to {MAX_CLASSES - 1} each, not "
                f"{printable(repr(entry), 80)}"
            )
        yield name, label


def _unique(pairs: Iterable[tuple[str, Label]]) -> dict[str, Label]:
    """The pairs as a dict, with names as sources have them. Raises ValueError for a name with two labels."""
    of = dict[str, Label]()
    for given, label in pairs:
        name = picture_name(given)
        if of.setdefault(name, label) != label:
            first = printable(of[name], 40)
            raise ValueError(f"it gives {printable(name)} the labels {first} and {printable(label, 40)}")
    return of


def _csv(
    text: str, suffix: str, pictures: Sequence[str], labels: tuple[str, ...] = LABELS
) -> Iterator[tuple[str, Label]]:
    """Name and label of each line; the label is in one of the columns `labels`.

    `pictures`: their names: a first line with one of them is no header, and a column of them is that of the names.
    """
    names, rows = {*pictures}, list(csv_rows(text, suffix))
    if not rows:
        return
    first = rows[0][1]
    at, titles = (
        _columns([row for _, row in rows[:MOST_LINES]], names, labels),
        [cell.strip().lower() for cell in first],
    )
    same = [(i, k) for i in at for k, title in enumerate(titles) if k > i and title == titles[i]]
    # a line with the title of the labels is no picture, unless there is one of this name
    named = picture_name(first[0].strip()) in names or (titles[at[1]] not in labels and _is_name(first[0]))
    untitled = at == (0, 1) and titles[0] not in NAMES and named
    for number, row in rows[0 if untitled else 1 :]:
        if len(row) <= max(at):
            raise ValueError(f"line {number} has {len(row)} of the columns")
        for i, k in same:
            if k < len(row) and row[i].strip() != row[k].strip():
                raise ValueError(
                    f"line {number} has two values in the columns {printable(titles[i])}, {printable(row[i].strip(), 40)} and "
                    f"{printable(row[k].strip(), 40)}: keep one of them"
                )
        yield row[at[0]].strip(), row[at[1]].strip() or None


def _columns(rows: list[list[str]], names: Collection[str], labels: tuple[str, ...]) -> tuple[int, int]:
    """The columns of names and labels, by the first lines. Raises ValueError where that is not clear."""
    row, cells = rows[0], [cell.strip().lower() for cell in rows[0]]
    known, shown = dict.fromkeys(cells), f"{plural(len(rows[0]), 'column')}, {printable(', '.join(rows[0]), 80)}"
    if any(cell in labels for cell in cells):
        column = cells.index(_column(known, labels))
        if any(cell in (titles := _names_but(labels)) for cell in cells):
            return cells.index(_column(known, titles)), column
        if (found := column_of_names(map(dict, map(enumerate, rows[1:])), names, (column,))) is not None:
            return found, column
        if len(cells) == len(known) == 2:
            return 1 - column, column
    elif labels is not LABELS:
        raise ValueError(f"it has no column {printable(labels[0])}, but {shown}")
    if len(row) != 2 or (len(known) == 1 and cells[0] in (*NAMES, *LABELS)):
        raise ValueError(f"it has {shown}, and none are named path and label")
    return 0, 1


def _names_but(labels: tuple[str, ...]) -> tuple[str, ...]:
    """The columns of names, without those of the labels: `--label-column name` may be asked for."""
    return tuple(name for name in NAMES if name not in labels)


def _column(entry: Collection[str], names: tuple[str, ...]) -> str:
    """The one of `names` that an entry has; of several, the first. Raises ValueError where it has several of LABELS."""
    found = [name for name in names if name in entry]
    if names is LABELS and len(found) > 1:
        raise ValueError(f"it has the labels {' and '.join(found)}: keep one of them")
    return found[0] if found else names[0]


def _is_name(cell: str) -> bool:
    """Whether the first cell of a file looks like the path of a picture, not like the title of a column."""
    return any(char in "./\\" or char.isdigit() for char in cell)
