"""Pictures with classes in tar files, as webdataset writes them: `key.jpg` with `key.cls`, or with a field of `key.json`.

Members are read in place, nothing is extracted. A key is a path up to the first dot of its last part, as in webdataset.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from selftrans.data.sources.file_kinds import PICTURES
from selftrans.data.sources.labelling import Label, numbered
from selftrans.data.sources.source import Source, classify
from selftrans.data.sources.tar_archive import tar_entries
from selftrans.messages import first_line, printable

CLASS, FIELDS = ".cls", ".json"
FIELD_NAMES = ("label", "labels", "cls", "class")  #: of a .json; the first that it has counts
MAX_LABEL_BYTES = {CLASS: 1 << 12, FIELDS: 1 << 20}
WHERE = f"the {CLASS} or {FIELDS} of its key"


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
    if not pictures or not (files or field is not None):
        labels, classes = classify(chosen.heads, str(tars[0]))
        return replace(source, labels=labels, classes=classes)

    def content(name: str) -> bytes | None:
        if name not in files:
            return None
        with found.open(files[name]) as file:
            return file.read()

    values, faults = list[Label](), dict[int, str]()
    for i, name in enumerate(source.names):
        try:
            values.append(_class_of(name, content, field))
        except ValueError as error:
            values.append(None)
            faults[i] = f"no label: {error}"
            if len(faults) == len(source):
                raise ValueError(f"{error}; add its class, or give captions (--text ENCODER)") from error
    given = numbered(values, WHERE)
    return replace(source, labels=given.labels, classes=given.classes, faults=given.faults(WHERE) | faults)


def _key(name: str) -> str:
    head, slash, last = name.rpartition("/")
    return head + slash + last.partition(".")[0]


def _class_of(name: str, content: Callable[[str], bytes | None], field: str | None) -> int | str:
    """The class of a picture; `content` of a file, None without one. Raises ValueError where there is no class."""
    key = _key(name)
    if field is None and (data := content(key + CLASS)) is not None:
        text = data.decode("utf-8", "replace").strip()
        if not text or not text.isprintable():
            raise ValueError(f"{printable(key)}{CLASS} holds no class: {text!r:.60}")
        return text
    if (data := content(key + FIELDS)) is None:
        raise ValueError(f"{printable(name)} has no class in {CLASS} or {FIELDS} of its key")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{printable(key)}{FIELDS} is not valid json ({first_line(error)})") from error
    asked = (field,) if field else FIELD_NAMES
    value = next((fields[each] for each in asked if each in fields), None) if isinstance(fields, dict) else None
    if not isinstance(value, int | str) or isinstance(value, bool) or value == "":
        raise ValueError(
            f"{printable(key)}{FIELDS} has no class, an integer or a name, in {printable(', '.join(asked))}"
        )
    return value
