"""One picture file ⇒ one square uint8 array. Shape legend: (R, R, C) image, R resolution, C 1 (grey) or 3 (RGB)."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from selftrans.storage import first_line, printable

if TYPE_CHECKING:
    from PIL import Image

#: extensions of picture files, and the only PIL decoders that may run (others call external programs)
EXTENSIONS = frozenset(
    (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)
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
    reason = first_line(error)
    if isinstance(error, OSError) and error.errno in MACHINE_FAULTS:
        return ValueError(f"{printable(name)}: cannot be read now ({reason}); the picture may be valid: repeat later")
    if type(error).__name__ == "UnidentifiedImageError":  # its message contains a memory address
        reason = "empty, or of an unknown format"
    return BadPicture(name, reason)


class _File(io.BufferedReader):
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

    image = Image.open(_File(file) if isinstance(file, Path) else file, formats=FORMATS)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        image.close()
        raise ValueError(f"{image.width}x{image.height} is more than the limit of {limit} pixels")
    return image


def to_array(image: Image.Image, resolution: int, channels: int) -> np.ndarray:
    """Decode, turn upright, convert to 8 bits, crop to the central square and resize: (R, R, C) uint8.

    EXIF orientation is applied; transparency is composited on white; palette, grey, CMYK and 16-bit pictures become RGB
    (or grey when `channels` is 1); colour profiles are ignored. See `centre_square` for the resampling.
    """
    from PIL import ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    square = centre_square(_eight_bit(image, "L" if channels == 1 else "RGB"), resolution)
    return np.array(square, dtype=np.uint8).reshape(resolution, resolution, channels)


def centre_square(image: Image.Image, resolution: int) -> Image.Image:
    """The central square at `resolution`, as ADM prepares ImageNet (Dhariwal & Nichol, 2105.05233).

    Halved with a box filter while the short side is at least twice the resolution, then resized with an antialiased
    bicubic filter so that the short side fits, then cropped. The last two are one resampling of the cropped region,
    with the same weights, so that a very long picture costs no memory.
    """
    from PIL import Image

    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if image.size == (resolution, resolution):
        return image
    scale = resolution / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    box = (left, top, left + resolution, top + resolution)
    across, down = image.width / width, image.height / height
    return image.resize(
        (resolution, resolution),
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
