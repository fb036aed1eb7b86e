"""Files on disk: atomic writes, locks, hashes.

A temporary file or directory is next to its target and is called `.<target>.<writer>.tmp`: hidden, and on the same file
system, so that the rename is atomic. Folders may be untrusted: never write through symbolic links in them.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import platform
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from selftrans.messages import check_utf8, gigabytes

#: this machine, in names of temporary files: the locks of a file system may hold on one machine only
MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
DAY = 24 * 3600  #: seconds
FREE_SPACE = "free disk space or choose another folder"
REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}  #: errors of a folder without permission to write


# ---- atomic writes


def temporary_for(path: Path, writer: object = None) -> Path:
    """The path under which `path` is written before the rename. `writer` is in its name (None: machine, pid, random number)."""
    writer = f"{MACHINE}-{os.getpid()}-{secrets.token_hex(4)}" if writer is None else writer
    return path.with_name(f".{path.name}.{writer}.tmp")


@contextmanager
def atomic_write(
    path: Path, *, writer: object = None, durable: bool = True, remedy: str = FREE_SPACE
) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` when the block ends. After an error it is removed, and `path` is unchanged.

    Args:
        writer: a name that no concurrent writer of `path` has, such as a rank: a temporary file that an earlier process with
            this name left is replaced. None: a name that is never used again; see `remove_stale_temporaries`.
        durable: wait until the file is on disk before the rename. False is for many small files that are checked
            when read.
        remedy: the end of the error message.
    Raises ValueError, in one line that names `path`, when it cannot be written.
    """
    temporary = temporary_for(path, writer)
    try:
        with _new_parents_removed(path):
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
        remedy = remedy.removeprefix("free disk space or ") if error.errno in REFUSED else remedy
        raise ValueError(f"{path} cannot be written ({error.strerror or error}); {remedy}") from error


@contextmanager
def _new_parents_removed(path: Path) -> Iterator[list[Path]]:
    """The folders above `path` that do not exist yet. After an error in the block, those that are empty are removed."""
    new = list(itertools.takewhile(lambda folder: not os.path.exists(folder), path.parents))
    try:
        yield new
    except BaseException:
        for folder in new:
            with suppress(OSError):
                folder.rmdir()
        raise


def write_text(path: Path, text: str, *, remedy: str = FREE_SPACE) -> None:
    """Write `text` in UTF-8 as `atomic_write` does. A file with this content is not written again: that needs no disk space."""
    if not path.is_symlink() and path.is_file() and path.read_bytes() == text.encode():
        return
    with atomic_write(path, remedy=remedy) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented json; see `write_text`."""
    write_text(path, json.dumps(value, indent=2))


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def check_writable(path: Path, *, size: int = 1 << 16) -> None:
    """ValueError where permissions or free space do not allow a file of `size` bytes at `path`. Nothing is written."""
    folder = nearest_existing(path.absolute().parent)
    why = "it is a folder" if path.is_dir() else None if folder.is_dir() else f"{folder} is not a folder"
    if why is None and not os.access(folder, os.W_OK | os.X_OK):
        why = f"{folder} does not allow it"
    if why is not None:
        raise ValueError(f"{path} cannot be written ({why}); choose another path")
    if (free := shutil.disk_usage(folder).free) < size:
        raise ValueError(f"{path} cannot be written ({gigabytes(free)} free, {gigabytes(size)} needed); {FREE_SPACE}")


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new directory that replaces `path` when the block ends.

    After an error it is removed, and `path` is unchanged. `replace` removes a `path` that exists and is not empty. Errors
    name `path`, not the temporary directory. What a killed process left of an earlier call is removed. Raises OSError when it
    cannot be written, or `path` is not empty and `replace` is False.
    """
    temporary = temporary_for(path)
    with _new_parents_removed(path):
        try:
            temporary.mkdir(parents=True)
            with ExitStack() as held:
                with suppress(OSError, ImportError):  # without locks no other process removes it
                    held.enter_context(directory_lock(temporary))
                _remove_abandoned(path)
                yield temporary
                for written in (*temporary.rglob("*"), temporary):
                    sync(written)
                _put(temporary, path, replace=replace)
                sync(path.parent)
        except BaseException as error:
            _remove(temporary)
            _rename_in(error, temporary, path)
            raise


def _put(temporary: Path, path: Path, *, replace: bool) -> None:
    """Rename a directory to `path`. What `replace` replaces is removed last, so that `path` is never half removed."""
    earlier = temporary_for(path)
    if replace and os.path.lexists(path):
        path.rename(earlier)
    try:
        temporary.replace(path)
    except BaseException:
        if os.path.lexists(earlier):
            earlier.rename(path)
        raise
    _remove(earlier)


