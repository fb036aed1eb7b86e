"""Pictures, sounds and videos in a zip: entry names are checked before any entry is read, and nothing is extracted."""

from __future__ import annotations

import contextlib
import io
import stat
import threading
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from selftrans.data.sources import label_file
from selftrans.data.sources.decode import fault_of
from selftrans.data.sources.file_kinds import PICTURES, ArchiveJunk, file_kind
from selftrans.data.sources.source import MAX_PICTURE_BYTES, Entries, Source, in_class_folders, parts_inside
from selftrans.data.sources.splits import class_root
from selftrans.data.sources.table_file import MAX_BYTES, text_of
from selftrans.messages import printable


def zip_file(path: Path, split: str | None = None, *, allow_empty: bool = False) -> Source:
    """A zip of class folders, or of pictures only. One top-level folder may enclose two or more class folders.

    Labels may be in `dataset.json` instead (see `label_file`). `split` names a folder with one split. With `allow_empty` a
    folder without pictures is a class.

    Raises ValueError for absolute names, names with `..`, symbolic links, encrypted or duplicate entries, and pictures
    whose claimed size is above `MAX_PICTURE_BYTES`.
    """
    listed = zip_entries(path, PICTURES, split)
    source = replace(listed.files.pictures(), tables=lambda most: _tables(listed, most))
    for folder in listed.label_folders(split):
        where, names = f"{folder}{label_file.NAME} in {path}", [name.removeprefix(folder) for name in source.names]
        read = partial(_read, listed.archive, listed.label_files[folder])
        if labelled := label_file.labelled(source, read, where, names):
            return labelled
    if listed.empty and not allow_empty:
        source.ignored["class folders without pictures"] = len(listed.empty)
    return in_class_folders(source, listed.files.heads, str(path), also=listed.empty if allow_empty else ())


class ZipEntries(NamedTuple):
    """Files of one kind in a zip."""

    archive: zipfile.ZipFile
    files: Entries
    top: str  #: the folder that the class folders are in, see `class_root`
    empty: list[str]  #: class folders that hold none of them
    label_files: dict[str, zipfile.ZipInfo]  #: folder, ending in `/` -> its `dataset.json`
    tables: list[zipfile.ZipInfo]  #: other files that may hold labels

    def label_folders(self, split: str | None) -> list[str]:
        """The folders whose `dataset.json` may label the files: the split's own first, then those around it; without a split
        the zip, then a folder in it."""
        of = [f for f in self.label_files if self.top.startswith(f) or (split is None and f.count("/") == 1)]
        return sorted(of, key=len, reverse=split is not None)


def zip_entries(path: Path, suffixes: Collection[str], split: str | None = None) -> ZipEntries:
    """The entries of a split with one of these suffixes; each is read as a whole when it is opened.

    Raises ValueError as `zip_file`.
    """
    archive = open_zip(path)
    ignored: Counter[str] = Counter()
    entries: dict[str, zipfile.ZipInfo] = {}
    archived, folders = ArchiveJunk(ignored), set[str]()
    label_files, tables = dict[str, zipfile.ZipInfo](), list[zipfile.ZipInfo]()
    for info in archive.infolist():
        parts = _checked_parts(info, path)
        if archived.ignores(parts):
            continue
        folders.add("/".join(parts[: None if info.is_dir() else -1]))
        if info.is_dir():
            continue
        if PurePosixPath(parts[-1]).suffix.lower() not in suffixes:
            ignored[file_kind(parts[-1])] += 1
            if parts[-1] == label_file.NAME and len(parts) <= 3:
                label_files["/".join([*parts[:-1], ""])] = info
            elif PurePosixPath(parts[-1]).suffix.lower() in label_file.SUFFIXES:
                tables.append(info)
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

    sizes = [info.file_size for info in infos]
    files = Entries(names, sizes, open_entry, dict(ignored), lambda name: name.removeprefix(top))
    classes = {head.split("/", 1)[0] for head in files.heads if "/" in head}
    below = {folder.removeprefix(top).split("/", 1)[0] for folder in folders if folder.startswith(top)}
    return ZipEntries(archive, files, top, sorted(below - classes - {""}) if classes else [], label_files, tables)


def _tables(listed: ZipEntries, most: int) -> Iterator[tuple[str, bytes]]:
    """Extension and first bytes of each file that may hold labels; those that cannot be read are left out."""
    for info in listed.tables:
        with contextlib.suppress(Exception), listed.archive.open(info) as file:  # the type depends on the damage
            yield PurePosixPath(info.filename).suffix.lower(), file.read(most)


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> str:
    """The text of a file of labels. Raises ValueError as `text_of`, and what zipfile raises."""
    with archive.open(info) as file:
        return text_of(file.read(MAX_BYTES + 1))


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
