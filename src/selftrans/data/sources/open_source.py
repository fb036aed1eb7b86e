"""Sources of pictures: folder, zip, built-in digits, data set ⇒ `Source` ⇒ uint8 images of one size.

Shape legend: (n, H, W, C) images, C 1 (grey) or 3 (RGB); a resolution is a side, of squares, or (height, width).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from selftrans.data.resolution import MAX_RESOLUTION, Resolution, check_range, resolution_of, size_text
from selftrans.data.sources import folder, npz, table, zip_archive
from selftrans.data.sources.captions import CAPTIONED, CaptionSource, annotated, captioned
from selftrans.data.sources.decode import STANDARD, Reading, upright_size
from selftrans.data.sources.digit_captions import digits_with_captions
from selftrans.data.sources.file_kinds import PICTURES, check_source_file, describe_ignored, remedy_for_ignored
from selftrans.data.sources.label_file import given_labels
from selftrans.data.sources.source import Source, ahead, readable
from selftrans.data.sources.splits import split_files, split_folder, warn_of_splits
from selftrans.data.sources.tar_archive import labelled_tars, only_tars, tar_entries
from selftrans.messages import printable
from selftrans.progress import progress_bar

__all__ = ["Source", "iter_images", "open_source"]

RESIZE = "give --resolution to crop and resize them"
KEEP = ", with --buckets to keep about their aspect ratios"
OTHER_SHAPE = 1.2  #: ratio of two aspect ratios from which buckets, of which five are usual, hold them apart


def open_source(
    source: str | Path,
    *,
    resolution: Resolution | None = None,
    split: str | None = None,
    label_column: str | None = None,
    captions: CaptionSource | None = None,
    reading: Reading = STANDARD,
    progress: bool = False,
) -> Source:
    """Open a collection of pictures. `source` is one of:

    - a folder or zip of class folders (pictures at any depth inside a class), or of pictures only (unconditional);
      in a zip or tar, one top-level folder may enclose the class folders; archives are read in place;
    - `digits`: scikit-learn's 1,797 scans, 8x8, one channel;
    - a tar file or a folder of them, as webdataset writes them: `key.jpg` with its class in `key.cls` or `key.json`;
    - a parquet file, a folder of them, or a hub id `owner/name`, read by `datasets`: `split`, and `label_column`
      if several columns could be the label.
    With `captions` the pictures have captions and no labels. Then `source` is one of:
    - a folder or zip, in which `name.jpg` has its captions in `name.txt` or `name.caption` (one a line) or `name.json`;
    - a folder or zip of pictures, whose captions are in the file `captions.file`, as COCO's annotations are;
    - a tar file or a folder of them, as webdataset writes them;
    - a parquet file, a folder of them, or a hub id, with a column of texts or lists of texts;
    - `digits_t2i`: the scans of `digits`, with sentences that say what is measured on them (see `digit_captions`).
    A folder or zip with a folder for each split (`train/cat/a.jpg`) and files named after splits (`train-0.tar`) are read
    by `split`; without it all are read, with a warning. Of the hub, `split` None is train.
    Hidden files, caches and files that are not pictures are ignored and counted in `Source.ignored`. `reading`: limits, the
    values of pixels, grey or colour, and a file of labels, of a folder or zip. `resolution` None keeps the size of the
    pictures, which must all have one size: the header of each is read, with a progress bar if `progress`.
    Raises ValueError when there is no picture, the layout is ambiguous or unsafe, or a resolution is needed.
    """
    opened = _open(source, resolution, split, label_column, captions, reading)
    native = resolution or _native(opened, str(source), progress, RESIZE, f"{RESIZE}{KEEP}")[0]
    return dataclasses.replace(opened, resolution=native)


def _open(
    source: str | Path,
    resolution: Resolution | None,
    split: str | None = None,
    label_column: str | None = None,
    captions: CaptionSource | None = None,
    reading: Reading = STANDARD,
) -> Source:
    """The source with this resolution (None: 0, to be replaced). Raises ValueError as `open_source` does."""
    if resolution is not None:
        check_range(resolution)
    if captions and reading.labels is not None:
        raise ValueError("--labels does not apply to pictures with captions, which have no labels; leave it out")
    opened = _find(source, split, label_column, captions, reading)
    if not opened.is_table:
        warn_of_splits(opened.names, opened.classes, str(source))
    labelled = opened.is_table or Path(source).suffix.lower() == ".tar" or only_tars(Path(source))
    if label_column not in (None, reading.label_column) and (captions or not labelled):
        why = "with captions there are no labels" if captions else f"{source} is not a table"
        warnings.warn(f"label_column is ignored: {why}", stacklevel=3)
    if reading.streaming and not opened.in_order:
        warnings.warn(f"streaming is ignored: {source} is not a table", stacklevel=3)
    if reading.streaming and opened.in_order and resolution is None:
        raise ValueError("streamed pictures are read once, in their order; give --resolution")
    if captions and captions.column is not None and not captions.file and not opened.is_table:
        warnings.warn(f"caption_column is ignored: {source} is not a table", stacklevel=3)
    if not len(opened):
        ignored = f"; {describe_ignored(opened.ignored)}" if opened.ignored else ""
        remedy = f"; {found}" if (found := remedy_for_ignored(opened.ignored)) else ""
        raise ValueError(f"no pictures in {source} (looked for {' '.join(sorted(PICTURES))}{ignored}){remedy}")
    channels = 1 if reading.grey else opened.channels
    return dataclasses.replace(opened, channels=channels, resolution=resolution or 0, reading=reading)


def _find(
    source: str | Path, split: str | None, label_column: str | None, captions: CaptionSource | None, reading: Reading
) -> Source:
    """A source with its labels, or with `captions`."""
    path, streaming = Path(source), reading.streaming
    if split is not None and (str(source) == "digits" or path.suffix.lower() == ".parquet"):
        warnings.warn(f"split {split!r} is ignored: {source} is one table", stacklevel=4)
    if reading.labels is not None:
        unlabelled = _unlabelled(source, split, f"--labels {reading.labels}")
        return given_labels(unlabelled, reading.labels, reading.label_column)
    if str(source) == "digits" and not captions:
        return _digits()
    if str(source) == "digits_t2i":
        if not captions:
            raise ValueError("digits_t2i are pictures with captions; add --text minilm, or another text encoder")
        return digits_with_captions(_digits())
    if captions and captions.file is not None:
        pictures = _unlabelled(source, split, f"--captions {captions.file}")
        return annotated(pictures, Path(captions.file), captions.column)
    files, inside = [path] if path.is_file() else [], path
    if path.is_dir():
        files, inside = _files_of(path, split, "*.parquet", *(["*.tar"] if captions or only_tars(path) else []))
        if not files and only_tars(inside):  # the folder of the split
            files, _ = _files_of(inside, None, "*.tar")
    suffix = files[0].suffix.lower() if files else ""
    if suffix == ".parquet":
        return table.parquet(files, label_column, captions, streaming=streaming)
    if suffix == ".tar":
        inside_tar = split if path.is_file() else None
        if captions:
            return captioned(tar_entries(files, CAPTIONED, inside_tar))
        return labelled_tars(files, label_column, inside_tar)
    if files:
        check_source_file(path)
        if captions:
            return captioned(zip_archive.zip_entries(path, CAPTIONED, split))
        return zip_archive.zip_file(path, split, allow_empty=reading.allow_empty)
    if path.is_dir():
        if captions:
            return captioned(folder.folder_entries(inside, CAPTIONED))
        return folder.folder(inside, is_split=inside != path, allow_empty=reading.allow_empty)
    if _is_hub_id(source):
        return table.hub(str(source), split or "train", label_column, captions, streaming=streaming)
    what = "pictures with captions" if captions else "pictures"
    built_in = "digits_t2i" if captions else "digits"
    raise ValueError(
        f"no source of {what} {str(source)!r}: give a folder, a zip, a tar or parquet file, a hub id owner/name, or "
        f"'{built_in}'"
    )


def _is_hub_id(source: str | Path) -> bool:
    """Whether a source has the form of a hub id, OWNER/NAME, and no such path exists. Warns when a folder OWNER exists."""
    path = Path(source)
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        return False
    held: str | None = None
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:  # a few: it may hold millions
        names = sorted(printable(entry.name) for entry in itertools.islice(entries, 5))
        held = ", ".join([*names[:4], *("…" for _ in names[4:])]) or "nothing"
    if held is not None:
        warnings.warn(
            f"{printable(source)} is not on this machine, so it is looked for on the hub; the folder {printable(path.parent)} "
            f"holds {held}",
            stacklevel=5,
        )
    return True


def _unlabelled(source: str | Path, split: str | None, file: str) -> Source:
    """Every picture of a folder or zip, without labels; `file` describes them. ValueError for another source."""
    path = Path(source)
    if path.is_dir():
        return folder.folder_entries(split_folder(path, split), PICTURES).pictures()
    if path.is_file() and path.suffix.lower() == ".zip":
        return zip_archive.zip_entries(path, PICTURES, split).pictures()
    raise ValueError(f"{printable(source)} is not a folder or a zip of pictures, which {file} needs")


def _files_of(path: Path, split: str | None, *patterns: str) -> tuple[list[Path], Path]:
    """The tables or archives of a folder, or of the folder of its split, and that folder; by the first pattern with files.

    Raises ValueError for a link that leads out of the folder, and for a split that it does not have.
    """
    for pattern in patterns:
        if files := folder.files_like(path, pattern):
            return split_files(files, split, str(path)), path
    inside = split_folder(path, split)
    return ([], inside) if inside == path else _files_of(inside, None, *patterns)


def _digits() -> Source:
    """scikit-learn's scanned digits; a value v of 0 .. 16 becomes round(v 255 / 16)."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    return Source(
        [f"digits/{i:04d}" for i in range(len(images))],
        lambda i: Image.fromarray(images[i]),
        labels=data.target.astype(np.int64),
        classes=tuple(str(name) for name in data.target_names),
        channels=1,
    )


