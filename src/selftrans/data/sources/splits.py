"""Folders and files named after splits (train, val, test): one is read on request; warns where they would become classes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
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
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and is_split(path.name))
    if folders:
        raise ValueError(f"{root} has no split {split!r}; it has {', '.join(map(printable, folders))}")
    _warn_of_no_splits(str(root), split)
    return root


def split_names(names: Sequence[str], split: str | None, where: str) -> list[str]:
    """The names, inside an archive, of a split: `split/...`, also below one folder that encloses all; None: all names.

    Raises ValueError for a split that is not among those it has.
    """
    if split is None:
        return list(names)
    tops = {name.split("/", 1)[0] for name in names}
    prefix = f"{next(iter(tops))}/" if len(tops) == 1 and split not in tops else ""
    chosen = [name for name in names if name.startswith(f"{prefix}{split}/")]
    if chosen:
        return chosen
    inside = {name.removeprefix(prefix).split("/", 1)[0] for name in names if "/" in name.removeprefix(prefix)}
    if any(map(is_split, inside)):
        found = ", ".join(printable(name) for name in sorted(inside) if is_split(name))
        raise ValueError(f"{where} has no split {split!r}; it has {found}")
    _warn_of_no_splits(where, split)
    return list(names)


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
    if chosen:
        return chosen
    if found:
        raise ValueError(f"{where} has no split {split!r}; it has {', '.join(found)}")
    _warn_of_no_splits(where, split)
    return list(files)


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


def _warn_of_no_splits(where: str, split: str) -> None:
    warnings.warn(f"split {split!r} is ignored: {where} has no folders or files of splits", stacklevel=5)
