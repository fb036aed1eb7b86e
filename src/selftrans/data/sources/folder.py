"""Pictures in a folder: class folders, or pictures only. Symbolic links that lead out of the folder are refused."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from selftrans.data.sources.decode import EXTENSIONS, SOUNDS, VIDEOS, open_picture
from selftrans.data.sources.source import HIDDEN, OTHER, Source, classify, is_hidden
from selftrans.storage import printable

LINKS, SPECIAL = "symbolic links to folders", "broken links, pipes and devices"


def folder(root: Path) -> Source:
    """A folder of class folders, or of pictures.

    Symbolic links to files inside the folder are followed. Raises ValueError for a link that leads out of it, for a
    class folder without pictures, for pictures next to class folders, and for sounds or videos next to pictures.
    """
    ignored: Counter[str] = Counter()
    files = sorted(walk(root, EXTENSIONS | SOUNDS | VIDEOS, ignored))
    pictures = [(name, size) for name, size in files if PurePosixPath(name).suffix.lower() in EXTENSIONS]
    if 0 < len(pictures) < len(files):
        other = next(name for name, _ in files if PurePosixPath(name).suffix.lower() not in EXTENSIONS)
        raise ValueError(f"{root} holds pictures and {printable(other)}; keep one kind of file in a folder")
    if len(files) > len(pictures):
        ignored[OTHER] += len(files)
    names = [name for name, _ in pictures]
    labels, classes = classify(names, str(root))
    if classes:
        check_classes(root, classes, "pictures")
    return Source(
        names, labels, classes, lambda i: open_picture(root / names[i]), [size for _, size in pictures], dict(ignored)
    )


def check_link(path: Path, root: Path, name: str) -> None:
    """Raise ValueError when `path` leads out of the folder `root` (a path without links) through a symbolic link."""
    if not path.resolve().is_relative_to(root):
        raise ValueError(f"{printable(name)} in {root} is a symbolic link out of the folder; copy its target there")


def check_classes(root: Path, classes: Collection[str], unit: str) -> None:
    """Raise ValueError when a folder in `root` is not among the classes, since it holds none of these files."""
    with os.scandir(root) as entries:
        empty = sorted(e.name for e in entries if e.is_dir() and not is_hidden(e.name) and e.name not in classes)
    if empty:
        raise ValueError(f"class folder {empty[0]!r} of {root} holds no {unit.removesuffix('s')}; fill it or remove it")


def walk(root: Path, suffixes: Collection[str], ignored: Counter[str]) -> Iterator[tuple[str, int]]:
    """(path below the root, bytes) of each file with one of these suffixes; others are counted in `ignored`.

    Raises ValueError for a symbolic link that leads out of the folder.
    """
    return _walk(root, root.resolve(), "", suffixes, ignored)


def _walk(
    directory: Path, root: Path, prefix: str, suffixes: Collection[str], ignored: Counter[str]
) -> Iterator[tuple[str, int]]:
    try:
        with os.scandir(directory) as scan:
            entries = list(scan)
    except OSError as error:
        raise ValueError(f"cannot list {directory}: {error.strerror}") from error
    for entry in entries:
        name = prefix + entry.name
        if entry.is_symlink() and not is_hidden(entry.name):
            check_link(Path(entry.path), root, name)
        if is_hidden(entry.name):
            ignored[HIDDEN] += 1
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), root, name + "/", suffixes, ignored)
        elif entry.is_dir():
            ignored[LINKS] += 1
        elif not entry.is_file():
            ignored[SPECIAL] += 1
        elif PurePosixPath(name).suffix.lower() not in suffixes:
            ignored[OTHER] += 1
        else:
            yield name, entry.stat().st_size