def _native(source: Source, where: str, progress: bool, remedy: str, of_shapes: str) -> tuple[Resolution, bool]:
    """The size of all pictures, and whether all are grey in 8 bits, from their headers.

    ValueError, with a remedy, when they have several sizes, or several shapes.
    """

    def header(i: int) -> tuple[tuple[int, int], bool]:
        with source.open(i) as image:
            return upright_size(image), image.mode in ("1", "L")

    bar = progress_bar(range(len(source)), desc="sizes", unit=" pictures", disable=not progress, leave=False)
    seen, all_grey = (0, 0), True
    for i, (size, grey) in readable(source, header, "picture", where, bar):
        if size != seen and any(seen):
            alike = max(size[0] * seen[1], size[1] * seen[0]) < OTHER_SHAPE * min(size[0] * seen[1], size[1] * seen[0])
            name, way = printable(source.name(i)), remedy if alike else of_shapes
            raise ValueError(f"{name} in {where} is {size_text(size)}, others {size_text(seen)}; {way}")
        seen, all_grey = size, all_grey and grey
    if max(seen) > MAX_RESOLUTION:
        raise ValueError(f"the pictures of {where} are {size_text(seen)}, more than {MAX_RESOLUTION}; {remedy}")
    return resolution_of(*seen), all_grey


def iter_images(path: str | Path, batch_size: int = 256) -> Iterator[np.ndarray]:
    """Images (n, H, W, C) uint8, n <= batch_size, from any picture source, or the samples of an npz (see `npz_samples`).

    C is 1 if all pictures are 8-bit greyscale, else 3 (RGB). Raises ValueError as `open_source` does, and for an npz of another
    type.
    """
    if Path(path).suffix.lower() == ".npz":
        yield from npz.npz_samples(Path(path), batch_size)
        return
    source = dataclasses.replace(_open(path, None), faults={})  # labels are not used, so none is missing
    remedy = "they are read without resizing: crop all to one size"
    native, grey = _native(source, str(path), False, remedy, remedy)
    source = dataclasses.replace(source, resolution=native, channels=1 if grey else 3)
    indices = range(len(source))
    batches = (indices[start : start + batch_size] for start in indices[::batch_size])
    yield from ahead(lambda batch: np.stack([source.read(i) for i in batch]), batches)
    source.read_warnings.emit()
