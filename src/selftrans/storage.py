"""Files on disk: atomic writes, locks, hashes, and text from files made safe for a terminal. Each exists once, here.

A temporary file or directory lies next to its target and is called `.<target>.<writer>.tmp`: hidden, and on the same file
system, so that the rename is atomic. Folders may be untrusted: nothing is written through a symbolic link in them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

MAKE_ROOM = "make room or choose another folder"


# ---- atomic writes


def temporary_for(path: Path, writer: object = None) -> Path:
    """Where `path` is written before it is renamed. `writer` (None: pid and a random number) tells concurrent writers apart."""
    return path.with_name(f".{path.name}.{f'{os.getpid()}-{secrets.token_hex(4)}' if writer is None else writer}.tmp")


@contextmanager
def atomic_write(
    path: Path, *, writer: object = None, durable: bool = True, remedy: str = MAKE_ROOM
) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` when the block ends; after an error it is removed, and `path` stays as it was.

    Args:
        writer: a name that no concurrent writer of `path` has, such as a rank: what an earlier process of this name left
            behind is then replaced. None: a name that is never used again; see `remove_stale_temporaries`.
        durable: wait until the file is on the disk before it is renamed. False is for many small files that are checked
            when they are read.
        remedy: the end of the error message.
    Raises ValueError in one line that names `path` where it cannot be written.
    """
    temporary = temporary_for(path, writer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as file:  # exclusive: never through a symbolic link
                yield file
            if durable:
                sync(temporary)
            temporary.replace(path)
            if durable:
                sync(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror or error}); {remedy}") from error


def write_text(path: Path, text: str, *, writer: object = None, remedy: str = MAKE_ROOM) -> None:
    """Write `text` in UTF-8 as `atomic_write` does. A file that holds it already is left alone, which needs no space."""
    if not path.is_symlink() and path.is_file() and path.read_bytes() == text.encode():
        return
    with atomic_write(path, writer=writer, remedy=remedy) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented json; see `write_text`."""
    write_text(path, json.dumps(value, indent=2))


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new directory that takes the place of `path` when the block ends, with all that was written into it.

    After an error it is removed, and `path` stays as it was. `replace` removes a `path` that exists and is not empty.
    Raises OSError where the disk refuses, or `path` is occupied.
    """
    temporary = temporary_for(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            sync(written)
        if replace:
            _remove(path)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        _remove(temporary)
        raise


def remove_stale_temporaries(folder: Path, *targets: str) -> None:
    """Remove the temporaries that killed processes left in `folder`, of targets that match the patterns (none: of all).

    Only for a process that holds the lock under which these targets are written. Symbolic links are removed, not followed.
    """
    if folder.is_symlink():
        return
    for target in targets or ("*",):
        for path in folder.glob(f".{target}.*.tmp"):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a file, a directory or a symbolic link, as far as the disk lets us."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk; no error on a file system that cannot wait."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # not every system lets a directory be opened
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# ---- opening and locking


def no_symlink(path: str, flags: int) -> int:
    """For `open(..., opener=no_symlink)`: OSError where `path` is a symbolic link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


class InUse(ValueError):
    """Another process holds the lock of a folder."""


@contextmanager
def lock_file(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock `path` of its folder, which is made if need be. The system releases it however the process ends.

    An exclusive lock holds the process id of its owner. `shared` excludes exclusive locks alone; `wait` waits for others.
    On a file system without locks a warning is all that happens.
    Raises InUse where another process has the lock, ValueError where `path` cannot be opened or is a symbolic link.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", errors="replace", opener=no_symlink)  # noqa: SIM115 - held for the whole block below
    except OSError as error:
        raise ValueError(f"{path} cannot be opened ({error.strerror}); remove it, or choose another --out") from error
    with file:
        try:
            _flock(file, shared=shared, wait=wait)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read(20).strip()
            raise InUse(
                f"{path.parent} is in use by process {owner if owner.isdecimal() else '?'}; wait for it, or choose another "
                "--out"
            ) from error
        except (OSError, ImportError) as error:
            reason = getattr(error, "strerror", None) or "no locks on this system"
            warnings.warn(
                f"{path.parent} cannot be locked ({reason}): make sure that no second process uses it", stacklevel=3
            )
        if not shared:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def _flock(file: Any, *, shared: bool, wait: bool) -> None:
    import fcntl  # not on Windows, where the package can still be imported

    fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


# ---- hashes, text


def sha256_file(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def printable(text: object, limit: int | None = 160) -> str:
    """Text from a file, at most `limit` characters, that cannot command a terminal: if need be in escapes, on one line."""
    cut = str(text)[:limit]
    return cut if cut.isprintable() else ascii(cut)[1:-1][:limit]


def first_line(error: object, limit: int = 160) -> str:
    """The first line of an error's message, without its full stop, for a message of one line; its kind where it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = " ".join(lines[:2] if lines[0].rstrip().endswith(":") else lines[:1])  # a line that announces the next
    return printable(" ".join(text.split()).rstrip("."), limit)
