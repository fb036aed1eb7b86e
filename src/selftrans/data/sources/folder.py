"""Pictures in folders and zips, and arrays in npz: names are judged before anything is read, nothing is extracted.

Shape legend: (n, R, R, C) images.
"""

from __future__ import annotations

import io
import math
import os
import stat
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

import numpy as np

from selftrans.data.sources.decode import EXTENSIONS, open_picture, shown
from selftrans.data.sources.source import Source, classify

if TYPE_CHECKING:
    from PIL import Image

MAX_PICTURE_BYTES = 1 << 29  #: no picture file is larger; zip entries that claim to be are refused
HIDDEN, OTHER = "hidden or system files", "files that are no pictures"
LINKS, STRANGE = "symbolic links to folders", "broken links, pipes and devices"


def folder(root: Path) -> Source:
    """A folder of class folders, or of pictures.

    Symbolic links to files inside the folder are followed. Raises ValueError for one that leads out of it, for a
    class folder without pictures, and for pictures beside class folders.
    """
    ignored: Counter[str] = Counter()
    found = sorted(_walk(root, root.resolve(), "", ignored))
    names = [name for name, _ in found]
    labels, classes = classify(names, str(root))
    if classes:
        with os.scandir(root) as entries:
            empty = sorted(e.name for e in entries if e.is_dir() and not _hidden(e.name) and e.name not in classes)
        if empty:
            raise ValueError(f"class folder {empty[0]!r} of {root} holds no picture; fill it or remove it")
    return Source(
        names, labels, classes, lambda i: open_picture(root / names[i]), [size for _, size in found], dict(ignored)
    )


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX")) or name.lower() in ("thumbs.db", "desktop.ini")


def check_link(path: Path, root: Path, name: str) -> None:
    """Raise ValueError where `path` leads out of the folder `root` (a path without links), by a symbolic link."""
    if not path.resolve().is_relative_to(root):
        raise ValueError(f"{shown(name)} in {root} is a symbolic link out of the folder; copy its target there")


def _walk(directory: Path, root: Path, prefix: str, ignored: Counter[str]) -> Iterator[tuple[str, int]]:
    """(path below the root, bytes) of each picture."""
    try:
        with os.scandir(directory) as scan:
            entries = list(scan)
    except OSError as error:
        raise ValueError(f"cannot list {directory}: {error.strerror}") from error
    for entry in entries:
        name = prefix + entry.name
        if entry.is_symlink() and not _hidden(entry.name):
            check_link(Path(entry.path), root, name)
        if _hidden(entry.name):
            ignored[HIDDEN] += 1
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), root, name + "/", ignored)
        elif entry.is_dir():
            ignored[LINKS] += 1
        elif not entry.is_file():
            ignored[STRANGE] += 1
        elif PurePosixPath(name).suffix.lower() not in EXTENSIONS:
            ignored[OTHER] += 1
        else:
            yield name, entry.stat().st_size


def zip_file(path: Path) -> Source:
    """A zip of class folders (one folder that holds two or more of them, and nothing else, may enclose them), or of
    pictures.

    Raises ValueError for names that are absolute or climb (`..`), symbolic links, encrypted or doubled entries, and
    pictures said to be larger than `MAX_PICTURE_BYTES`.
    """
    archive = _open_zip(path)
    ignored: Counter[str] = Counter()
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        parts = _checked_parts(info, path)
        if info.is_dir():
            continue
        if any(_hidden(part) for part in parts):
            ignored[HIDDEN] += 1
        elif PurePosixPath(parts[-1]).suffix.lower() not in EXTENSIONS:
            ignored[OTHER] += 1
        elif (name := "/".join(parts)) in entries:
            raise ValueError(f"{path} holds {shown(name)} twice; make the zip again")
        else:
            entries[name] = info
    names = sorted(entries)
    infos = [entries[name] for name in names]
    labels, classes = classify(_without_top(names), str(path))
    lock = threading.Lock()  # ZipFile counts its readers without one

    def open_entry(i: int) -> Image.Image:
        with lock, archive.open(infos[i]) as file:
            # bounded by the size it claims, whatever the compressed stream expands to
            return open_picture(io.BytesIO(file.read(infos[i].file_size)))

    return Source(names, labels, classes, open_entry, [info.file_size for info in infos], dict(ignored))


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # a damaged directory makes zipfile raise more than BadZipFile
        raise ValueError(f"{path} is not a folder, a parquet file or a readable zip ({error})") from error


