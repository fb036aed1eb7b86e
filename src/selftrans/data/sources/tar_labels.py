"""Pictures with classes in tar files, as webdataset writes them: `key.jpg` with `key.cls`, or with a field of `key.json`.

Members are read in place, nothing is extracted. A key is a path up to the first dot of its last part, as in webdataset.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from selftrans.data.sources.file_kinds import PICTURES
from selftrans.data.sources.labelling import Label, numbered
from selftrans.data.sources.source import Source, classify
from selftrans.data.sources.tar_archive import tar_entries
from selftrans.messages import first_line, printable

CLASS, FIELDS = ".cls", ".json"
FIELD_NAMES = ("label", "labels", "cls", "class")  #: of a .json; the first that it has counts
MAX_LABEL_BYTES = {CLASS: 1 << 12, FIELDS: 1 << 20}
WHERE = f"the {CLASS} or {FIELDS} of its key"
REMEDY = "add its class, or give captions (--text ENCODER)"


def only_tars(folder: Path) -> bool:
    """Whether a folder holds tar files, and neither folders nor pictures next to them."""
    try:
        visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError:
        return False
    others = any(path.is_dir() or path.suffix.lower() in PICTURES for path in visible)
    return not others and any(path.suffix == ".tar" for path in visible)


def labelled_tars(tars: list[Path], field: str | None = None, split: str | None = None) -> Source:
    """Pictures of tar files, each named `TAR/key.jpg`, with their classes; `field`: of key.json (None: see `FIELD_NAMES`);
    `split`: a folder in the tar.

    Classes are integers from 0, or names. In tars without any .cls and .json, the first folder of a member is its class;
    without folders there are no classes. Pictures without a class become faults of the source. Raises ValueError where none has
    one, for a class of another kind, and as `tar_archive.tar_entries` does.
    """
    found = tar_entries(tars, {*PICTURES, CLASS, FIELDS}, split)
    pictures, files = list[int](), dict[str, int]()
    for i, name in enumerate(found.names):
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in PICTURES:
            pictures.append(i)
            continue
        if found.sizes[i] > (most := MAX_LABEL_BYTES[suffix]):
            raise ValueError(f"{printable(name)} is of {found.sizes[i]} bytes, above the limit of {most}")
        if files.setdefault(_key(name) + suffix, i) != i:
            twice = printable(tars[0].parent / (_key(name) + suffix))
            raise ValueError(f"{twice}: two files have this key and extension; make the tar again")
    chosen = found.chosen(pictures)
    source = chosen.pictures()
    if pictures and (files or field is not None):
        return _with_classes(source, {name: partial(found.open, i) for name, i in files.items()}, field)
    labels, classes = classify(chosen.heads, str(tars[0]))
    return replace(source, labels=labels, classes=classes)


def _with_classes(source: Source, files: Mapping[str, Callable[[], BinaryIO]], field: str | None) -> Source:
    """The source with the classes in these files. Raises ValueError where no picture has one."""
    values, faults = list[Label](), dict[int, str]()
    for i, name in enumerate(source.names):
        try:
            values.append(_value(name, files, field))
        except ValueError as error:
            values.append(None)
            faults[i] = f"no label: {str(error).removesuffix(f'; {REMEDY}')}"
            if len(faults) == len(source):
                raise
    found = numbered(values, WHERE)
    return replace(source, labels=found.labels, classes=found.classes, faults=found.faults(WHERE) | faults)


def _key(name: str) -> str:
    head, slash, last = name.rpartition("/")
    return head + slash + last.partition(".")[0]


def _value(name: str, files: Mapping[str, Callable[[], BinaryIO]], field: str | None) -> int | str:
    """The class of a picture, as its file has it. Raises ValueError where there is none."""
    key = _key(name)
    if field is None and (found := files.get(key + CLASS)):
        text = found().read().decode("utf-8", "replace").strip()
        if not text or not text.isprintable():
            raise ValueError(f"{printable(key)}{CLASS} holds no class: {text!r:.60}; {REMEDY}")
        return text
    if (found := files.get(key + FIELDS)) is None:
        raise ValueError(f"{printable(name)} has no class in {CLASS} or {FIELDS} of its key; {REMEDY}")
    try:
        content = json.loads(found().read())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{printable(key)}{FIELDS} is not valid json ({first_line(error)}); {REMEDY}") from error
    named = [each for each in ((field,) if field else FIELD_NAMES) if isinstance(content, dict) and each in content]
    value = content[named[0]] if named else None
    if not (isinstance(value, int | str) and not isinstance(value, bool)) or value == "":
        asked = field or ", ".join(FIELD_NAMES)
        raise ValueError(
            f"{printable(key)}{FIELDS} has no class, an integer or a name, in {printable(asked)}; {REMEDY}"
        )
    return value
