"""Pictures, sounds and videos in a zip: entry names are checked before any entry is read, and nothing is extracted."""

from __future__ import annotations

import io
import stat
import threading
import zipfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from selftrans.data.sources.decode import EXTENSIONS, open_picture
from selftrans.data.sources.source import HIDDEN, OTHER, Entries, Source, classify, is_hidden
from selftrans.storage import printable

if TYPE_CHECKING:
    from PIL import Image

MAX_PICTURE_BYTES = 1 << 29  #: entries that claim a larger size are refused


def zip_file(path: Path) -> Source:
    """A zip of class folders, or of pictures only. One top-level folder may enclose two or more class folders.

    Raises ValueError for absolute names, names with `..`, symbolic links, encrypted or duplicate entries, and pictures
    whose claimed size is above `MAX_PICTURE_BYTES`.
    """
    found = zip_entries(path, EXTENSIONS)
    labels, classes = classify(without_top(found.names), str(path))

    def open_entry(i: int) -> Image.Image:
        return open_picture(found.open(i))

    return Source(found.names, labels, classes, open_entry, found.sizes, found.ignored)


def zip_entries(path: Path, suffixes: Collection[str]) -> Entries:
    """The entries with one of these suffixes; each is read as a whole when it is opened. Raises ValueError as `zip_file`."""
    archive = open_zip(path)
    ignored: Counter[str] = Counter()
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        parts = _checked_parts(info, path)
        if info.is_dir():
            continue
        if any(is_hidden(part) for part in parts):
            ignored[HIDDEN] += 1
        elif PurePosixPath(parts[-1]).suffix.lower() not in suffixes:
            ignored[OTHER] += 1
        elif (name := "/".join(parts)) in entries:
            raise ValueError(f"{path} holds {printable(name)} twice; make the zip again")
        else:
            entries[name] = info
    names = sorted(entries)
    infos = [entries[name] for name in names]
    lock = threading.Lock()  # ZipFile counts its readers without one

    def open_entry(i: int) -> BinaryIO:
        with lock, archive.open(infos[i]) as file:
            # never read more than the claimed size, whatever the compressed stream expands to
            return io.BytesIO(file.read(infos[i].file_size))

    return Entries(names, [info.file_size for info in infos], open_entry, dict(ignored))


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip file and read its directory. Raises ValueError when that fails."""
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # for a damaged directory zipfile raises more than BadZipFile
        raise ValueError(f"{path} is not a folder, a parquet file or a readable zip ({error})") from error


def _checked_parts(info: zipfile.ZipInfo, path: Path) -> list[str]:
    """The parts of an entry's name. Raises ValueError for an unsafe entry."""
    name = info.filename.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or not parts or ":" in parts[0]:
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


def without_top(names: list[str]) -> list[str]:
    """The names without their top-level folder, if there is only one and it holds two or more folders and no file."""
    split = [name.split("/", 2) for name in names]
    below = {tuple(parts[:2]) for parts in split}
    if all(len(parts) == 3 for parts in split) and len({top for top, _ in below}) == 1 and len(below) > 1:
        return ["/".join(parts[1:]) for parts in split]
    return names
