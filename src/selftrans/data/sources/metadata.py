"""What a picture file says besides its pixels: orientation, whether it has several frames, which metadata are damaged.

Pixels are what counts: text, EXIF, XMP, colour profiles and gamma that are damaged, or larger than MAX_METADATA, are
noted in `Facts.broken` and never stop a picture. Orientation is applied where it can be read. Decoders of PNG and AVIF stop at
damaged or bulky metadata, so they are given a file without them (`pixels_only`).
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

if TYPE_CHECKING:
    from PIL import Image

MAX_METADATA = 1 << 20  #: bytes of one piece of metadata, also after decompression
MAX_CHECKED = 16  #: pieces of metadata of a file that are decompressed and checked; further ones are not
INFO = "selftrans"  #: of an opened picture, `image.info[INFO]` holds its Facts
EXIF, PROFILE, TEXT, GAMMA = "EXIF", "colour profile", "text", "gamma and size"
ORIENTATION = 0x0112  #: tag of EXIF and TIFF
XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)([1-8])")
MAX_PARTS = 1 << 20  #: of a file; one with more chunks is read as it is
MAX_COPIED = 1 << 28  #: bytes; so is a larger file
#: ancillary chunks of PNG with a fixed size
FIXED = {b"gAMA": 4, b"cHRM": 32, b"pHYs": 9, b"sRGB": 1, b"tIME": 7}
#: the entry of an EXIF item in the table of a HEIF file, of version 2 or 3
EXIF_ITEM = re.compile(rb"(infe(?:\x02...(?:..)|\x03...(?:....))..)Exif", re.DOTALL)


#: (start, end) in a file, or bytes in place of some of it
Part: TypeAlias = tuple[int, int] | bytes


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


def pixels_only(file: BinaryIO) -> tuple[BinaryIO, Facts]:
    """A file to decode, and what its metadata say. Of a PNG or AVIF file, it is a copy of the parts that the pixels need.

    These are found without decoding. A file whose structure is not understood is given as it is: the decoder says what is
    wrong.
    """
    facts, size = Facts(), file.seek(0, io.SEEK_END)
    head, parts = _at(file, 0, 16), None
    try:
        if head.startswith(b"\x89PNG\r\n\x1a\n"):
            parts = _png_parts(file, size, facts)
        elif head[4:8] == b"ftyp":
            parts = _avif_parts(file, size)
    except (struct.error, IndexError, ValueError):  # the structure ends early: the decoder says so
        parts = None
    if parts is None or size > MAX_COPIED:
        file.seek(0)
        return file, facts
    return io.BytesIO(b"".join(p if isinstance(p, bytes) else _at(file, p[0], p[1] - p[0]) for p in parts)), facts


def _at(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


def _png_parts(file: BinaryIO, size: int, facts: Facts) -> list[Part] | None:
    """The critical chunks and the transparency. Of an animation the default picture remains."""
    parts, at, dropped = [(0, 8)], 8, False
    while at + 12 <= size and len(parts) < MAX_PARTS:
        length, kind = struct.unpack(">I4s", _at(file, at, 8))
        end = at + 12 + length
        if not kind.isalpha():
            return None
        critical = not kind[0] & 0x20
        if critical or kind == b"tRNS":
            begin = parts.pop()[0] if parts[-1][1] == at else at  # neighbours are one part
            parts.append((begin, min(end, size)))
        else:
            dropped = True
            facts.several |= kind == b"acTL"
            data = _at(file, at + 8, length) if length <= MAX_METADATA and end <= size else None
            _png_metadata(kind, data, facts)
        if kind == b"IHDR" and length == 13:
            depth, colour = _at(file, at + 16, 2)
            facts.deep = depth == 16 and colour in (2, 4, 6)
        at = end
        if kind == b"IEND":
            break
    return [*parts] if dropped else None


def _png_metadata(kind: bytes, data: bytes | None, facts: Facts) -> None:
    """Take note of one ancillary chunk; `data` None: too large, or truncated."""
    names = {b"eXIf": EXIF, b"iCCP": PROFILE, b"tEXt": TEXT, b"zTXt": TEXT, b"iTXt": TEXT} | dict.fromkeys(FIXED, GAMMA)
    if kind not in names:
        return
    if data is None or len(data) != FIXED.get(kind, len(data)):
        facts.broken.add(names[kind])
    elif kind == b"eXIf":
        facts.add_exif(data)
    elif kind in (b"iCCP", b"zTXt"):
        name, _, rest = data.partition(b"\0")
        text = facts.inflate(rest[1:], names[kind])
        if kind == b"iCCP" and text:
            facts.add_profile(text)
        if name.startswith(b"Raw profile type ") and name.endswith((b"exif", b"APP1")):
            _add_hexadecimal(text, facts)
    elif kind == b"iTXt":
        name, _, rest = data.partition(b"\0")
        text = rest[2:].split(b"\0", 2)[-1]
        text = facts.inflate(text, TEXT) if rest[:1] == b"\1" else text
        if name == b"XML:com.adobe.xmp":
            facts.add_xmp(text)


def _add_hexadecimal(text: bytes, facts: Facts) -> None:
    """EXIF as ImageMagick writes it: a name, a length, and hexadecimal digits."""
    try:
        facts.add_exif(bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii")))
    except ValueError:
        facts.broken.add(EXIF)


def _avif_parts(file: BinaryIO, size: int) -> list[Part] | None:
    """The file with its EXIF item under a name that decoders ignore. A HEIF picture is turned by properties of its own."""
    head = _at(file, 0, min(size, MAX_METADATA))
    renamed = EXIF_ITEM.sub(rb"\1skip", head)
    return None if renamed == head else [renamed, (len(head), size)]
