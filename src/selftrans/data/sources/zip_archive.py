"""Pictures, sounds and videos in a zip: entry names are checked before any entry is read, and nothing is extracted."""

from __future__ import annotations

import io
import stat
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from selftrans.data.sources import label_file
from selftrans.data.sources.decode import fault_of
from selftrans.data.sources.file_kinds import PICTURES, ArchiveJunk, file_kind
from selftrans.data.sources.source import MAX_PICTURE_BYTES, Entries, LabelFile, Source, in_class_folders, parts_inside
from selftrans.data.sources.splits import class_root
from selftrans.messages import printable


def zip_file(path: Path, split: str | None = None, *, allow_empty: bool = False) -> Source:
    """A zip of class folders, or of pictures only. One top-level folder may enclose two or more class folders.

    Labels may be in `dataset.json` instead (see `label_file`). `split` names a folder with one split. With `allow_empty` a
    folder without pictures is a class.

    Raises ValueError for absolute names, names with `..`, symbolic links, encrypted or duplicate entries, and pictures
    whose claimed size is above `MAX_PICTURE_BYTES`.
    """
    files = zip_entries(path, PICTURES, split)
    source = files.pictures()
    if labels := label_file.labelled(source, files.labels):
        return labels
    return in_class_folders(source, files, str(path), allow_empty=allow_empty)


def zip_entries(path: Path, suffixes: Collection[str], split: str | None = None) -> Entries:
    """The entries of a split with one of these suffixes; each is read as a whole when it is opened.

    Raises ValueError as `zip_file`.
    """
    archive = open_zip(path)
    ignored: Counter[str] = Counter()
    entries: dict[str, zipfile.ZipInfo] = {}
    archived, folders = ArchiveJunk(ignored), set[str]()
    label_files = dict[str, zipfile.ZipInfo]()  #: folder, ending in `/` -> its `dataset.json`
    tables = list[tuple[str, Callable[[int], bytes]]]()

    def head(info: zipfile.ZipInfo, most: int) -> bytes:
        with archive.open(info) as file:
            return file.read(most)

    for info in archive.infolist():
        parts = _checked_parts(info, path)
        if archived.ignores(parts):
            continue
        folders.add("/".join(parts[: None if info.is_dir() else -1]))
        if info.is_dir():
            continue
        if (suffix := PurePosixPath(parts[-1]).suffix.lower()) not in suffixes:
            ignored[file_kind(parts[-1])] += 1
            if parts[-1] == label_file.NAME and len(parts) <= 3:
                label_files["/".join([*parts[:-1], ""])] = info
            elif suffix in label_file.SUFFIXES:
                tables.append((suffix, partial(head, info)))
        elif (name := "/".join(parts)) in entries:
            raise ValueError(f"{path} holds {printable(name)} twice; make the zip again")
        else:
            entries[name] = info
    top = class_root(list(entries), split, str(path))
    names = sorted(name for name in entries if name.startswith(top))
    infos = [entries[name] for name in names]
    lock = threading.Lock()  # ZipFile counts its readers without one

    def open_entry(i: int) -> BinaryIO:
        with lock, archive.open(infos[i]) as file:
            # never read more than the claimed size, whatever the compressed stream expands to
            return io.BytesIO(file.read(infos[i].file_size))

    # labels: of the split's own folder first, then of those around it; without a split of the zip, then of a folder in it
    of = [each for each in label_files if top.startswith(each) or (split is None and each.count("/") == 1)]
    labels = [
        LabelFile(f"{each}{label_file.NAME} in {path}", partial(head, label_files[each]), partial(_below, each))
        for each in sorted(of, key=len, reverse=split is not None)
    ]
    below = partial(_below, top)
    classes = {name.split("/", 1)[0] for name in map(below, names) if "/" in name}
    found = {below(folder).split("/", 1)[0] for folder in folders if folder.startswith(top)}
    empty = sorted(found - classes - {""}) if classes else []
    sizes = [info.file_size for info in infos]
    return Entries(names, sizes, open_entry, dict(ignored), below, empty, labels, tables)


def _below(folder: str, name: str) -> str:
    """A name from this folder, which ends in `/`, on."""
    return name.removeprefix(folder)


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip file and read its directory. Raises ValueError when that fails."""
    remedy = "it is incomplete, damaged, or of another kind: download or make it again"
    with fault_of(path, "is not a readable zip", remedy):
        return zipfile.ZipFile(path)


def _checked_parts(info: zipfile.ZipInfo, path: Path) -> list[str]:
    """The parts of an entry's name. Raises ValueError for an unsafe entry."""
    parts = parts_inside(info.filename)
    if not parts:
        raise ValueError(f"{path} holds the name {info.filename!r}, which leads out of it; do not trust this zip")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise ValueError(f"{path} holds the symbolic link {info.filename!r}; make the zip of the files themselves")
    if info.flag_bits & 1:
        raise ValueError(f"{path} is encrypted ({info.filename!r}); make one without a password")
    if info.file_size > MAX_PICTURE_BYTES:
        raise ValueError(
            f"{path} claims that {info.filename!r} expands to {info.file_size} bytes; such a zip is refused"
        )
    return parts
