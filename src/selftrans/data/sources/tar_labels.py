"""Pictures with classes in tar files, as webdataset writes them: `key.jpg` with `key.cls`, or with a field of `key.json`.

Members are read in place, nothing is extracted. A key is a path up to the first dot of its last part, as in webdataset.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np

from selftrans.data.sources.decode import open_picture
from selftrans.data.sources.file_kinds import PICTURES
from selftrans.data.sources.source import MAX_CLASSES, Source, classify
from selftrans.data.sources.tar_archive import MAX_PICTURE_BYTES, Member, add_member, walk_tar
from selftrans.storage import first_line, printable

CLASS, FIELDS = ".cls", ".json"
FIELD_NAMES = ("label", "labels", "cls", "class")  #: of a .json, the first that is there
MAX_LABEL_BYTES = {CLASS: 1 << 12, FIELDS: 1 << 20}
REMEDY = "add its class, or give captions (--text ENCODER)"


def only_tars(folder: Path) -> bool:
    """Whether a folder holds tar files, and neither folders nor pictures next to them."""
    try:
        visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError:
        return False
    others = any(path.is_dir() or path.suffix.lower() in PICTURES for path in visible)
    return not others and any(path.suffix == ".tar" for path in visible)


def labelled_tars(tars: list[Path], field: str | None = None) -> Source:
    """Pictures of tar files, each named `TAR/key.jpg`, with their classes; `field`: of key.json (None: see `FIELD_NAMES`).

    Classes are integers from 0, or names. In tars without any .cls and .json, the first folder of a member is its class;
    without folders there are no classes. Pictures without a class become faults of the source. Raises ValueError where none has
    one, for a class of another kind, and as `tar_archive.tar_files` does.
    """
    ignored: Counter[str] = Counter()
    pictures: dict[str, Member] = {}
    files: dict[str, Member] = {}
    for path in tars:
        for name, info in walk_tar(path, {*PICTURES, CLASS, FIELDS}, ignored):
            suffix = PurePosixPath(name).suffix.lower()
            if suffix in PICTURES:
                add_member(pictures, f"{path.name}/{name}", info, path, MAX_PICTURE_BYTES)
            else:
                add_member(files, f"{path.name}/{_key(name)}{suffix}", info, path, MAX_LABEL_BYTES[suffix])
    names = sorted(pictures)
    faults = dict[int, str]()
    if files or field is not None:
        labels, classes, faults = _of_files(names, files, field)
    else:
        labels, classes = classify([name.partition("/")[2] for name in names], str(tars[0]))
    read = lambda i: open_picture(io.BytesIO(pictures[names[i]].read()))  # noqa: E731
    sizes = [pictures[name].size for name in names]
    return Source(names, labels, classes, read, sizes, dict(ignored), faults=faults)


def _of_files(
    names: list[str], files: dict[str, Member], field: str | None
) -> tuple[np.ndarray, tuple[str, ...], dict[int, str]]:
    """Labels (len,) and classes, and the pictures without a class with the reason. Raises ValueError where all are without."""
    values, faults = list[int | str](), dict[int, str]()
    for i, name in enumerate(names):
        try:
            values.append(_value(name, files, field))
        except ValueError as error:
            faults[i] = f"no label: {str(error).removesuffix(f'; {REMEDY}')}"
            if len(faults) == len(names):
                raise
    kept = [i for i in range(len(names)) if i not in faults]
    labels = np.zeros(len(names), dtype=np.int64)
    labels[kept], classes = _labels([names[i] for i in kept], values)
    return labels, classes, faults


def _key(name: str) -> str:
    head, slash, last = name.rpartition("/")
    return head + slash + last.partition(".")[0]


def _value(name: str, files: dict[str, Member], field: str | None) -> int | str:
    """The class of a picture, as it is written. Raises ValueError where there is none."""
    tar, _, inside = name.partition("/")
    key = f"{tar}/{_key(inside)}"
    if field is None and (found := files.get(key + CLASS)):
        text = found.read().decode("utf-8", "replace").strip()
        if not text or not text.isprintable():
            raise ValueError(f"{printable(key)}{CLASS} holds no class: {text!r:.60}; {REMEDY}")
        return int(text) if text.isdecimal() and len(text) < 10 else text
    if (found := files.get(key + FIELDS)) is None:
        raise ValueError(f"{printable(name)} has no class in {CLASS} or {FIELDS} of its key; {REMEDY}")
    try:
        content = json.loads(found.read())
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


def _labels(names: list[str], values: list[int | str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels (len,) int64 and class names; integers are the labels themselves."""
    numbers = [value for value in values if isinstance(value, int)]
    if numbers and len(numbers) < len(values):
        k = next(i for i, value in enumerate(values) if isinstance(value, str))
        raise ValueError(
            f"{printable(names[k])} is of class {values[k]!r:.60}, others are numbered; write all in one way"
        )
    if not numbers:
        classes = sorted({str(value) for value in values})
        index = {name: i for i, name in enumerate(classes)}
        return np.array([index[str(value)] for value in values], dtype=np.int64), tuple(classes)
    wrong = next((i for i, value in enumerate(numbers) if not 0 <= value < MAX_CLASSES), None)
    if wrong is not None:
        raise ValueError(f"{printable(names[wrong])} is of class {numbers[wrong]}; classes are 0 to {MAX_CLASSES - 1}")
    labels = np.array(numbers, dtype=np.int64)
    return labels, tuple(str(i) for i in range(int(labels.max(initial=-1)) + 1))
