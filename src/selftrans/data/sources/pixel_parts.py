"""The parts of a PNG or AVIF file that its pixels need, found without decoding.

Decoders of these formats stop at damaged or bulky metadata, so they are given a file without them. A file whose structure is
not understood is given as it is, and the decoder says what is wrong. Each function takes a file of `size` bytes and returns its
parts, or None for the file as it is; what the metadata say is added to `Facts`.
"""

from __future__ import annotations

import re
import struct
from typing import BinaryIO

from selftrans.data.sources.metadata import EXIF, GAMMA, MAX_METADATA, PROFILE, TEXT, Facts
from selftrans.data.sources.part_file import Part, PartFile, size_of

MAX_PARTS = 1 << 20  #: of a file; one with more chunks is read as it is
#: ancillary chunks of PNG with a fixed size
FIXED = {b"gAMA": 4, b"cHRM": 32, b"pHYs": 9, b"sRGB": 1, b"tIME": 7}
#: the entry of an EXIF item in the table of a HEIF file, of version 2 or 3
EXIF_ITEM = re.compile(rb"(infe(?:\x02...(?:..)|\x03...(?:....))..)Exif", re.DOTALL)


def pixels_only(file: BinaryIO) -> tuple[BinaryIO, Facts]:
    """A file to decode, and what its metadata say. The position of the file is its start."""
    facts, size = Facts(), size_of(file)
    head, parts = file.read(16), None
    try:
        if head.startswith(b"\x89PNG\r\n\x1a\n"):
            parts = png_parts(file, size, facts)
        elif head[4:8] == b"ftyp":
            parts = avif_parts(file, size)
    except (struct.error, IndexError, ValueError):  # the structure ends early: the decoder says so
        parts = None
    file.seek(0)
    return file if parts is None else PartFile(file, parts).buffered(), facts


def _at(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


def png_parts(file: BinaryIO, size: int, facts: Facts) -> list[Part] | None:
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


def avif_parts(file: BinaryIO, size: int) -> list[Part] | None:
    """The file with its EXIF item under a name that decoders ignore. A HEIF picture is turned by properties of its own."""
    head = _at(file, 0, min(size, MAX_METADATA))
    renamed = EXIF_ITEM.sub(rb"\1skip", head)
    return None if renamed == head else [renamed, (len(head), size)]
