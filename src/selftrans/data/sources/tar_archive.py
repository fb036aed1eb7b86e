"""Members of tar files, read in place: nothing is extracted."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from selftrans.data.sources.file_kinds import ArchiveJunk, file_kind
from selftrans.data.sources.source import MAX_PICTURE_BYTES, Entries, parts_inside
from selftrans.data.sources.splits import class_root
from selftrans.messages import first_line, printable


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
    inside = {name: name.partition("/")[2] for name in members}
    top = class_root([*inside.values()], split, str(tars[0]))
    names = sorted(name for name in members if inside[name].startswith(top))
    heads = [inside[name].removeprefix(top) for name in names]

    def read(i: int) -> BinaryIO:
        path, offset, size = members[names[i]]
        with open(path, "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    return Entries(names, heads, [members[name][2] for name in names], read, dict(ignored))


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
