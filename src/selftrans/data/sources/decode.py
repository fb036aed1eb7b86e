"""One picture file ⇒ one uint8 array. Shape legend: (H, W, C) image, C 1 (grey) or 3 (RGB); a resolution is R, of a square,
or (height, width)."""

from __future__ import annotations

import errno
import io
import math
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np

from selftrans.data.resolution import Resolution, sides, size_text
from selftrans.data.sources.metadata import (
    INFO,
    ORIENTATION,
    add_info,
    facts_of,
    orientation_of,
    pixels_only,
    turned_upright,
)
from selftrans.messages import first_line, plural, printable

if TYPE_CHECKING:
    from PIL import Image, ImageFile

#: the only decoders of Pillow that may run (others call external programs)
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000", "QOI")
MAX_PIXELS = 200_000_000  #: of a picture, by default; decoded it takes 600 MB
LARGE = 64_000_000  #: pixels above which a picture is decoded at a reduced scale, and one at a time
_ALONE = threading.Lock()  #: held while a large picture is decoded
#: faults of the machine, not of one picture: skipping the picture would lose good data
MACHINE_FAULTS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT})


class BadSample(ValueError):
    """A sample that cannot be used. `name` is its path in the source, `reason` is one line."""

    def __init__(self, name: str, reason: str, fault: str = "cannot be used") -> None:
        super().__init__(f"{printable(name, 1000)}: {fault} ({reason})")
        self.name, self.reason = name, reason


def unreadable(name: str, error: Exception, noun: str = "picture") -> Exception:
    """The error to raise where reading a sample raised `error`: BadSample, unless the fault is in the machine."""
    if isinstance(error, BadSample | MemoryError | ModuleNotFoundError):
        return error
    if isinstance(error, OSError) and error.errno in MACHINE_FAULTS:
        return ValueError(
            f"{printable(name)}: cannot be read now ({first_line(error)}); the {noun} may be valid: repeat later"
        )
    said = getattr(error, "strerror", None)  # of the system, and of the library of videos: without the name of the file
    reason = said if isinstance(said, str) and said and getattr(error, "filename", None) else first_line(error)
    return BadSample(name, reason, f"cannot be read as a {noun}")


def none_readable(count: int, noun: str, where: object = None, why: object = None) -> str:
    """`none of the 2 pictures of x is readable; the first: why`, or `the only picture of x is not readable: why`."""
    of = "" if where is None else f" of {where}"
    said = (
        f"the only {noun}{of} is not readable" if count == 1 else f"none of the {plural(count, noun)}{of} is readable"
    )
    return said if why is None else f"{said}{'' if count == 1 else '; the first'}: {why}"


@contextmanager
def fault_of(file: object, fault: str, remedy: str) -> Iterator[None]:
    """Any error in the block as a ValueError, `FILE FAULT (reason); REMEDY`; one that names the file already is not changed."""
    try:
        yield
    except Exception as error:  # readers of archives, arrays and tables raise any type on a damaged file
        if isinstance(error, MemoryError) or str(error).startswith(str(file)):
            raise
        reason = f"no {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
        raise ValueError(f"{printable(file, None)} {fault} ({first_line(reason, 300)}); {remedy}") from error


@dataclass(frozen=True)
class Reading:
    """How pictures are read. ValueError for an option out of range."""

    max_pixels: int = MAX_PIXELS  #: larger pictures are refused
    #: values that become black and white in pictures of more than 8 bits; None: all bits
    range: tuple[float, float] | None = None
    allow_empty: bool = False  #: a class folder without pictures is a class, instead of an error
    streaming: bool = False  #: rows of a table are read in order, those of the hub over the network: no copy on disk
    labels: Path | None = None  #: a file with the label of each picture, in place of class folders; see `label_file`
    label_column: str | None = None  #: of that file; None: the one with a usual name
    grey: bool = False  #: one channel in place of three

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels {self.max_pixels} should be 1 or more")
        if self.range is not None and not -math.inf < self.range[0] < self.range[1] < math.inf:
            raise ValueError(
                f"range {self.range[0]:g} {self.range[1]:g} should be the value of black, then that of white"
            )


STANDARD = Reading()  #: how pictures are read without options


class SizedFile(io.BufferedReader):
    """A buffered file whose reads allocate at most its size, not the length that a malicious header claims."""

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self._size = os.fstat(raw.fileno()).st_size

    @classmethod
    def open(cls, path: Path) -> Self:
        return cls(io.FileIO(path))

    def read(self, size: int | None = -1) -> bytes:
        return super().read(size if size is None else min(size, self._size))

    def __del__(self) -> None:
        self.close()  # PIL leaves it open


