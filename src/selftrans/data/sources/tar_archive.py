"""Pictures with captions in tar files, as webdataset writes them, and sounds and videos: members are read in place, nothing is
extracted.

A sample with captions is the members of one key: `key.jpg` with `key.txt`, `key.caption` or `key.json`.
"""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from selftrans.data.sources.captions import CAPTION_FILES, MAX_FILE_BYTES, combine, with_captions
from selftrans.data.sources.decode import open_picture
from selftrans.data.sources.file_kinds import PICTURES, ArchiveJunk, file_kind
from selftrans.data.sources.source import Entries, Source
from selftrans.data.sources.zip_archive import MAX_PICTURE_BYTES
from selftrans.storage import first_line, printable


class Member(NamedTuple):
    """Where the data of a member are."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def tar_files(tars: list[Path]) -> Source:
    """Samples of tar files, each named `TAR/key.jpg`.

    Raises ValueError for compressed or truncated files, unsafe or double names, links, sparse members, and sizes above
    `MAX_PICTURE_BYTES` (pictures) and `MAX_FILE_BYTES` (captions).
    """
    ignored: Counter[str] = Counter()
    pictures: dict[str, Member] = {}
    files: dict[str, Member] = {}
    for path in tars:
        for name, info in walk_tar(path, {*PICTURES, *CAPTION_FILES}, ignored):
            if PurePosixPath(name).suffix.lower() in PICTURES:
                add_member(pictures, f"{path.name}/{name}", info, path, MAX_PICTURE_BYTES)
            else:
                add_member(files, f"{path.name}/{name}", info, path, MAX_FILE_BYTES)
    pairs = list(combine(pictures, files, Member.read))
    names = [name for name, _ in pairs]
    sizes = [(pictures.get(name) or files[name]).size for name in names]
    read = lambda i: open_picture(io.BytesIO(pictures[names[i]].read()))  # noqa: E731
    source = Source(names, np.zeros(len(names), dtype=np.int64), (), read, sizes, dict(ignored))
    return with_captions(source, (captions for _, captions in pairs))


def tar_entries(tars: list[Path], suffixes: Collection[str]) -> Entries:
    """The members of tar files with one of these suffixes, each named `TAR/member`. Raises ValueError as `tar_files`."""
    ignored: Counter[str] = Counter()
    members: dict[str, Member] = {}
    for path in tars:
        for name, info in walk_tar(path, suffixes, ignored):
            add_member(members, f"{path.name}/{name}", info, path, MAX_PICTURE_BYTES)
    names = sorted(members)
    files = [members[name] for name in names]
    return Entries(names, [file.size for file in files], lambda i: io.BytesIO(files[i].read()), dict(ignored))


def walk_tar(path: Path, suffixes: Collection[str], ignored: Counter[str]) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The members of one tar file with one of these suffixes, in its order; others are counted in `ignored`.

    Raises ValueError, in one line, for whatever is wrong with the file.
    """
    try:
        archived = ArchiveJunk(ignored)
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
    except Exception as error:  # tarfile raises more than TarError for malicious headers
        if str(error).startswith(str(path)):
            raise
        raise ValueError(
            f"{path} is not a complete tar file ({first_line(error)}); decompress or make it again"
        ) from error


def add_member(members: dict[str, Member], name: str, info: tarfile.TarInfo, path: Path, most: int) -> None:
    """Note where a member is. Raises ValueError for one of more than `most` bytes, and for a second one of its name."""
    if info.size > most:
        raise ValueError(f"{path} holds {info.name!r:.200} of {info.size} bytes, above the limit of {most}")
    if name in members:
        raise ValueError(f"{path} holds {printable(name)} twice; make the tar again")
    members[name] = Member(path, info.offset_data, info.size)


def _checked(info: tarfile.TarInfo, path: Path) -> str:
    """The name of a member, with `/`. Raises ValueError for an unsafe member."""
    name = info.name.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or (parts and ":" in parts[0]):
        raise ValueError(f"{path} holds the name {info.name!r:.200}, which leads out of it; do not trust this tar")
    if info.size < 0:  # the next member would be looked for before this one
        raise ValueError(f"{path} holds {info.name!r:.200} of {info.size} bytes; do not trust this tar")
    if not (info.isdir() or info.isreg()) or info.issparse():
        raise ValueError(
            f"{path} holds {info.name!r:.200}, which is a link, a device or sparse; make the tar of plain files"
        )
    return "/".join(parts)
