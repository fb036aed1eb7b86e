"""Files that are written whole or not at all: beside their place first, then renamed into it.

A folder may come from a stranger: nothing is written through a symbolic link that lies in it.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_beside(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a new file and put it in the place of `path`; what was there stays until it is whole.

    Raises ValueError where the disk refuses, in one line that names the file.
    """
    neighbour = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            neighbour.unlink(missing_ok=True)  # of a killed process; a link there is not followed
            with neighbour.open("xb") as file:
                write(file)
            sync(neighbour)
            neighbour.replace(path)
            sync(path.parent)
        except BaseException:
            neighbour.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); make room or choose another folder") from error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; not where a file system knows no such waiting."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def line(error: object) -> str:
    """The beginning of what an error says of a stranger's file, in one line that any terminal takes."""
    text = " ".join((str(error) or type(error).__name__).split())[:160]
    return text if text.isprintable() else ascii(text)[1:-1]


def no_link(path: str, flags: int) -> int:
    """For `open(..., opener=no_link)`: OSError where `path` is a symbolic link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def write_text(path: Path, text: str) -> None:
    """`text` in UTF-8. What is there already, to the letter, is left alone: it needs no room and cannot be lost."""
    if not path.is_symlink() and path.is_file() and path.read_bytes() == text.encode():
        return
    write_beside(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """`value` as indented json."""
    write_text(path, json.dumps(value, indent=2))
