"""Where sounds and videos are: a folder, a zip, a tar file or a folder of tar files; found by their extension.

In each of them the first folder of a name is its class, and without folders there are no classes. Of archives nothing is
extracted: a file is read as a whole into memory when it is opened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

from selftrans.data.sources.decode import EXTENSIONS, SOUNDS, VIDEOS, BoundedFile
from selftrans.data.sources.folder import check_classes, check_link, walk
from selftrans.data.sources.source import Entries, Source, classify, is_hidden
from selftrans.data.sources.tar_archive import tar_entries, walk_tar
from selftrans.data.sources.zip_archive import open_zip, without_top, zip_entries
from selftrans.storage import printable

GIF = ".gif"  #: a video with --frames, a picture without
KNOWN = EXTENSIONS | SOUNDS | VIDEOS

Kind = Literal["sounds", "videos", "pictures"]


@dataclass(frozen=True, eq=False)
class ClipFiles:
    """Sounds, or videos, of one source."""

    where: Path  #: the source, for messages
    source: Source  #: names, labels and classes; its pictures are not there
    open: Callable[[int], BinaryIO] = field(repr=False)  #: file i, to be closed; safe from any thread

    @property
    def names(self) -> list[str]:
        return list(self.source.names)

    def __len__(self) -> int:
        return len(self.source)


def kind_of(path: Path, frames: int | None, *, archives: bool = True) -> Kind | None:
    """What a folder, zip or tar holds: of a folder or tar what the first known file is, of a zip pictures, if it has any.

    None without known files, for any other source, and unless `archives` for what is in archives (with captions, those are of
    pictures). Raises ValueError for an archive that cannot be read.
    """
    tars: list[Path] = []
    if path.is_dir():
        first = next((name for name, _ in walk(path, KNOWN, Counter())), None)
        if first is not None or not archives:
            return None if first is None else _kind(first, frames)
        tars = _tars(path)
    suffix = path.suffix.lower() if archives and path.is_file() else ""
    tars = [path] if suffix == ".tar" else tars
    if suffix == ".zip":
        kinds: set[Kind] = set()
        for name in _in_zip(path):
            kinds.add(_kind(name, frames))
            if "pictures" in kinds:  # in most zips the first
                return "pictures"
        return min(kinds, default=None)
    first = next((name for tar in tars for name, _ in walk_tar(tar, KNOWN, Counter())), None)
    return None if first is None else _kind(first, frames)


def _in_zip(path: Path) -> Iterator[str]:
    """Names of the known files in a zip, which is not checked for anything: only its directory is read."""
    for info in open_zip(path).infolist():
        hidden = any(is_hidden(part) for part in info.filename.split("/"))
        if not hidden and PurePosixPath(info.filename).suffix.lower() in KNOWN:
            yield info.filename


def _tars(folder: Path) -> list[Path]:
    """The tar files in a folder. Raises ValueError for a link that leads out of it."""
    tars = sorted(folder.glob("*.tar"))
    for file in tars:
        check_link(file, folder.resolve(), file.name)
    return tars


def _kind(name: str, frames: int | None) -> Kind:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in SOUNDS:
        return "sounds"
    return "videos" if suffix in VIDEOS or (suffix == GIF and frames) else "pictures"


def open_files(path: Path, kind: Kind, frames: int | None) -> ClipFiles:
    """The files of a source of this kind, with their labels. Raises ValueError for a source of several kinds."""
    tars = [path] if path.is_file() and path.suffix.lower() == ".tar" else []
    if path.is_file():
        found = tar_entries(tars, KNOWN) if tars else zip_entries(path, KNOWN)
    else:
        found = _in_folder(path)
        tars = [] if found.names else _tars(path)
        found = tar_entries(tars, KNOWN) if tars else found
    for name in found.names:
        if (other := _kind(name, frames)) != kind:
            raise ValueError(f"{path} holds {kind} and {other}, such as {printable(name)}; keep one kind in a source")
    inside = [name.partition("/")[2] for name in found.names] if tars else found.names  # without the name of the tar
    labels, classes = classify(without_top(inside) if path.is_file() else inside, str(path), kind)
    if classes and path.is_dir() and not tars:
        check_classes(path, classes, kind)
    return ClipFiles(path, Source(found.names, labels, classes, _unused, found.sizes, dict(found.ignored)), found.open)


def _in_folder(root: Path) -> Entries:
    ignored: Counter[str] = Counter()
    found = sorted(walk(root, KNOWN, ignored))
    names = [name for name, _ in found]
    return Entries(names, [size for _, size in found], lambda i: BoundedFile(root / names[i]), dict(ignored))


def _unused(i: int) -> Any:
    raise AssertionError("clips are read by `Clips.read`")
