"""A picture source: an ordered list of names, labels, and a function that opens each picture.

`Samples` is what `prepare` needs of pictures, sounds, videos and arrays alike.

Shape legend: (H, W, C) image, C 1 (grey) or 3 (RGB); a resolution is a side, of a square, or (height, width);
labels are indices into `Source.classes`.
"""

from __future__ import annotations

import errno
import hashlib
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Self, TypeVar

import numpy as np

from selftrans.data.resolution import Resolution
from selftrans.data.sources.decode import (
    STANDARD,
    BadSample,
    Reading,
    check_pixels,
    enlarged,
    none_readable,
    open_picture,
    to_array,
    unreadable,
)
from selftrans.data.sources.metadata import facts_of
from selftrans.data.sources.read_warnings import ReadWarnings
from selftrans.device import cpu_cores
from selftrans.messages import plural, printable

if TYPE_CHECKING:
    from PIL import Image

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_CLASSES = 1_000_000
FAR = 256  #: items to skip from which on a stream is begun anew instead
NOT_FINITE = "NaN, infinite, or beyond float32"  #: why a sample of such values is refused
MAX_PICTURE_BYTES = 1 << 29  #: entries of archives that claim a larger size are refused


@dataclass(frozen=True, eq=False, kw_only=True)
class Samples(ABC):
    """An ordered collection of labelled samples: what `prepare` encodes."""

    labels: np.ndarray  #: (len,) int64, indices into `classes`; all 0 when there are no classes
    classes: tuple[str, ...] = ()  #: empty: unconditional
    ignored: dict[str, int] = field(default_factory=dict)  #: reason for ignoring files -> how many, see `file_kinds`
    captions: Sequence[tuple[str, ...]] | None = None  #: of each sample; None: the source was opened without
    #: sample that lacks its picture, captions or label -> the reason
    faults: Mapping[int, str] = field(default_factory=dict)
    in_order: bool = False  #: its samples should be read in their order, by one thread
    read_warnings: ReadWarnings = field(default_factory=ReadWarnings, repr=False)  #: of the samples read so far

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the source does, and not with the place where it is stored."""

    @abstractmethod
    def name(self, i: int) -> str:
        """Path or position of sample i, for messages."""

    @abstractmethod
    def read(self, i: int) -> np.ndarray:
        """Sample i as an array; from any thread. Raises BadSample (a ValueError) naming it."""


class LabelFile(NamedTuple):
    """A `dataset.json` that may label the pictures of a source, see `label_file`."""

    where: str  #: for messages
    read: Callable[[int], bytes]  #: its first bytes
    inside: Callable[[str], str] = str  #: the name of a picture, from the folder of this file on


class Entries(NamedTuple):
    """Files of a folder, or of an archive."""

    names: list[str]  #: sorted by code point
    sizes: list[int]  #: bytes
    open: Callable[[int], BinaryIO]  #: file i, to be closed; safe from any thread
    ignored: dict[str, int]  #: reason for ignoring files -> how many
    head: Callable[[str], str] = str  #: a name from its class folder on
    empty: Sequence[str] = ()  #: class folders that hold none of the files; known of a zip
    labels: Sequence[LabelFile] = ()  #: of a zip, the nearest first
    #: extension and first bytes of other files next to them that may hold labels
    tables: Sequence[tuple[str, Callable[[int], bytes]]] = ()

    @property
    def heads(self) -> list[str]:
        """The names, beginning with the class folder."""
        return list(map(self.head, self.names))

    def chosen(self, at: Sequence[int]) -> Entries:
        """The files with these numbers, in this order."""
        return self._replace(
            names=[self.names[i] for i in at], sizes=[self.sizes[i] for i in at], open=lambda i: self.open(at[i])
        )

    def pictures(self) -> Source:
        """The files as pictures without labels."""
        return Source(
            self.names,
            lambda i: open_picture(self.open(i)),
            self.sizes,
            labels=np.zeros(len(self.names), dtype=np.int64),
            ignored=dict(self.ignored),
            tables=self.tables,
        )


def parts_inside(name: str) -> list[str] | None:
    """The parts of a file's name in an archive or a list; None for one that leads out: absolute, with `..` or a drive."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    outside = name.startswith(("/", "\\")) or ".." in parts or (parts and ":" in parts[0])
    return None if outside else parts


@dataclass(frozen=True, eq=False)
class Source(Samples):
    """Pictures; opened by `open_source`."""

    names: Sequence[str]  #: path of each picture inside the source, sorted by code point
    #: opens picture i, its pixels not yet decoded; for sounds and videos, the file
    open: Callable[[int], Any] = field(repr=False)
    sizes: Sequence[int] = ()  #: bytes of each picture, if known
    channels: int = 3
    resolution: Resolution = 0
    is_table: bool = False
    reading: Reading = STANDARD  #: limits and values of the pixels
    tables: Sequence[tuple[str, Callable[[int], bytes]]] = field(default=(), repr=False)  #: see `Entries`

    def name(self, i: int) -> str:
        return self.names[i]

    def read(self, i: int) -> np.ndarray:
        """Picture i, cropped and resized: (H, W, C) uint8. Raises BadSample (a ValueError) naming it."""
        if i in self.faults:
            raise BadSample(self.names[i], self.faults[i])
        try:
            with self.open(i) as image:
                check_pixels(image.size, self.reading.max_pixels)
                facts, small = facts_of(image), enlarged(image, self.resolution)
                pixels = to_array(image, self.resolution, self.channels, self.reading.range)
                facts.several |= animated(image)
                self.read_warnings.add(self.names[i], facts, small)
                return pixels
        except Exception as error:  # decoders raise any type on a damaged file
            raise unreadable(self.names[i], error) from error

    @cached_property
    def fingerprint(self) -> str:
        """Hash of names, labels, classes, sizes and captions."""
        digest = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        digest.update(self.labels.astype("<i8").tobytes() + np.asarray(self.sizes, dtype="<i8").tobytes())
        for name in self.names:
            digest.update(name.encode(errors="surrogateescape") + b"\0")
        for captions in self.captions or ():
            digest.update("\0".join(("", *captions)).encode() + b"\n")
        return digest.hexdigest()


