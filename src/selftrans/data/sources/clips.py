"""Sounds or videos of a source ⇒ samples of one shape.

They are files of a folder, a zip, a tar or a folder of tars, found by their extension. In each of them the first folder of a
name is its class, and without folders there are no classes. Archives are not extracted: a file in them is read as a whole into
memory when it is opened. Shape legend: (C, *S) sample: (1, L) sound, (1, B, T) spectrogram of it, (C, F, H, W) video.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from selftrans.data.sources.decode import STANDARD, BadSample, Reading
from selftrans.data.sources.file_kinds import ARRAYS, PICTURES, SOUNDS, VIDEOS, junk_name
from selftrans.data.sources.folder import empty_classes, files_like, folder_entries, walk
from selftrans.data.sources.label_file import given_labels
from selftrans.data.sources.source import FileSamples, Source, in_class_folders
from selftrans.data.sources.splits import split_files, split_folder, warn_of_splits
from selftrans.data.sources.tar_archive import tar_entries, walk_tar
from selftrans.data.sources.zip_archive import open_zip, zip_entries
from selftrans.encoders.media import Media, rounded
from selftrans.messages import first_line, printable
from selftrans.plain_json import Option

MEASURED = 1000  #: clips from which mean and deviation are computed, spread evenly over the source
TARS = "*.tar"
GIF = ".gif"  #: a video with --frames, a picture without
KNOWN = PICTURES | SOUNDS | VIDEOS

Kind = Literal["sounds", "videos", "pictures", "arrays"]


@dataclass(frozen=True)
class MediaOptions:
    """How sounds and videos are read; None: the default that `selftrans prepare --help` names."""

    audio: Literal["waveform", "mel"] | None = None
    rate: int | None = None  #: samples per second
    length: float | None = None  #: seconds
    bins: int | None = None  #: mel bands
    hop: int | None = None  #: samples between two frames of a spectrogram
    frames: int | None = None  #: of a video

    def given(self) -> dict[str, Option]:
        """The options that were set, by name."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def refuse(self, what: str, *names: str) -> None:
        """Raise ValueError when one of these options (none: any) was set; `what`: the data that they do not apply to."""
        for name in self.given():
            if name in names or not names:
                raise ValueError(f"--{name} does not apply to {what}; leave it out")


@dataclass(frozen=True, eq=False)
class Clips(FileSamples):
    """Sounds or videos of one shape; made by `Clips.of`."""

    media: Media  #: what the samples are; not yet normalised
    remarks: tuple[str, ...] = ()  #: sentences on what is cut or padded

    def normalised(self) -> Media:
        """The kind of data, with the shift and scale that give zero mean and unit variance."""
        total, squares, count = 0.0, 0.0, 0
        for i in np.unique(np.linspace(0, len(self) - 1, min(len(self), MEASURED)).astype(int)):
            try:
                values = self.read(int(i)).astype(np.float64)
            except BadSample:  # reported when it is prepared
                continue
            total, squares, count = total + values.sum(), squares + (values**2).sum(), count + values.size
        mean = total / max(1, count)
        deviation = math.sqrt(max(0.0, squares / max(1, count) - mean**2))
        numbers: Any = {"shift": rounded(mean), "scale": rounded(1 / deviation) if deviation > 1e-6 else 1.0}
        return replace(self.media, **numbers)


@contextmanager
def importing(module: str, what: str) -> Iterator[None]:
    """For an import of a module of the extra `media`, which reads `what`: ValueError with the command that installs it."""
    try:
        yield
    except (ImportError, OSError) as error:  # OSError: a system library is missing
        raise ValueError(
            f"{what} are read by {module}, which cannot be imported ({first_line(error, 100)}): pip install 'selftrans[media]'"
        ) from error


def open_clips(
    source: str | Path,
    options: MediaOptions,
    resolution: Any = None,
    progress: bool = False,
    *,
    archives: bool = True,
    split: str | None = None,
    reading: Reading = STANDARD,
) -> Clips | None:
    """Open a folder, zip or tar of sounds or videos (see `kind_of`, also for `archives`); None for any other source.

    `split` names a part of it. `reading` is used for empty class folders, the file of labels, the limit of pixels and grey.
    Raises ValueError for a source with several kinds, options of another kind, and clips that need an option.
    """
    from selftrans.data.sources import audio, video

    root = Path(source)
    kind = kind_of(root, options.frames, archives=archives)
    if kind not in ("sounds", "videos"):
        options.refuse(f"{source}, which holds no sounds or videos")
        return None
    files = open_files(root, kind, options.frames, split, reading)
    if kind == "sounds":
        options.refuse("sounds", "frames")
        if given := next((name for name, value in (("resolution", resolution), ("grey", reading.grey)) if value), None):
            raise ValueError(f"--{given} does not apply to sounds; leave it out")
        return audio.open_sounds(files, root, options, progress)
    options.refuse("videos", "audio", "rate", "length", "bins", "hop")
    return video.open_videos(files, root, options, resolution, reading)


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
    if suffix in ARRAYS:
        return "arrays"
    return "videos" if suffix in VIDEOS or (suffix == GIF and frames is not None) else "pictures"


def open_files(
    path: Path,
    kind: Kind,
    frames: int | None,
    split: str | None = None,
    reading: Reading = STANDARD,
    known: Collection[str] = KNOWN,
) -> Source:
    """The files of a source of this kind, with their labels; its `open` returns a file. `split` and `reading` as in
    `open_source`, `known`: extensions of the files that are read.

    Raises ValueError for a source of several kinds, and for a class folder without files unless they are allowed; in a zip
    such folders are only counted as ignored.
    """
    if path.is_file() and path.suffix.lower() == ".zip":
        found = zip_entries(path, known, split)
    elif path.is_file():
        found = tar_entries([path], known, split)
    elif next(walk(path, known, Counter()), None) is None and (tars := files_like(path, TARS)):
        found = tar_entries(split_files(tars, split, str(path)), known)
    else:
        path = split_folder(path, split)
        found = folder_entries(path, known)
        if reading.labels is None:
            found = found._replace(empty=empty_classes(path, found.names, kind, reading.allow_empty))
    for name in found.names:
        if (other := _kind(name, frames)) != kind:
            remedy = "keep one kind in a source"
            if frames is None and {kind, other} == {"videos", "pictures"}:
                remedy += " (gifs are videos with --frames)"
            raise ValueError(f"{path} holds {kind} and {other}, such as {printable(name)}; {remedy}")
    source = replace(found.pictures(), open=found.open)
    if reading.labels is not None:
        return given_labels(source, reading.labels, reading.label_column)
    source = in_class_folders(source, found, str(path), kind, allow_empty=reading.allow_empty)
    warn_of_splits(found.names, source.classes, str(path))
    return source
