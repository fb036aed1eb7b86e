"""Pictures with captions: caption files next to the pictures, the annotations of COCO, or a table of names and captions:

file_name,caption                               {"file_name": "a/001.jpg", "text": "a cat"}
a/001.jpg,"a cat, asleep"                       {"file_name": "a/002.jpg", "captions": ["a dog", "two ears"]}

A sample that lacks its picture or its captions stays in the source, with the reason in `Source.faults`: it is refused, or
skipped and listed, as an unreadable picture is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from selftrans.data.sources.decode import fault_of
from selftrans.data.sources.file_kinds import PICTURES
from selftrans.data.sources.source import Entries, Source, parts_inside
from selftrans.data.sources.table_file import (
    MOST_LINES,
    NAMES,
    column_of_names,
    csv_rows,
    json_lines,
    picture_name,
    read_text,
)
from selftrans.messages import decoded_text, first_line, one_line, page, plural, printable

if TYPE_CHECKING:
    from PIL import Image

#: files with the captions of the picture of the same name, the first that exists is read
CAPTION_FILES = (".txt", ".caption", ".json")
KEYS = ("caption", "captions", "text")  #: of a .json file
MAX_FILE_BYTES = 1 << 20  #: of one caption file
MAX_ANNOTATION_BYTES = 1 << 30  #: of an annotation file
EMPTY = "empty captions"  #: in `Source.ignored`
CAPTIONED = PICTURES | {*CAPTION_FILES}  #: files of a source of pictures with captions
TABLES = (".csv", ".tsv", ".jsonl")
#: names of columns and fields of a table, in lower case
CAPTIONS = ("caption", "captions", "text", "txt", "sentence", "sentences", "prompt")
NO_PICTURE, NO_CAPTION = "a caption without its picture", "a picture without a caption"


@dataclass(frozen=True)
class CaptionSource:
    """Where the captions of a source are, if they are not in files next to the pictures."""

    file: str | Path | None = None  #: a table of names and captions, or annotations as COCO has them
    column: str | None = None  #: of the captions in a table or in `file`; None: found by its name


def parse_captions(suffix: str, data: bytes) -> list[str]:
    """The captions in a file of CAPTION_FILES: one on each line, or in json under one of KEYS a text or a list of texts.

    Raises ValueError, with a short reason, for anything else.
    """
    try:
        text = decoded_text(data)
        if suffix != ".json":
            return [line for line in text.splitlines() if line.strip()] or [""]
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its captions cannot be read ({first_line(error)})") from error
    found = [parsed[key] for key in KEYS if key in parsed] if isinstance(parsed, dict) else []
    captions = found[0] if found and isinstance(found[0], list) else found[:1]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"its .json has no text under {', '.join(KEYS)}")
    return captions


def with_captions(source: Source, captions: Iterable[Iterable[str] | str]) -> Source:
    """The source with these captions, one entry a sample: captions, or the reason why there are none.

    Captions are cleaned; empty ones are left out and counted in `ignored`. Labels are dropped: text is the condition.
    """
    kept, faults, empty = list[tuple[str, ...]](), dict[int, str](), 0
    for i, entry in enumerate(captions):
        given = [] if isinstance(entry, str) else [one_line(caption) for caption in entry]
        kept.append(tuple(filter(None, given)))
        empty += len(given) - len(kept[-1])
        if not kept[-1]:
            faults[i] = entry if isinstance(entry, str) else "its captions are empty" if given else NO_CAPTION
    assert len(kept) == len(source), "one entry a sample"
    ignored = source.ignored | ({EMPTY: empty} if empty else {})
    labels = np.zeros(len(source), dtype=np.int64)
    return replace(source, labels=labels, classes=(), captions=kept, faults=faults, ignored=ignored)


def captioned(files: Entries) -> Source:
    """The pictures among `files`, each with the captions in the file of CAPTION_FILES that has its name next to it.

    A caption file without a picture is a sample, too, with the reason in `faults`.
    """
    texts: dict[str, dict[str, int]] = {}  #: path without extension -> extension in lower case -> number of the file
    pictures = dict[int, str]()  #: number of the file -> path without extension
    for i, name in enumerate(files.names):  # of x.TXT and x.txt, the latter counts
        suffix = PurePosixPath(name).suffix
        if suffix.lower() in CAPTION_FILES:
            texts.setdefault(name.removesuffix(suffix), {})[suffix.lower()] = i
        else:
            pictures[i] = name.removesuffix(suffix)
    #: number of the file -> captions or fault
    entries: dict[int, list[str] | str] = {i: _next_to(files, texts.get(stem, {})) for i, stem in pictures.items()}
    for stem in texts.keys() - pictures.values():
        entries |= dict.fromkeys(texts[stem].values(), NO_PICTURE)
    if pictures and not texts:
        raise ValueError(
            f"none of the {plural(len(pictures), 'picture')} has a caption: they are read from name.txt, name.caption or "
            "name.json next to name.jpg; for a table of names and captions, or COCO's json, give --captions FILE"
        )
    order = sorted(entries)
    return with_captions(files.chosen(order).pictures(), (entries[i] for i in order))


def _next_to(files: Entries, own: Mapping[str, int]) -> list[str] | str:
    """The captions of a picture, or the reason why it has none; `own`: extension -> number of the caption file."""
    suffix = next((suffix for suffix in CAPTION_FILES if suffix in own), None)
    if suffix is None:
        return NO_CAPTION
    if files.sizes[own[suffix]] > MAX_FILE_BYTES:
        return f"its captions take more than {MAX_FILE_BYTES} bytes"
    try:
        with files.open(own[suffix]) as file:
            return parse_captions(suffix, file.read())
    except ValueError as error:
        return first_line(error)
    except Exception as error:  # of a zip the type depends on the damage
        return f"its captions cannot be read ({first_line(error)})"


def annotated(pictures: Source, file: Path, column: str | None = None) -> Source:
    """The pictures with the captions of a table or of a COCO annotation file, whose names are paths in the source, or the
    last part of one, also without its extension. `column`: as in `caption_table`.

    Raises ValueError when the file is not of this kind, or names a picture outside the source.
    """
    images, captions = _annotations(file, pictures.names, column)
    by_last: dict[str, list[str]] = {}
    for name in pictures.names:
        for form in {PurePosixPath(name).name, PurePosixPath(name).stem}:
            by_last.setdefault(form, []).append(name)
    known = set(pictures.names)
    entries: dict[str, Any] = dict.fromkeys(pictures.names, f"{NO_CAPTION} in {file.name}")
    for key, name in images.items():
        if not parts_inside(name):
            raise ValueError(
                f"{file} holds the name {name!r:.200}, which leads out of the source; do not trust this file"
            )
        last = by_last.get(PurePosixPath(name).name, [])
        path = name if name in known or len(last) != 1 else last[0]
        of_image = captions.pop(key, [])
        if path in known:
            entries[path] = (entries[path] if isinstance(entries[path], list) else []) + of_image
        else:
            entries[path] = NO_PICTURE
    entries |= dict.fromkeys((f"image_id {printable(key)} in {file.name}" for key in captions), NO_PICTURE)
    at = {name: i for i, name in enumerate(pictures.names)}
    names = sorted(entries)
    sizes = [pictures.sizes[at[name]] if name in at and len(pictures.sizes) else 0 for name in names]

    def opened(i: int) -> Image.Image:
        if names[i] not in at:
            raise ValueError(NO_PICTURE)
        return pictures.open(at[names[i]])

    none = np.zeros(len(names), dtype=np.int64)
    source = replace(pictures, names=names, labels=none, open=opened, sizes=sizes)
    return with_captions(source, (entries[name] or NO_CAPTION for name in names))


def _annotations(file: Path, names: Sequence[str], column: str | None) -> tuple[dict[Any, str], dict[Any, list[str]]]:
    """The file names and the captions by image id; of a table the name is the id. Raises ValueError for any other file."""
    if file.suffix.lower() in TABLES:
        of = caption_table(file, names, column)
        return {name: name for name in of}, dict(of)
    images: dict[Any, str] = {}
    captions: dict[Any, list[str]] = {}
    expected = "give images with id and file_name, annotations with image_id and caption"
    with fault_of(file, "does not hold captions as COCO's annotations do", expected):
        if file.stat().st_size > MAX_ANNOTATION_BYTES:
            raise ValueError(f"larger than {MAX_ANNOTATION_BYTES} bytes")
        data = json.loads(file.read_bytes())
        for image in data["images"]:
            if not isinstance(image["file_name"], str) or image["id"] in images:
                raise ValueError(f"image {printable(image['id'])} occurs twice, or its file_name is not text")
            images[image["id"]] = image["file_name"]
        for annotation in data["annotations"]:
            if not isinstance(annotation["caption"], str):
                raise ValueError(f"the caption of image {printable(annotation['image_id'])} is not text")
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return images, captions


def caption_table(file: Path, pictures: Sequence[str] = (), column: str | None = None) -> dict[str, list[str]]:
    """The captions by the name of the picture, in the order of the lines; a name may have several lines.

    column: of the captions; None: the one of CAPTIONS. Without a column of NAMES, that with names of `pictures` has the names.
    Raises ValueError, with the line, for a file that is not of this kind.
    """
    found: dict[str, list[str]] = {}
    forms = (
        f"give a csv, tsv or jsonl with file_name and caption ({page('data.md')}), or name the column of captions by "
        "--caption-column"
    )
    with fault_of(file, "cannot be read as captions", forms):
        text, suffix = read_text(file), file.suffix.lower()
        rows = list[tuple[int, dict[str, Any]]]()
        for number, row in json_lines(text) if suffix == ".jsonl" else _rows(text, suffix):
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object")
            rows.append((number, {str(key).strip().lower(): value for key, value in row.items()}))
        columns = CAPTIONS if column is None else (column.strip().lower(),)
        of_names = tuple(name for name in NAMES if name not in columns)
        if rows and not any(name in rows[0][1] for name in of_names):
            of_names = (column_of_names((row for _, row in rows[:MOST_LINES]), pictures, columns),)
        for number, row in rows:
            name, captions = _entry(row, f"line {number}", of_names, columns)
            found.setdefault(picture_name(name.strip()), []).extend(captions)
    return found


def _rows(text: str, suffix: str) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Number of each line after the first, and its cells by the titles in the first; None for those that it lacks."""
    lines = csv_rows(text, suffix)
    _, titles = next(lines, (0, []))
    for number, row in lines:
        if len(row) > len(titles):
            raise ValueError(
                f"line {number} has more cells than the first line; put captions with the separator of cells in quotes"
            )
        yield number, dict(zip_longest(titles, row))


def _entry(
    row: Mapping[str, Any], where: str, names: tuple[str, ...], captioned: tuple[str, ...]
) -> tuple[str, list[str]]:
    """Name and captions of one line. ValueError unless one of `names` is in it, and one of `captioned` with the captions."""
    name = next((row[key] for key in names if key in row), None)
    columns = [key for key in captioned if key in row]
    if len(columns) != 1:
        which = f"the columns {' and '.join(columns)}: keep one" if columns else f"no column {', '.join(captioned)}"
        raise ValueError(f"{where} has {which}, among {', '.join(map(printable, row))}")
    given = row[columns[0]]
    captions = given if isinstance(given, list) else [given or ""]
    if not isinstance(name, str) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{where} has no name of a file, or a caption that is not text")
    return name, captions
