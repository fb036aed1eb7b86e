"""Where sounds and videos are: a folder, a zip, a tar file or a folder of tar files; found by their extension.

In each of them the first folder of a name is its class, and without folders there are no classes. Archives are not extracted:
a file in them is read as a whole into memory when it is opened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal

from selftrans.data.sources.decode import STANDARD, Reading
from selftrans.data.sources.file_kinds import PICTURES, SOUNDS, VIDEOS, junk_name
from selftrans.data.sources.folder import empty_classes, files_like, folder_entries, walk
from selftrans.data.sources.label_file import given_labels
from selftrans.data.sources.source import Source, classify
from selftrans.data.sources.splits import split_files, split_folder, warn_of_splits
from selftrans.data.sources.tar_archive import tar_entries, walk_tar
from selftrans.data.sources.zip_archive import open_zip, zip_entries
from selftrans.messages import printable

TARS = "*.tar"
GIF = ".gif"  #: a video with --frames, a picture without
KNOWN = PICTURES | SOUNDS | VIDEOS

Kind = Literal["sounds", "videos", "pictures"]


def kind_of(path: Path, frames: int | None, *, archives: bool = True) -> Kind | None:
    """The kind of files in a folder, zip or tar: that of the first known file; a zip with any pictures is one of pictures.

    frames: the option for videos, which makes a gif a video. archives: False ignores files in archives: with captions they
    are pictures. None without known files and for any other source. Raises ValueError for an archive that cannot be read.
    """
    kinds = (_kind(name, frames) for name in _known(path, archives))
    first = next(kinds, None)
    return "pictures" if path.suffix.lower() == ".zip" and "pictures" in kinds else first


def _known(path: Path, archives: bool) -> Iterator[str]:
    """Names of the known files of a folder and, if `archives`, of a zip or of tars; entries of a zip are not checked."""
    suffix, tars = path.suffix.lower() if archives and path.is_file() else "", list[Path]()
    if path.is_dir():
        yield from (name for name, _ in walk(path, KNOWN, Counter()))
        tars = files_like(path, TARS) if archives else []
    elif suffix == ".tar":
        tars = [path]
    elif suffix == ".zip":
        for info in open_zip(path).infolist():
            junk = any(junk_name(part) is not None for part in info.filename.split("/"))
            if not junk and PurePosixPath(info.filename).suffix.lower() in KNOWN:
                yield info.filename
    for tar in tars:
        yield from (name for name, _ in walk_tar(tar, KNOWN, Counter()))


def _kind(name: str, frames: int | None) -> Kind:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in SOUNDS:
        return "sounds"
    return "videos" if suffix in VIDEOS or (suffix == GIF and frames) else "pictures"


def open_files(
    path: Path, kind: Kind, frames: int | None, split: str | None = None, reading: Reading = STANDARD
) -> Source:
    """The files of a source of this kind, with their labels; its `open` returns a file. `split` and `reading` as in
    `open_source`.

    Raises ValueError for a source of several kinds, and for a class folder without files unless they are allowed; in a zip
    such folders are only counted as ignored.
    """
    empty: list[str] = []  #: class folders without files; tars have none
    if path.is_file() and path.suffix.lower() == ".zip":
        listed = zip_entries(path, KNOWN, split)
        found, empty = listed.files, listed.empty
    elif path.is_file():
        found = tar_entries([path], KNOWN, split)
    elif next(walk(path, KNOWN, Counter()), None) is None:
        found = tar_entries(split_files(files_like(path, TARS), split, str(path)), KNOWN)
    else:
        path = split_folder(path, split)
        found = folder_entries(path, KNOWN)
        if reading.labels is None:
            empty = empty_classes(path, found.names, kind, reading.allow_empty)
    for name in found.names:
        if (other := _kind(name, frames)) != kind:
            raise ValueError(f"{path} holds {kind} and {other}, such as {printable(name)}; keep one kind in a source")
    source = replace(found.pictures(), open=found.open)
    if reading.labels is not None:
        return given_labels(source, reading.labels)
    if empty and not reading.allow_empty:
        source.ignored[f"class folders without {kind}"] = len(empty)
    labels, classes = classify(found.heads, str(path), kind, empty if reading.allow_empty else ())
    warn_of_splits(found.names, classes, str(path))
    return replace(source, labels=labels, classes=classes)