@contextmanager
def directory_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a directory, which shows that its writer runs.

    OSError or ImportError where another process holds it, and on a system without locks.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary directories of `path` whose writers have ended without removing them, which a lock tells."""
    temporary = re.compile(rf"\.{re.escape(path.name)}\.([0-9a-f]{{8}}-)?\d+-[0-9a-f]{{8}}\.tmp")  # earlier: no machine
    for each in [each for each in path.parent.iterdir() if temporary.fullmatch(each.name)]:
        if each.is_dir() and not each.is_symlink() and not _may_be_written(each):
            with suppress(OSError, ImportError), directory_lock(each):  # in use, or no locks, so that it is not known
                _remove(each)


def _may_be_written(temporary: Path) -> bool:
    """Whether a process of another machine may be writing a temporary file or directory: it was changed within a day."""
    writer = re.search(r"\.([0-9a-f]{8})-\d+-[0-9a-f]{8}\.tmp$", temporary.name)
    if writer is None or writer[1] == MACHINE:
        return False
    changed = [os.lstat(each).st_mtime for each in (temporary, *temporary.rglob("*")) if os.path.lexists(each)]
    return time.time() - max(changed, default=0) < DAY


def _rename_in(error: BaseException, temporary: Path, path: Path) -> None:
    """Give `path` in an error for the temporary name in it, which means nothing to a user."""
    error.args = tuple(arg.replace(str(temporary), str(path)) if isinstance(arg, str) else arg for arg in error.args)
    if isinstance(error, OSError) and isinstance(error.filename, str):
        error.filename = error.filename.replace(str(temporary), str(path))


def remove_stale_temporaries(folder: Path, *targets: str, shared: bool = False) -> None:
    """Remove the temporary files that killed processes left in `folder`, for targets that match the patterns (none: all).

    The caller must hold the lock under which these targets are written. `shared`: other machines, on which it may not hold,
    write them, too; theirs are removed a day after the last change. Symbolic links are removed, not followed.
    """
    if folder.is_symlink():
        return
    for target in targets or ("*",):
        for path in folder.glob(f".{target}.*.tmp"):
            if not (shared and _may_be_written(path)):
                _remove(path)


def _remove(path: Path) -> None:
    """Remove a file, a directory or a symbolic link; errors are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk; no error on a file system without fsync."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # some systems cannot open a directory
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
    """For `open(..., opener=no_symlink)`: OSError when `path` is a symbolic link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


class InUse(ValueError):
    """Another process holds the lock of a folder."""


@contextmanager
def lock_file(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`; its folder is created if needed. The system releases the lock however the process ends.

    The file of an exclusive lock holds the process id of its owner. A `shared` lock excludes only exclusive ones. `wait`
    waits until the lock is free. On a file system without locks there is only a warning. After an error in the block a
    folder that was created is removed, if nothing else is in it.
    Raises InUse when another process holds the lock, ValueError when `path` cannot be opened or is a symbolic link.
    """
    with _new_parents_removed(path) as new, _open_lock(path) as file:
        removed = False
        try:
            flock(file.fileno(), shared=shared, wait=wait)
            # its owner may have removed the file (`removed_if_refused`), and a third process may hold the lock of a new one
            removed = not _is_at(file.fileno(), path)
            if removed and not wait:
                raise BlockingIOError
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
        if not removed:
            if not shared:
                with suppress(OSError):  # a full disk: the lock holds without the number
                    os.ftruncate(file.fileno(), 0)
                    os.write(file.fileno(), str(os.getpid()).encode())
            try:
                yield
            except BaseException:
                with suppress(OSError):
                    if new and not shared and os.listdir(path.parent) == [path.name]:
                        path.unlink()
                raise
            return
    with lock_file(path, shared=shared, wait=True):  # the new file is waited for, too
        yield


def _open_lock(path: Path) -> TextIO:
    """A lock file, opened, in a folder that is created if needed. ValueError where that is not possible."""
    check_utf8(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise ValueError(f"{path.parent} is not a folder; choose another --out") from error
        raise ValueError(f"the folder {path.parent} cannot be made ({error.strerror}); choose another --out") from error
    try:
        return open(path, "a+", errors="replace", opener=no_symlink)
    except OSError as error:
        remove = "remove it, or " if os.path.lexists(path) and error.errno != errno.EROFS else ""
        raise ValueError(f"{path} cannot be opened ({error.strerror}); {remove}choose another --out") from error


def flock(descriptor: int, *, shared: bool = False, wait: bool = False, release: bool = False) -> None:
    """Lock an open file, or release it. BlockingIOError where another holds the lock, unless `wait`; ImportError on Windows."""
    import fcntl  # not on Windows, where the package can still be imported

    kind = fcntl.LOCK_UN if release else fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    fcntl.flock(descriptor, kind | (0 if wait or release else fcntl.LOCK_NB))


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


@contextmanager
def removed_if_refused(new: Sequence[Path], *, keep: Path) -> Iterator[None]:
    """After an error, remove files and folders that a call has made, unless the file `keep` exists by then.

    Otherwise the next command in this folder could be refused because of what a refused command left there. `new` lists the
    paths that did not exist before the call; the caller holds the lock that excludes other writers.
    """
    try:
        yield
    except BaseException:
        for path in () if keep.exists() else new:
            _remove(path)
        raise


def sha256_file(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
