"""What a picture file says besides its pixels: orientation, whether it has several frames, which metadata are damaged.

Pixels are what counts: text, EXIF, XMP, colour profiles and gamma that are damaged, or larger than MAX_METADATA, are
noted in `Facts.broken` and never stop a picture. Orientation is applied where it can be read.
"""

from __future__ import annotations

import re
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

MAX_METADATA = 1 << 20  #: bytes of one piece of metadata, also after decompression
MAX_CHECKED = 16  #: pieces of metadata of a file that are decompressed and checked; further ones are not
INFO = "selftrans"  #: of an opened picture, `image.info[INFO]` holds its Facts
EXIF, PROFILE, TEXT, GAMMA = "EXIF", "colour profile", "text", "gamma and size"
ORIENTATION = 0x0112  #: tag of EXIF and TIFF
XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)([1-8])")


@dataclass
class Facts:
    """What a reader of pixels needs to know of the metadata of one file."""

    orientation: int | None = None  #: 1 .. 8 as in EXIF; None: not given
    broken: set[str] = field(default_factory=set)  #: kinds of metadata that are damaged or too large, and ignored
    several: bool = False  #: animated, or of several pages
    deep: bool = False  #: colour in 16 bits per channel, of which Pillow reads the upper 8
    checked: int = 0  #: pieces decompressed so far

    def add_exif(self, data: bytes) -> None:
        """Take the orientation from EXIF, with or without its prefix."""
        try:
            self.orientation = exif_orientation(data) or self.orientation
        except ValueError:
            self.broken.add(EXIF)

    def add_xmp(self, data: bytes) -> None:
        """Take the orientation from XMP, where EXIF has none."""
        found = XMP_ORIENTATION.search(data[:MAX_METADATA])
        if found and self.orientation is None:
            self.orientation = int(found[1])

    def add_profile(self, data: bytes) -> None:
        """Check the signature of an ICC profile; what it says is not used."""
        if data[36:40] != b"acsp":
            self.broken.add(PROFILE)

    def inflate(self, data: bytes, kind: str) -> bytes:
        """Decompressed metadata; empty when they are damaged, too large, or come after MAX_CHECKED others."""
        self.checked += 1
        if self.checked > MAX_CHECKED:
            return b""
        decompressor, out = zlib.decompressobj(), b""
        with suppress(zlib.error):
            out = decompressor.decompress(data, MAX_METADATA + 1)
        if not decompressor.eof or len(out) > MAX_METADATA:
            self.broken.add(kind)
            return b""
        return out


def exif_orientation(data: bytes) -> int | None:
    """The orientation in EXIF, 1 .. 8; None when it does not say one. Raises ValueError when it cannot be read."""
    data = data.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    try:
        if order is None:
            raise ValueError("EXIF without its header")
        (start,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, start)
        for k in range(count):
            tag, kind, number = struct.unpack_from(order + "HHI", data, start + 2 + 12 * k)
            if tag == ORIENTATION:
                if number != 1 or kind not in (1, 3, 4):
                    raise ValueError("an orientation that is no number")
                (value,) = struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}[kind], data, start + 10 + 12 * k)
                return value if 1 <= value <= 8 else None
    except struct.error as error:
        raise ValueError("EXIF that ends early") from error
    return None


def facts_of(image: Image.Image) -> Facts:
    """The facts of a picture; of one that `open_picture` did not open, those that Pillow knows."""
    facts = image.info.get(INFO)
    if isinstance(facts, Facts):
        return facts
    facts = Facts()
    add_info(facts, image)
    return facts


def add_info(facts: Facts, image: Image.Image) -> None:
    """Add what Pillow found in a file of any format."""
    if tags := getattr(image, "tag_v2", None):  # a TIFF: bits and samples of a pixel
        facts.deep = 16 in tags.get(258, ()) and tags.get(277, 1) >= 3
    exif, xmp, profile = (image.info.get(name) for name in ("exif", "xmp", "icc_profile"))
    if isinstance(exif, bytes):
        facts.add_exif(exif)
    if isinstance(xmp, bytes):
        facts.add_xmp(xmp)
    if isinstance(profile, bytes) and profile:
        facts.add_profile(profile)


def orientation_of(image: Image.Image) -> int:
    """1 .. 8 as EXIF counts; a TIFF counts as upright, since Pillow turns it when it is loaded."""
    return 1 if hasattr(image, "tag_v2") else facts_of(image).orientation or 1


def turned_upright(image: Image.Image) -> Image.Image:
    """The picture with its orientation applied; decodes it. Raises what the decoder raises."""
    from PIL import Image, ImageOps

    if hasattr(image, "tag_v2") and getattr(image, "_im", None) is None:
        # otherwise Pillow's limit of pixels, which is global, would apply: `check_pixels` has its own
        image.im = Image.core.new(image.mode, getattr(image, "_tile_size", image.size))
    image.load()
    if hasattr(image, "tag_v2"):
        with suppress(Exception):  # older versions of Pillow do not turn it themselves; damaged tags turn nothing
            ImageOps.exif_transpose(image, in_place=True)
        return image
    turn = Image.Transpose
    flips = (turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE)
    methods = (*flips, turn.ROTATE_270, turn.TRANSVERSE, turn.ROTATE_90)  # of orientations 2 .. 8
    orientation = orientation_of(image)
    return image if orientation == 1 else image.transpose(methods[orientation - 2])
