"""Pictures in a folder: class folders, or pictures only. Symbolic links that lead out of the folder are refused."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from selftrans.data.sources.decode import SizedFile
from selftrans.data.sources.file_kinds import PICTURES, SOUNDS, VIDEOS, describe_ignored, file_kind, junk_name
from selftrans.data.sources.label_file import NAME, SUFFIXES, labelled
from selftrans.data.sources.source import Entries, LabelFile, Source, in_class_folders
from selftrans.data.sources.table_file import first_bytes
from selftrans.messages import printable

LINKS, SPECIAL = "symbolic links to folders", "broken links, pipes and devices"


def folder(root: Path, *, is_split: bool = False, allow_empty: bool = False) -> Source:
    """A folder of class folders, or of pictures, or with labels in `dataset.json` (see `label_file`). With `allow_empty` a
    folder without pictures is a class. `is_split`: the `dataset.json` of the folder around it counts, too.

    Symbolic links to files inside the folder are followed. Raises ValueError for a link that leads out of it, for a
    class folder without pictures, for pictures next to class folders, and for sounds or videos next to pictures.
    """
    found = folder_entries(root, PICTURES | SOUNDS | VIDEOS)
    pictures = [i for i, name in enumerate(found.names) if PurePosixPath(name).suffix.lower() in PICTURES]
    if 0 < len(pictures) < len(found.names):
        other = next(name for name in found.names if PurePosixPath(name).suffix.lower() not in PICTURES)
        raise ValueError(f"{root} holds pictures and {printable(other)}; keep one kind of file in a folder")
    if not pictures:
        found.ignored.update(Counter(file_kind(name) for name in found.names))
    chosen, own, outer = found.chosen(pictures), root / NAME, root.parent / NAME
    source = chosen.pictures()
    files = [LabelFile(str(own), partial(first_bytes, own))] if own.is_file() else []
    if is_split and outer.is_file():
        files.append(LabelFile(str(outer), partial(first_bytes, outer), lambda name: f"{root.name}/{name}"))
    if labels := labelled(source, files):
        return labels
    chosen = chosen._replace(empty=empty_classes(root, chosen.names, "pictures", allow_empty))
    return in_class_folders(source, chosen, str(root), allow_empty=allow_empty)


def folder_entries(root: Path, suffixes: Collection[str]) -> Entries:
    """The files at any depth of a folder with one of these suffixes. ValueError for a link that leads out of the folder."""
    ignored: Counter[str] = Counter()
    of_tables = tuple({*SUFFIXES} - {*suffixes})
    found, tables = list[tuple[str, int]](), list[str]()
    for name, size in sorted(walk(root, {*suffixes, *SUFFIXES}, ignored)):
        if name.lower().endswith(of_tables):
            tables.append(name)
        else:
            found.append((name, size))
    ignored.update(map(file_kind, tables))
    names, sizes = [name for name, _ in found], [size for _, size in found]
    others = [root / name for name in tables if "/" not in name and name != NAME]
    heads = [(path.suffix.lower(), partial(first_bytes, path)) for path in others]
    return Entries(names, sizes, lambda i: SizedFile.open(root / names[i]), dict(ignored), tables=heads)


def check_link(root: Path, name: str) -> None:
    """Raise ValueError when the path `name` in a folder leads out of it through a symbolic link."""
    try:
        inside = (root / name).resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # links that lead in a circle: nothing is read through them
        return
    if not inside:
        raise ValueError(f"{printable(name)} in {root} is a symbolic link out of the folder; copy its target there")


def files_like(folder: Path, pattern: str) -> list[Path]:
    """The files directly in `folder` whose name has this pattern, sorted; hidden ones are ignored.

    Raises ValueError for a symbolic link that leads out of the folder.
    """
    files = sorted(path for path in folder.glob(pattern) if junk_name(path.name) is None)
    for file in files:
        check_link(folder, file.name)
    return files


def empty_classes(root: Path, names: Collection[str], unit: str, allowed: bool = False) -> list[str]:
    """The class folders in `root` that hold none of the files `names`. Raises ValueError for one unless that is `allowed`."""
    classes = {name.split("/", 1)[0] for name in names if "/" in name}
    if not classes:
        return []
    with os.scandir(root) as entries:
        folders = [e for e in entries if e.name not in classes and junk_name(e.name) is None and _is_folder(e)]
    empty = sorted(entry.name for entry in folders if not (allowed and entry.is_symlink()))
    if empty and not allowed:
        inside: Counter[str] = Counter()
        if not (root / empty[0]).is_symlink():
            list(walk(root / empty[0], (), inside))
        held = f" ({describe_ignored(inside)})" if inside else ""
        if (root / empty[0]).is_symlink():
            held = " (it is a symbolic link to a folder, which is not followed)"
        raise ValueError(
            f"class folder {empty[0]!r} of {root} holds no {unit.removesuffix('s')}{held}; fill it, remove it, or keep it as a "
            "class without data by --allow-empty"
        )
    return empty


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one; not a link that leads in a circle."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def walk(root: Path, suffixes: Collection[str], ignored: Counter[str], below: str = "") -> Iterator[tuple[str, int]]:
    """(path below the root, bytes) of each file with one of these suffixes; others are counted in `ignored`.

    `below`: a folder in the root, ending in `/`, to which this is limited. Raises ValueError for a symbolic link that leads
    out of the root.
    """
    try:
        with os.scandir(root / below) as scan:
            entries = list(scan)
    except OSError as error:
        raise ValueError(f"cannot list {root / below}: {error.strerror}") from error
    for entry in entries:
        name = below + entry.name
        junk = junk_name(entry.name)
        if entry.is_symlink() and junk is None:
            check_link(root, name)
        if junk is not None:
            ignored[junk] += 1
        elif entry.is_symlink() and not Path(entry.path).exists():  # broken, or in a circle
            ignored[SPECIAL] += 1
        elif entry.is_dir(follow_symlinks=False):
            yield from walk(root, suffixes, ignored, name + "/")
        elif entry.is_dir():
            ignored[LINKS] += 1
        elif not entry.is_file():
            ignored[SPECIAL] += 1
        elif PurePosixPath(name).suffix.lower() not in suffixes:
            ignored[file_kind(entry.name)] += 1
        else:
            yield name, entry.stat().st_size
