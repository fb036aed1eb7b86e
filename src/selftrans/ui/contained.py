"""Files of a folder that may be untrusted: opened for reading only, never through a symbolic link, never outside it."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from selftrans.messages import first_line, printable

Kind = TypeVar("Kind", dict, list)
JSON_BYTES = 16 << 20  #: of the largest json that is read
_PLAIN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class Contained(NamedTuple):
    """A file or folder below a root, by the names of the path from there."""

    root: Path  #: resolved; given by the user
    parts: tuple[str, ...] = ()

    def __truediv__(self, name: str) -> Contained:
        return Contained(self.root, (*self.parts, name))

    @property
    def path(self) -> Path:
        return self.root.joinpath(*self.parts)

    def open(self) -> BinaryIO:
        """The file, for reading. OSError where it is missing, no regular file, or reached through a symbolic link."""
        descriptor = self._descriptor()
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(f"{printable(self.path)} is no regular file")
        return open(descriptor, "rb")

    def read(self, most: int) -> bytes:
        """Its content. OSError as `open`, and where it has more than `most` bytes."""
        with self.open() as file:
            if os.fstat(file.fileno()).st_size > most:
                raise OSError(f"{printable(self.path)} has more than {most:,} bytes")
            return file.read(most)

    def stamp(self) -> tuple[int, int, int] | None:
        """(inode, bytes, time of change), which tell versions apart; None where there is no file, or a symbolic link."""
        if any(_unsafe(part) for part in self.parts):
            return None
        try:
            about = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return None
        return None if stat.S_ISLNK(about.st_mode) else (about.st_ino, about.st_size, about.st_mtime_ns)

    def entries(self) -> Iterator[os.DirEntry[str]]:
        """Entries of the folder by name, without hidden ones and symbolic links; none if there is no folder."""
        try:
            if not self.inside():
                return
            with os.scandir(self.path) as listed:
                found = [each for each in listed if not each.name.startswith(".") and not each.is_symlink()]
        except OSError:
            return
        yield from sorted(found, key=lambda each: each.name)

    def folders(self) -> list[str]:
        """Names of the folders in it."""
        return [each.name for each in self.entries() if each.is_dir(follow_symlinks=False)]

    def inside(self) -> bool:
        """Whether no part of its path is a symbolic link."""
        return os.path.realpath(self.path) == str(self.path)

    def _descriptor(self) -> int:
        if not self.parts or any(_unsafe(part) for part in self.parts):
            raise OSError(f"{printable(self.path)} is not a path of a file")
        at = os.open(self.root, _PLAIN | os.O_DIRECTORY)
        try:
            for name in self.parts[:-1]:
                below = os.open(name, _PLAIN | os.O_DIRECTORY, dir_fd=at)
                os.close(at)
                at = below
            return os.open(self.parts[-1], _PLAIN | os.O_NONBLOCK, dir_fd=at)  # a fifo must not block the page
        finally:
            os.close(at)


def _unsafe(name: str) -> bool:
    return name in ("", ".", "..") or "/" in name or "\0" in name


class JsonFiles:
    """Json files, parsed once for each version of the file."""

    def __init__(self) -> None:
        self._known: dict[Contained, tuple[Any, Any, str | None]] = {}

    def read(self, file: Contained, kind: type = dict) -> tuple[Any, str | None]:
        """(content, None), (None, None) where there is no such file, or (None, what is wrong with it in one line)."""
        stamp = file.stamp()
        if stamp is None:
            self._known.pop(file, None)
            return None, None
        known = self._known.get(file)
        if known is None or known[0] != stamp:
            known = self._known[file] = (stamp, *_parsed(file, kind))
        return known[1], known[2]

    def keep(self, folders: Collection[Contained]) -> None:
        """Forget the files that are in none of these folders."""
        for file in list(self._known):
            if Contained(file.root, file.parts[:-1]) not in folders:
                self._known.pop(file, None)


def _parsed(file: Contained, kind: type) -> tuple[Any, str | None]:
    name = printable("/".join(file.parts[-2:]))
    try:
        found = json.loads(file.read(JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        return None, f"{name} cannot be read ({first_line(error)})"
    if not isinstance(found, kind):
        return None, f"{name} does not hold what selftrans writes"
    return found, None


def plain(value: Any, depth: int = 12) -> Any:
    """A value of a json file as strict json: numbers that are not finite, and what is nested too deeply, become null."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None  # false for NaN
    if isinstance(value, dict):
        return {str(k): plain(v, depth - 1) for k, v in value.items()} if depth else None
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(each, depth - 1) for each in value] if depth else None
    return value if value is None or isinstance(value, str | bool | int) else str(value)


def part(content: Any, name: str, kind: type[Kind]) -> Kind:
    """An entry of a json object; an empty one where it is missing or of another type."""
    found = content.get(name) if isinstance(content, dict) else None
    return found if isinstance(found, kind) else kind()


def number(value: Any) -> float | None:
    """A finite number, or None."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308  # false for NaN
    return float(value) if known else None