def _checked_parts(info: zipfile.ZipInfo, path: Path) -> list[str]:
    """The parts of an entry's name. Raises ValueError where the entry is hostile."""
    name = info.filename.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or not parts or ":" in parts[0]:
        raise ValueError(f"{path} holds the name {info.filename!r}, which leads out of it; do not trust this zip")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise ValueError(f"{path} holds the symbolic link {info.filename!r}; make the zip of the files themselves")
    if info.flag_bits & 1:
        raise ValueError(f"{path} is encrypted ({info.filename!r}); make one without a password")
    if info.file_size > MAX_PICTURE_BYTES:
        raise ValueError(f"{path} says {info.filename!r} expands to {info.file_size} bytes; such a zip is refused")
    return parts


def _without_top(names: list[str]) -> list[str]:
    """Names below an enclosing folder, where there is one that holds two or more folders and no picture itself."""
    split = [name.split("/", 2) for name in names]
    below = {tuple(parts[:2]) for parts in split}
    if all(len(parts) == 3 for parts in split) and len({top for top, _ in below}) == 1 and len(below) > 1:
        return ["/".join(parts[1:]) for parts in split]
    return names


def npz_images(path: Path, batch_size: int, resolution: int | None, channels: int | None) -> Iterator[np.ndarray]:
    """Stream `arr_0` (uint8, NHWC) of an npz, one batch (n, R, R, C) in memory at a time.

    Raises ValueError when it has no such array, is of another kind, or of another resolution or channels than asked.
    """
    with _open_zip(path) as archive:
        try:
            info = archive.getinfo("arr_0.npy")
            file = archive.open(info)
            shape = _npy_shape(file, info.file_size)
        except Exception as error:  # the header is a foreign text: any fault of it is the same to the reader
            raise ValueError(f"{path} holds no uint8 array arr_0 of images (N, R, R, C): {error!s:.200}") from error
        if resolution not in (None, shape[1]) or channels not in (None, shape[3]):
            raise ValueError(f"{path} holds images {shape[1:]}, not of resolution {resolution} and {channels} channels")
        rows = min(batch_size, MAX_PICTURE_BYTES // math.prod(shape[1:]))
        with file:
            for start in range(0, shape[0], rows):
                batch = (min(rows, shape[0] - start), *shape[1:])
                try:
                    data = file.read(math.prod(batch))
                except Exception as error:  # as many kinds as there are ways to be torn
                    raise ValueError(f"{path} is damaged at image {start} ({error!s:.200}); make it again") from error
                if len(data) != math.prod(batch):
                    raise ValueError(f"{path} is cut off at image {start}; make it again")
                yield np.frombuffer(data, dtype=np.uint8).reshape(batch).copy()


def npz_labels(path: Path) -> np.ndarray | None:
    """Labels (n,) int64 of the images of an npz: its `arr_1`, as ADM names it, where that is a row of whole numbers.

    None without, and where all are zero, as without classes. ValueError when they are not one per image, or damaged.
    """
    with _open_zip(path) as archive:
        if not {"arr_0.npy", "arr_1.npy"} <= set(archive.namelist()):
            return None
        try:
            info = archive.getinfo("arr_0.npy")
            with archive.open(info) as images:
                count = _npy_shape(images, info.file_size)[0]
        except Exception:
            return None  # `npz_images` says what is wrong
        try:
            with archive.open("arr_1.npy") as file:
                shape, _, dtype = _npy_header(file)
                if len(shape) != 1 or dtype.kind not in "iu":
                    return None
                if shape[0] != count or count * dtype.itemsize > MAX_PICTURE_BYTES:
                    raise ValueError(f"{shape[0]} labels of {count} images")
                data = file.read(count * dtype.itemsize)
            labels = np.frombuffer(data, dtype, count).astype(np.int64)
        except Exception as error:  # as `npz_images`
            raise ValueError(f"{path} holds labels arr_1 that do not fit its images: {error!s:.200}") from error
    return labels if labels.any() else None


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and kind of an array, `file` left at its first entry."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _npy_shape(file: IO[bytes], size: int) -> tuple[int, ...]:
    """Shape in the header of a member of `size` bytes, `file` left at the first image."""
    shape, fortran, dtype = _npy_header(file)
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[1] != shape[2] or shape[3] not in (1, 3):
        raise ValueError(f"it is {dtype} {shape}{' in Fortran order' if fortran else ''}")
    if min(shape) < 1 or file.tell() + math.prod(shape) != size:
        raise ValueError(f"shape {shape} does not agree with its {size} bytes")
    if math.prod(shape[1:]) > MAX_PICTURE_BYTES:
        raise ValueError(f"images of {shape[1:]} are larger than {MAX_PICTURE_BYTES} bytes")
    return shape
