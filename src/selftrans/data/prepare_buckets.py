"""Pictures of any shape => buckets of a few aspect ratios, each prepared as a folder of its own.

Shape legend: a size is (height, width) in pixels; an aspect ratio is height / width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from selftrans.data.buckets import open_buckets, write_names
from selftrans.data.manifest import BUCKETS, FILE
from selftrans.data.prepare import NoneReadable, load, prepare
from selftrans.data.prepare_options import PrepareOptions
from selftrans.data.reports import check_faults, report_source, say
from selftrans.data.resolution import MAX_RESOLUTION, resolution_of, size_text
from selftrans.data.resumable import LOCK
from selftrans.data.source_samples import holds_pictures
from selftrans.data.sources.decode import none_readable, upright_size
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.source import Source, ahead
from selftrans.data.standardise import share_statistics
from selftrans.encoders.identity import identity_kind
from selftrans.messages import escaped, plural, printable
from selftrans.progress import progress_bar
from selftrans.storage import lock_file, remove_stale_temporaries

MOST = 99  #: buckets
WIDEST = 2.0  #: the aspect ratios are spread from 1 / WIDEST to WIDEST

Size = tuple[int, int]


def prepare_buckets(
    source: str | Path,
    out: str | Path,
    options: PrepareOptions | None = None,
    *,
    buckets: int,
    multiple: int = 2,
    **changes: Any,
) -> str:
    """Encode pictures of any shape into buckets, see `bucket_sizes`; each picture goes to the nearest aspect ratio.

    `options` and `changes` are as of `prepare`, with `resolution` a number. `out` then holds a folder for each bucket that has
    pictures, named by their size and made by `prepare`. `buckets.json` is written last; of several parts (`part`), by the one
    that ends last. Repeat the call to continue it. Returns a few lines to print. Raises ValueError as `prepare`, for a
    resolution that `bucket_sizes` refuses, and for a folder that holds other files.
    """
    given, out = dataclasses.replace(options or PrepareOptions(), **changes), Path(out)
    side, cell = _check_options(source, given, multiple)
    sizes, progress = bucket_sizes(side, buckets, cell), given.progress
    if len(sizes) < buckets:
        said = (
            f"{plural(len(sizes), 'bucket')}: at {side} pixels, others would have the same size in multiples of {cell}"
        )
        say(said, progress)
    opened = open_source(
        source,
        resolution=side,
        split=given.split,
        label_column=given.label_column,
        captions=given.text.source if given.text else None,
        reading=given.reading,
    )
    if opened.in_order:
        raise ValueError("buckets need the size of every picture before the first is encoded; leave out --streaming")
    report_source(opened, progress, flip=given.flip, pixels=identity_kind(given.autoencoder) == "pixel")
    check_faults(opened, source, given.skip_bad)
    _check_folder(out, sizes)
    bucket_of, made = assigned(opened, sizes, progress), []
    for k in np.unique(bucket_of):
        name, rows = size_text(sizes[k]), np.flatnonzero(bucket_of == k)
        say(f"{name}: {plural(len(rows), 'picture')}", progress)
        pictures = dataclasses.replace(chosen(opened, rows), resolution=resolution_of(*sizes[k]))
        try:
            prepare(source, out / name, given, pictures=pictures, resolution=pictures.resolution)
            made.append(name)
        except NoneReadable as error:
            say(f"{name} is left out: {error}", progress)
    opened.read_warnings.emit()
    if not made:
        raise ValueError(none_readable(len(opened), "picture", source))
    if not all((out / name / FILE).is_file() for name in made):
        return f"{escaped(out)} is not finished: the other parts make the rest, and the last one completes it"
    _complete(out, made, progress)
    return open_buckets(out).summary()


def _complete(out: Path, made: Sequence[str], progress: bool) -> None:
    """Make one data set of these finished buckets. Where `out` is one already nothing is written: it may be read-only."""
    with suppress(ValueError):  # not complete, or a bucket that was made again has statistics of its own
        if [Path(bucket.origin).name for bucket in open_buckets(out).buckets] == list(made):
            return
    with lock_file(out / LOCK, wait=True):
        remove_stale_temporaries(out, BUCKETS, shared=True)
        share_statistics([out / name for name in made], progress)
        write_names(out, made)
        (out / LOCK).unlink(missing_ok=True)


def bucket_sizes(resolution: int, buckets: int, cell: int) -> tuple[Size, ...]:
    """Sizes of up to `buckets` aspect ratios, from wide to tall, of about the area of a square of side `resolution`.

    The ratios are equally spaced in their logarithm from 1 : 2 to 2 : 1, with the square in the middle. The shorter side is
    rounded to a multiple of `cell`, and the longer one to the multiple that keeps the area best. Equal sizes become one.
    Raises ValueError for an even number of buckets, and a resolution that is no multiple of `cell`.
    """
    if not 1 <= buckets <= MOST or buckets % 2 == 0:
        raise ValueError(f"buckets {buckets} should be an odd number from 1 to {MOST}, with the square in the middle")
    if not 1 <= resolution <= MAX_RESOLUTION or resolution % cell:
        raise ValueError(
            f"resolution {resolution} is not a multiple of {cell} up to {MAX_RESOLUTION}, as the sides of buckets must be; "
            "give another --resolution, or --bucket-multiple"
        )
    found = set[Size]()
    for k in range(buckets // 2 + 1):
        ratio = WIDEST ** (2 * k / max(buckets - 1, 1))
        short = max(cell, round(resolution / math.sqrt(ratio) / cell) * cell)
        long = round(resolution**2 / short / cell) * cell
        found |= {(short, long), (long, short)}
    return tuple(sorted(found))


def assigned(source: Source, sizes: Sequence[Size], progress: bool = False) -> np.ndarray:
    """(len(source),) index in `sizes` of the aspect ratio whose logarithm is nearest; reads the header of each picture.

    A picture with an unreadable header gets the most frequent size: `prepare` reports it when it reads the pixels.
    """
    ratios = np.log([height / width for height, width in sizes])

    def nearest(i: int) -> int:
        try:
            with source.open(i) as image:
                height, width = upright_size(image)
            return int(np.argmin(np.abs(ratios - math.log(height / width))))
        except Exception:  # decoders raise any type on a damaged file
            return -1

    found_of = ahead(nearest, range(len(source)))
    options = {"total": len(source), "unit": " pictures", "disable": not progress, "leave": False}
    bar = progress_bar(found_of, desc="sizes", **options)
    found = np.fromiter(bar, dtype=np.int64, count=len(source))
    counts = np.bincount(found[found >= 0], minlength=len(sizes))
    return np.where(found < 0, int(np.argmax(counts)), found)


def chosen(source: Source, rows: np.ndarray) -> Source:
    """The pictures `rows` of a source, in this order, as a source with the same classes."""
    kept, position = rows.tolist(), {int(row): i for i, row in enumerate(rows)}
    return dataclasses.replace(
        source,
        names=[source.names[i] for i in kept],
        labels=source.labels[rows],
        open=lambda i: source.open(kept[i]),
        sizes=[source.sizes[i] for i in kept] if len(source.sizes) else (),
        ignored={},
        captions=None if source.captions is None else [source.captions[i] for i in kept],
        faults={position[i]: reason for i, reason in source.faults.items() if i in position},
    )


def _check_options(source: str | Path, given: PrepareOptions, multiple: int) -> tuple[int, int]:
    """(side of the square, number that the sides of all buckets are multiples of).

    Raises ValueError for data and options that buckets do not support.
    """
    if not holds_pictures(source, given):
        raise ValueError("--buckets is for pictures; leave it out for sounds, videos and values")
    if not isinstance(given.resolution, int):
        raise ValueError(
            "--buckets needs --resolution SIDE: pictures of all buckets have about the area of that square"
        )
    if multiple < 1:
        raise ValueError(f"--bucket-multiple {multiple} should be 1 or more")
    return given.resolution, multiple * load(given.autoencoder, given.device, "float32")[1].downsample


def _check_folder(out: Path, sizes: Sequence[Size]) -> None:
    """Raise ValueError when `out` holds anything but buckets of these sizes."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a folder; choose another --out")
    known = {BUCKETS, *map(size_text, sizes)}
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        if path.name not in known and not path.name.startswith("."):
            raise ValueError(
                f"{out} holds {printable(path.name)}, which is none of these buckets; repeat the command as it was, or choose "
                "another --out"
            )
