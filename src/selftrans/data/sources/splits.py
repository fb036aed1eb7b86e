"""Folders and files named after splits (train, val, test): one is read on request; warns where they would become classes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from selftrans.messages import printable

NAMES = "(train|training|val|valid|validation|dev|eval|test|testing)"
SPLIT = re.compile(NAMES + r"([-_]?(set|data|split)|\d{4})?", re.I)
FILE_SPLIT = re.compile(NAMES + r"(?=[-_.\d]|$)", re.I)


def is_split(name: str) -> bool:
    """Whether a folder is named as splits are: train, val, test2017."""
    return SPLIT.fullmatch(name) is not None


def split_folder(root: Path, split: str | None) -> Path:
    """The folder of a split in `root`, or `root` when no split is asked for, or it has none.

    Raises ValueError for a split that is not among those it has.
    """
    if split is None:
        return root
    chosen = root / split
    if split in ("", ".", "..") or "/" in split or "\\" in split:
        raise ValueError(f"split {split!r} is not the name of a folder in {root}")
    if chosen.is_dir() and not chosen.is_symlink():
        return chosen
    _without_split(split, (path.name for path in root.iterdir() if path.is_dir() and is_split(path.name)), str(root))
    return root


def class_root(names: Sequence[str], split: str | None, where: str) -> str:
    """The folder of an archive, ending in `/`, in which the class folders are; "": the archive itself.

    That of the split, which may be below one folder that encloses all. Without one, a folder that encloses two or more folders
    and no file. Raises ValueError for a split that is not among those the archive has.
    """
    tops = {name.split("/", 1)[0] for name in names}
    only = f"{next(iter(tops))}/" if len(tops) == 1 else ""
    if split is not None:
        outer = "" if split in tops else only
        if any(name.startswith(f"{outer}{split}/") for name in names):
            return f"{outer}{split}/"
        below = {name.removeprefix(outer).split("/", 1)[0] for name in names if "/" in name.removeprefix(outer)}
        _without_split(split, filter(is_split, below), where)
    parts = [name.split("/", 2) for name in names] if only else []
    return only if all(len(part) == 3 for part in parts) and len({part[1] for part in parts}) > 1 else ""


def split_files(files: Sequence[Path], split: str | None, where: str) -> list[Path]:
    """Of files such as train-00000-of-00002.parquet those of a split; None: all, with a warning if they are of several.

    Raises ValueError for a split that is not among those they have.
    """
    of = {file: match[1] for file in files if (match := FILE_SPLIT.match(file.name))}
    found = sorted({*of.values()})
    if split is None:
        if len(found) > 1:
            warnings.warn(
                f"{where} holds files of the splits {', '.join(found)}, and all are read; give --split {found[0]} to read one",
                stacklevel=5,
            )
        return list(files)
    chosen = [file for file in files if of.get(file) == split or file.stem == split]
    if not chosen:
        _without_split(split, found, where)
    return chosen or list(files)


def warn_of_splits(names: Sequence[str], classes: Sequence[str], where: str) -> None:
    """Warn when all classes, or without classes all folders of these names, are splits."""
    tops = sorted({name.split("/", 1)[0] for name in names if "/" in name}) if not classes else list(classes)
    if not tops or not all(map(is_split, tops)) or (not classes and len(tops) < 2):
        return
    below = sorted({match[1] for name in names if (match := re.search(rf"(?:^|/){re.escape(tops[0])}/([^/]+)/", name))})
    inside = f" ({tops[0]} has the folders {', '.join(map(printable, below[:3]))})" if below else ""
    what = f"the classes of {where} are {', '.join(tops)}" if classes else f"{where} holds {', '.join(tops)}, all read"
    warnings.warn(
        f"{what}, which look like splits{inside}; give --split {tops[0]} to read one of them",
        stacklevel=5,
    )


def _without_split(split: str, others: Iterable[str], where: str) -> None:
    """Raise ValueError for a split that is not among the `others` of a source; warn where it has none at all."""
    if found := sorted(others):
        raise ValueError(f"{where} has no split {split!r}; it has {', '.join(map(printable, found))}")
    warnings.warn(f"split {split!r} is ignored: {where} has no folders or files of splits", stacklevel=5)