def open_picture(file: Path | BinaryIO) -> Image.Image:
    """Open a picture and read its header, not its pixels; `metadata.facts_of` returns what its metadata say.

    Pillow's limit of pixels does not apply, see `check_pixels`. Raises what Pillow raises for a file that is not a picture.
    """
    opened: BinaryIO = SizedFile.open(file) if isinstance(file, Path) else file
    try:
        pixels, facts = pixels_only(opened)
        if pixels is not opened:
            opened.close()
        image = _decoder(pixels)
    except BaseException:
        opened.close()
        raise
    add_info(facts, image)
    image.info[INFO] = facts
    return image


def _decoder(file: BinaryIO) -> Image.Image:
    """`PIL.Image.open` without its limit of pixels, which is global, and without the formats that are not in FORMATS."""
    from PIL import Image, UnidentifiedImageError

    Image.init()  # registers the decoders; only those of FORMATS are called
    head = file.read(16)
    heif = head[4:8] == b"ftyp"  # also begins AVIF; the extension may say something else
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        try:
            if factory is None or accept is None or accept(head) is not True:
                continue  # `accept` returns a text where this installation of Pillow lacks the decoder
            file.seek(0)
            image = _jpeg_reader()(file) if name == "JPEG" else factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # as Pillow: not of this format
            continue
        except Image.DecompressionBombError as error:  # of WebP Pillow checks the size itself
            most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise ValueError(f"more than {most:,} pixels, which Pillow refuses in {name}; save it as png") from error
        image._exclusive_fp = True  # closed with the picture
        return image
    if heif:
        brand = printable(head[8:12].decode("latin-1"))
        raise ValueError(
            f"a HEIF picture ({brand}), which this Pillow does not read; convert it, or install a newer Pillow"
        )
    raise UnidentifiedImageError(_unknown(head))


@cache
def _jpeg_reader() -> Callable[[BinaryIO], ImageFile.ImageFile]:
    """Pillow's reader of one JPEG: it looks neither for more pictures in the file, nor for the resolution in EXIF.

    That resolution is not used, and Pillow warns of damaged EXIF while it reads it.
    """
    from PIL import JpegImagePlugin

    class Reader(JpegImagePlugin.JpegImageFile):
        def _read_dpi_from_exif(self) -> None:
            pass

    return Reader


def _unknown(head: bytes) -> str:
    """A description of a file in none of FORMATS, by its first bytes."""
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://"):
        return "a pointer of Git LFS in place of the picture; run `git lfs pull`"
    if head.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith((b"<!doctype", b"<html")):
        return "a web page in place of the picture; download it again"
    return "it begins with zeros, as after an incomplete copy" if not any(head) else "of an unknown format"


