"""Tar files, read in place, nothing is extracted: their members, and pictures with classes as webdataset writes them.

`key.jpg` has its class in `key.cls`, or in a field of `key.json`. A key is a path up to the first dot of its last part.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from selftrans.data.sources.decode import fault_of
from selftrans.data.sources.file_kinds import PICTURES, ArchiveJunk, file_kind
from selftrans.data.sources.labelling import Label, numbered
from selftrans.data.sources.source import MAX_PICTURE_BYTES, Entries, Source, in_class_folders, parts_inside
from selftrans.data.sources.splits import class_root
from selftrans.messages import first_line, printable

CLASS, FIELDS = ".cls", ".json"
FIELD_NAMES = ("label", "labels", "cls", "class")  #: of a .json; the first that it has counts
MAX_LABEL_BYTES = {CLASS: 1 << 12, FIELDS: 1 << 20}
WHERE = f"the {CLASS} or {FIELDS} of its key"


def tar_entries(tars: list[Path], suffixes: Collection[str], split: str | None = None) -> Entries:
    """The members of tar files with one of these suffixes, each named `TAR/member`; with `split`, those in its folder.

    Raises ValueError for compressed or truncated files, unsafe or duplicate names, links, sparse members, and sizes above
    `MAX_PICTURE_BYTES`.
    """
    ignored: Counter[str] = Counter()
    members: dict[str, tuple[Path, int, int]] = {}  #: name -> tar, offset and bytes
    for path in tars:
        for name, info in walk_tar(path, suffixes, ignored):
            if info.size > MAX_PICTURE_BYTES:
                raise ValueError(
                    f"{path} holds {info.name!r:.200} of {info.size} bytes, above the limit of {MAX_PICTURE_BYTES}"
                )
            if (inside := f"{path.name}/{name}") in members:
                raise ValueError(f"{path} holds {printable(inside)} twice; make the tar again")
            members[inside] = path, info.offset_data, info.size

    def in_tar(name: str) -> str:
        return name.partition("/")[2]

    top = class_root(list(map(in_tar, members)), split, str(tars[0]))
    names = sorted(name for name in members if in_tar(name).startswith(top))

    def read(i: int) -> BinaryIO:
        path, offset, size = members[names[i]]
        with open(path, "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    sizes = [members[name][2] for name in names]
    return Entries(names, sizes, read, dict(ignored), lambda name: in_tar(name).removeprefix(top))


def walk_tar(path: Path, suffixes: Collection[str], ignored: Counter[str]) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The members of one tar file with one of these suffixes, in its order; others are counted in `ignored`.

    Raises ValueError, in one line, for whatever is wrong with the file.
    """
    archived = ArchiveJunk(ignored)
    with fault_of(path, "is not a complete tar file", "decompress or make it again"):
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                name = _checked(info, path)
                if info.isdir():
                    continue
                if archived.ignores(name.split("/")):
                    pass
                elif PurePosixPath(name).suffix.lower() not in suffixes:
                    ignored[file_kind(name)] += 1
                else:
                    yield name, info
                tar.members.clear()  # type: ignore[attr-defined] # otherwise it keeps every header
            end = tar.offset
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise ValueError(f"it ends, or is damaged, at byte {end}")


def _checked(info: tarfile.TarInfo, path: Path) -> str:
    """The name of a member, with `/`. Raises ValueError for an unsafe member."""
    parts = parts_inside(info.name)
    if parts is None:
        raise ValueError(f"{path} holds the name {info.name!r:.200}, which leads out of it; do not trust this tar")
    if info.size < 0:  # the next member would be looked for before this one
        raise ValueError(f"{path} holds {info.name!r:.200} of {info.size} bytes; do not trust this tar")
    if not (info.isdir() or info.isreg()) or info.issparse():
        raise ValueError(
            f"{path} holds {info.name!r:.200}, which is a link, a device or sparse; make the tar of plain files"
        )
    return "/".join(parts)


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
    one, for a class of another kind, and as `tar_entries` does.
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
        return in_class_folders(source, chosen, str(tars[0]))

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
