"""One picture file ⇒ one uint8 array. Shape legend: (H, W, C) image, C 1 (grey) or 3 (RGB); a resolution is R, of a square,
or (height, width)."""

from __future__ import annotations

import errno
import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import numpy as np

from selftrans.storage import first_line, printable

if TYPE_CHECKING:
    from PIL import Image

Resolution: TypeAlias = int | tuple[int, int]  #: the side of a square, or (height, width)

#: extensions of picture files, and the only PIL decoders that may run (others call external programs)
EXTENSIONS = frozenset(
    (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)
SOUNDS = frozenset((".flac", ".wav"))  #: extensions of sounds
VIDEOS = frozenset((".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"))  #: of videos; a .gif can be either
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
#: faults of the machine, not of one picture: skipping the picture would lose good data
MACHINE_FAULTS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT})


class BadSample(ValueError):
    """A sample that cannot be used. `name` is its path in the source, `reason` is one line."""

    def __init__(self, name: str, reason: str, fault: str = "cannot be used") -> None:
        super().__init__(f"{printable(name, 1000)}: {fault} ({reason})")
        self.name, self.reason = name, reason


class BadPicture(BadSample):
    """A picture that cannot be read."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason, "cannot be read as a picture")


def bad_picture(name: str, error: Exception) -> Exception:
    """The error to raise when decoding a picture raised `error`: BadPicture, unless the fault is in the machine."""
    if isinstance(error, BadPicture | MemoryError):
        return error
    if fault := machine_fault(name, error, "picture"):
        return fault
    reason = first_line(error)
    if type(error).__name__ == "UnidentifiedImageError":  # its message contains a memory address
        reason = "empty, or of an unknown format"
    return BadPicture(name, reason)


def machine_fault(name: str, error: Exception, noun: str) -> ValueError | None:
    """The error to raise when `error` is a fault of the machine and not of the file; None for any other."""
    if not isinstance(error, OSError) or error.errno not in MACHINE_FAULTS:
        return None
    return ValueError(
        f"{printable(name)}: cannot be read now ({first_line(error)}); the {noun} may be valid: repeat later"
    )


class BoundedFile(io.BufferedReader):
    """A file whose reads allocate at most its size, not the length that a malicious chunk header claims."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        return super().read(size if size is None else min(size, self._size))

    def __del__(self) -> None:
        self.close()  # PIL leaves it open


def open_picture(file: Path | BinaryIO) -> Image.Image:
    """Open a picture and read its header, not its pixels.

    Raises ValueError when it has more pixels than PIL's limit against decompression bombs
    (`PIL.Image.MAX_IMAGE_PIXELS`), and whatever PIL raises for a file that is not a picture.
    """
    from PIL import Image

    image = Image.open(BoundedFile(file) if isinstance(file, Path) else file, formats=FORMATS)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        image.close()
        raise ValueError(f"{image.width}x{image.height} is more than the limit of {limit} pixels")
    return image


def sides(resolution: Resolution) -> tuple[int, int]:
    """(height, width) of a resolution; a number is the side of a square."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def check_square(resolution: Resolution | None) -> None:
    """ValueError for pictures that are not square, which an encoder of `--features` cannot read."""
    if resolution is not None and not isinstance(resolution, int):
        raise ValueError(
            f"--features reads square pictures, and these are prepared at {size_text(resolution)}; give --resolution SIDE, "
            "or omit --features"
        )


def resolution_of(height: int, width: int) -> Resolution:
    """The inverse of `sides`."""
    return height if height == width else (height, width)


def size_text(resolution: Resolution) -> str:
    """HEIGHTxWIDTH."""
    return "x".join(map(str, sides(resolution)))


def parse_resolution(text: str) -> Resolution:
    """Parse SIDE or HEIGHTxWIDTH. Raises ValueError for any other text."""
    match = re.fullmatch(r"([1-9]\d{0,5})(?:[xX×]([1-9]\d{0,5}))?", text.strip())
    if match is None:
        raise ValueError(f"resolution {text!r} should be a side, as 256, or HEIGHTxWIDTH, as 192x256")
    return resolution_of(int(match[1]), int(match[2] or match[1]))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of a picture after EXIF orientation; reads its header only."""
    width, height = image.size
    turned = width != height and image.getexif().get(0x0112) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def to_array(image: Image.Image, resolution: Resolution, channels: int) -> np.ndarray:
    """Decode, turn upright, convert to 8 bits, crop to the central rectangle and resize: (H, W, C) uint8.

    EXIF orientation is applied; transparency is composited on white; palette, grey, CMYK and 16-bit pictures become RGB
    (or grey when `channels` is 1); colour profiles are ignored. See `centre_crop` for the resampling.
    """
    from PIL import ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    height, width = sides(resolution)
    cropped = centre_crop(_eight_bit(image, "L" if channels == 1 else "RGB"), height, width)
    return np.array(cropped, dtype=np.uint8).reshape(height, width, channels)


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


def _eight_bit(image: Image.Image, mode: str) -> Image.Image:
    """`image` in 8 bits per channel, in `mode` L or RGB."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pictures have no agreed range; save it in 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("integers beyond 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)