def animated(image: Image.Image) -> bool:
    """Whether a picture has a second frame; a damaged one counts."""
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # decoders raise any type on a damaged file
        return True


@dataclass(frozen=True, eq=False)
class FileSamples(Samples):
    """Samples that are not pictures: arrays of one shape, each made from one file."""

    source: Source = field(repr=False)  #: the files
    shape: tuple[int, ...]  #: (C, *S) of a sample
    load: Callable[[str, BinaryIO], np.ndarray] = field(repr=False)  #: name and content of a file ⇒ (C, *S) float32
    noun: str  #: what a sample is called in messages

    @classmethod
    def of(cls, source: Source, *about: Any) -> Self:
        """The samples in these files, with their labels; `about`: the other fields, from `shape` on."""
        return cls(source, *about, **{each.name: getattr(source, each.name) for each in fields(Samples)})

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def name(self, i: int) -> str:
        return self.source.name(i)

    def read(self, i: int) -> np.ndarray:
        """Sample i: (C, *S) float32. Raises BadSample for a file that cannot be decoded, and for values not finite."""
        name = self.name(i)
        if i in self.faults:
            raise BadSample(name, self.faults[i])
        try:
            with self.source.open(i) as stream:
                values = self.load(name, stream)
            if not np.isfinite(values).all():
                raise ValueError(NOT_FINITE)
        except Exception as error:  # decoders raise any type on a damaged file
            raise unreadable(name, error, self.noun) from error
        assert values.shape == self.shape, "every sample must have the shape of the source"
        return values


def readable(
    source: Source, read: Callable[[int], Result], noun: str, where: object, indices: Iterable[int] | None = None
) -> Iterator[tuple[int, Result]]:
    """Number and `read(number)` of each file (of `indices`; None: all) that can be read: the others are reported later, when
    they are encoded.

    Raises ValueError, with the first fault, at the end if there was none.
    """
    error, none = None, True
    for i in range(len(source)) if indices is None else indices:
        try:
            found = read(i)
        except Exception as fault:  # decoders raise any type on a damaged file
            error = error or unreadable(source.name(i), fault, noun)
            continue
        none = False
        yield i, found
    if none:
        raise ValueError(none_readable(len(source), noun, where, error))


def in_class_folders(
    source: Source, files: Entries, where: str, unit: str = "pictures", *, allow_empty: bool = False
) -> Source:
    """The source of these files with classes: the first folder of a name is its class.

    Without folders there are no classes. Class folders without files are counted as ignored or, with `allow_empty`, are
    classes. Raises ValueError when some files are in class folders and some are not; `unit`: what messages call the files.
    """
    if files.empty and not allow_empty:
        source.ignored[f"class folders without {unit}"] = len(files.empty)
    names = files.heads
    heads = [name.split("/", 1)[0] if "/" in name else None for name in names]
    loose = heads.count(None)
    if loose == len(names):
        return source
    if loose:
        first = names[heads.index(None)]
        raise ValueError(
            f"{where} holds class folders and {plural(loose, unit.removesuffix('s'))} outside them, such as "
            f"{printable(first)}; move {'it' if loose == 1 else 'them'}"
        )
    classes = sorted({head for head in heads if head is not None} | {*(files.empty if allow_empty else ())})
    index = {name: i for i, name in enumerate(classes)}
    labels = np.array([index[head] for head in heads if head is not None], dtype=np.int64)
    return replace(source, labels=labels, classes=tuple(classes))


def present_classes(labels: np.ndarray, classes: Sequence[str]) -> tuple[int, ...]:
    """The labels that occur, in order; empty when there are no classes, or when all of them occur.

    Only classes with samples are sampled, shown and measured.
    """
    found = np.unique(labels).tolist() if len(classes) else []
    return () if len(found) == len(classes) else tuple(found)


def ahead(
    work: Callable[[Item], Result], items: Iterable[Item], *, threads: int | None = None
) -> Generator[Result, None, None]:
    """Yield the results of `work` in the order of the items, computed by threads ahead of the caller.

    Threads suffice, since decoders release the GIL. `threads` None: number of cores + 1, at most 16. An error of `work`
    is raised in place of its result.
    """
    threads = threads or min(cpu_cores() + 1, 16)
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, "decode") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > threads + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # not needed after an error
                future.cancel()


class InOrder:
    """Item i of a stream, for indices that mostly rise; from any thread, one at a time.

    `begin(i)` returns an iterator that starts with item i; it is called again to go back, and to skip `far` items or more.
    Raises OSError where the stream ends before an item.
    """

    def __init__(self, begin: Callable[[int], Iterator[Any]], far: float = FAR) -> None:
        self._begin, self._far, self._lock = begin, far, threading.Lock()
        self._items: Iterator[Any] | None = None
        self._next = 0
        self._last: Any = None

    def __call__(self, i: int) -> Any:
        with self._lock:
            if self._items is not None and i == self._next - 1:
                return self._last
            if self._items is None or not self._next <= i < self._next + self._far:
                self._items, self._next = self._begin(i), i
            try:
                while self._next <= i:
                    self._last = next(self._items)
                    self._next += 1
            except StopIteration:
                raise OSError(errno.ETIMEDOUT, "the stream has ended before this row") from None
            except Exception:
                self._items = None  # so that another try begins the stream again
                raise
            return self._last