def check_pixels(size: tuple[int, int], most: int) -> None:
    """Raise ValueError for a picture of this width and height, as its header says, if it has more than `most` pixels."""
    if size[0] * size[1] > most:
        raise ValueError(
            f"{size[0]}x{size[1]} is more than the limit of {most:,} pixels; raise it with --max-pixels, if memory "
            "allows (3 bytes a pixel)"
        )


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of a picture after EXIF orientation; reads its header only."""
    width, height = image.size  # of a TIFF, recent versions of Pillow turn it already
    if tags := getattr(image, "tag_v2", None):
        width, height = int(tags[256]), int(tags[257])
        turned = tags.get(ORIENTATION) in (5, 6, 7, 8)
    else:
        turned = orientation_of(image) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def enlarged(image: Image.Image, resolution: Resolution) -> str:
    """`20x30 to 64x64` for a picture that has fewer pixels than are made of it; empty for any other."""
    size, wanted = upright_size(image), sides(resolution)
    return f"{size_text(size)} to {size_text(wanted)}" if size[0] < wanted[0] or size[1] < wanted[1] else ""


def to_array(
    image: Image.Image, resolution: Resolution, channels: int, values: tuple[float, float] | None = None
) -> np.ndarray:
    """Decode, turn upright, convert to 8 bits, crop to the central rectangle and resize: (H, W, C) uint8.

    EXIF orientation is applied; transparency is composited on white; palette, grey, CMYK and 16-bit pictures become RGB
    (or grey when `channels` is 1); colour profiles are ignored. Above 8 bits, `values` (low, high) become 0 and 255.
    A picture of more than LARGE pixels is decoded at a reduced scale where its format can, and alone.
    See `centre_crop` for the resampling.
    """
    height, width = sides(resolution)
    large = image.width * image.height > LARGE
    if large:
        _reduce(image, *((width, height) if orientation_of(image) in (5, 6, 7, 8) else (height, width)))
    with _ALONE if large else nullcontext():
        upright = turned_upright(image)
        mode = "L" if channels == 1 else "RGB"
        cropped = centre_crop(_eight_bit(upright, mode, values), height, width)
        return np.array(cropped.convert(mode), dtype=np.uint8).reshape(height, width, channels)


def _reduce(image: Image.Image, height: int, width: int) -> None:
    """Make a JPEG or JPEG 2000 decode at 1/2, 1/4, ... of its sides, which stay at least twice the target."""
    if image.format == "JPEG":
        image.draft(None, (2 * width, 2 * height))
    elif image.format == "JPEG2000":
        scale = min(image.width // (2 * width), image.height // (2 * height))
        image.reduce = max(0, min(_levels(image), scale.bit_length() - 1))  # type: ignore[method-assign,assignment]


def _levels(image: Any) -> int:
    """How often a JPEG 2000 can be halved, by its header; 0 when that is not found."""
    at = image.fp.tell()
    image.fp.seek(0)
    head = image.fp.read(1 << 16)
    image.fp.seek(at)
    start = head.find(b"\xff\x4f\xff\x51")  # start, and size, whose length follows
    found = head.find(b"\xff\x52", start + 4 + int.from_bytes(head[start + 4 : start + 6], "big")) if start >= 0 else -1
    return head[found + 9] if 0 <= found < len(head) - 9 else 0


def centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest central rectangle of this shape, resized to it, as ADM prepares ImageNet (Dhariwal & Nichol, 2105.05233).

    Halved with a box filter while both sides are at least twice the target, then resized with an antialiased
    bicubic filter so that one side fits, then cropped. The last two are one resampling of the cropped region,
    with the same weights, so that a very long picture costs no memory.
    """
    from PIL import Image

    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if image.size == (width, height):
        return image
    scale = max(height / image.height, width / image.width)
    whole_width, whole_height = round(image.width * scale), round(image.height * scale)
    left, top = (whole_width - width) // 2, (whole_height - height) // 2
    box = (left, top, left + width, top + height)
    across, down = image.width / whole_width, image.height / whole_height
    return image.resize(
        (width, height),
        Image.Resampling.BICUBIC,
        box=(box[0] * across, box[1] * down, min(box[2] * across, image.width), min(box[3] * down, image.height)),
    )


def _eight_bit(image: Image.Image, mode: str, values: tuple[float, float] | None = None) -> Image.Image:
    """`image` in 8 bits per channel, in `mode` L or RGB; grey stays L, which takes a third of the time and memory."""
    from PIL import Image

    if image.mode == "F" and values is None:
        raise ValueError(
            "floating-point pictures have no agreed range; give --range LOW HIGH, or save it in 8 or 16 bits"
        )
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        image = Image.fromarray(_scaled(np.asarray(image), values))
    elif values is not None and facts_of(image).deep:
        raise ValueError(
            "of 16-bit colours only the upper 8 bits are read, so --range does not apply; save it in grey or 8 bits"
        )
    if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode in (mode, "L") else image.convert(mode)


def _scaled(pixels: np.ndarray, values: tuple[float, float] | None) -> np.ndarray:
    """(H, W) uint8 of pixels of more than 8 bits; `values` (low, high) become 0 and 255, else ValueError beyond 16 bits."""
    out = np.empty(pixels.shape, np.uint8)
    rows = max(1, (1 << 22) // max(1, pixels.shape[1]))
    for start in range(0, len(pixels), rows):  # so that a large picture needs little more memory than its pixels
        part = pixels[start : start + rows]
        if values is not None:
            low, high = values
            unit = np.nan_to_num((part.astype(np.float64) - low) / (high - low))
            out[start : start + rows] = np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)
            continue
        whole = part.astype(np.int64)
        if whole.min() < 0 or whole.max() > 65535:
            raise ValueError("integers beyond 16 bits; give --range LOW HIGH, the values of black and white")
        out[start : start + rows] = ((whole + 128) // 257).astype(np.uint8)
    return out
