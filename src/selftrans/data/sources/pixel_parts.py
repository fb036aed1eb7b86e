"""The parts of a PNG, JPEG, WebP, AVIF or TIFF file that its pixels need, found without decoding.

Decoders stop at damaged or bulky metadata, so they are given a file without them. A file whose structure is not
understood is given as it is, and the decoder says what is wrong. Each function takes a file of `size` bytes and
returns its parts, or None for the file as it is; what the metadata say is added to `Facts`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from selftrans.data.sources.metadata import (
    EXIF,
    GAMMA,
    MAX_METADATA,
    PROFILE,
    TAGS,
    TEXT,
    XMP,
    Facts,
)
from selftrans.data.sources.part_file import Part, PartFile, size_of

MAX_PARTS = 1 << 20  #: of a file; one with more chunks is read as it is
#: ancillary chunks of PNG with a fixed size
FIXED = {b"gAMA": 4, b"cHRM": 32, b"pHYs": 9, b"sRGB": 1, b"tIME": 7}
#: tags of TIFF that say how pixels are stored; all others may be left out
PIXEL_TAGS = frozenset(
    (
        *(254, 255, 256, 257, 258, 259, 262, 263, 266, 273, 274, 277, 278, 279, 280, 281, 284, 292, 293, 297, 301),
        *(317, 318, 319, 320, 322, 323, 324, 325, 332, 334, 336, 338, 339, 340, 341, 347, *range(512, 522)),
        *(529, 530, 531, 532, 50674),
    )
)
DIRECTORIES = (34665, 34853, 40965)  #: tags of TIFF that name directories of EXIF
MAX_ENTRIES = 4096  #: of a directory
#: the entry of an EXIF item in the table of a HEIF file, of version 2 or 3
EXIF_ITEM = re.compile(rb"(infe(?:\x02...(?:..)|\x03...(?:....))..)Exif", re.DOTALL)
#: bytes of a value of each type of TIFF
TIFF_TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def pixels_only(file: BinaryIO) -> tuple[BinaryIO, Facts]:
    """A file to decode, and what its metadata say. The position of the file is its start."""
    facts, size = Facts(), size_of(file)
    head = file.read(16)
    find = next((find for magic, find in FINDERS if head.startswith(magic)), None)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        find = webp_parts
    elif head[4:8] == b"ftyp":
        find = avif_parts
    parts = None
    if find:
        try:
            parts = find(file, size, facts)
        except (struct.error, IndexError, ValueError):  # the structure ends early: the decoder says so
            parts = None
    file.seek(0)
    return file if parts is None else PartFile(file, parts).buffered(), facts


def _at(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


def png_parts(file: BinaryIO, size: int, facts: Facts) -> list[Part] | None:
    """The critical chunks and the transparency. Of an animation the default picture remains."""
    parts: list[Part] = [(0, 8)]
    at, dropped = 8, False
    while at + 12 <= size and len(parts) < MAX_PARTS:
        length, kind = struct.unpack(">I4s", _at(file, at, 8))
        end = at + 12 + length
        if not kind.isalpha():
            return None
        critical = not kind[0] & 0x20
        if critical or kind == b"tRNS":
            parts.append((at, min(end, size)))
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
    return _joined(parts) if dropped else None


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


def jpeg_parts(file: BinaryIO, size: int, facts: Facts) -> list[Part] | None:
    """All but the application segments that do not concern pixels (APP0 and APP14 do) and comments."""
    parts: list[Part] = [(0, 2)]
    at, profile, dropped = 2, b"", False
    while at + 4 <= size and len(parts) < MAX_PARTS:
        mark, marker, length = struct.unpack(">BBH", _at(file, at, 4))
        if mark != 0xFF:
            return None
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD7:  # fill bytes and markers without a length
            parts.append((at, at + (1 if marker == 0xFF else 2)))
            at += 1 if marker == 0xFF else 2
            continue
        end = at + 2 + length
        if marker == 0xDA:  # pixels follow
            parts.append((at, size))
            break
        if length < 2 or end > size:
            return None
        if marker == 0xFE or (0xE1 <= marker <= 0xEF and marker != 0xEE):
            dropped = True
            data = _at(file, at + 4, length - 2)
            if marker == 0xE1 and data.startswith(b"Exif\0"):
                facts.add_exif(data)
            elif marker == 0xE1 and data.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                facts.add_xmp(data)
            elif marker == 0xE2 and data.startswith(b"ICC_PROFILE\0") and not profile:
                profile = data[14:]
                facts.add_profile(profile)
        else:
            parts.append((at, end))
        at = end
    return _joined(parts) if dropped else None


def webp_parts(file: BinaryIO, size: int, facts: Facts) -> list[Part] | None:
    """All but EXIF, XMP and the colour profile."""
    kept, at, dropped = list[Part](), 12, False
    checks: dict[bytes, tuple[str, Callable[[bytes], None]]]
    checks = {b"EXIF": (EXIF, facts.add_exif), b"XMP ": (XMP, facts.add_xmp), b"ICCP": (PROFILE, facts.add_profile)}
    while at + 8 <= size and len(kept) < MAX_PARTS:
        kind, length = struct.unpack("<4sI", _at(file, at, 8))
        end = at + 8 + length + length % 2
        if kind in checks:
            dropped = True
            name, check = checks[kind]
            if length > MAX_METADATA or at + 8 + length > size:
                facts.broken.add(name)
            else:
                check(_at(file, at + 8, length))
        elif kind == b"VP8X" and length >= 10:
            flags = _at(file, at + 8, 1)[0]
            facts.several |= bool(flags & 2)
            kept += [_at(file, at, 8), bytes([flags & ~0x2C]), (at + 9, min(end, size))]  # none of the three
        else:
            kept.append((at, min(end, size)))
        at = end
    if not dropped:
        return None
    total = sum(len(part) if isinstance(part, bytes) else part[1] - part[0] for part in kept)
    return [b"RIFF" + struct.pack("<I", total + 4) + b"WEBP", *kept]


def avif_parts(file: BinaryIO, size: int, facts: Facts) -> list[Part] | None:
    """The file with its EXIF item under a name that decoders ignore. A HEIF picture is turned by properties of its own."""
    head = _at(file, 0, min(size, MAX_METADATA))
    renamed = EXIF_ITEM.sub(rb"\1skip", head)
    return None if renamed == head else [renamed, (len(head), size)]


class _Tiff(NamedTuple):
    """How numbers are stored in a TIFF, or a BigTIFF."""

    order: str  #: < or >
    offset: str  #: format of an offset
    number: str  #: format of the number of entries

    @property
    def width(self) -> int:
        return struct.calcsize(self.offset)

    @property
    def step(self) -> int:
        """Bytes of an entry."""
        return 4 + 2 * self.width

    def table(self, file: BinaryIO, start: int) -> tuple[bytes, int]:
        """The entries of a directory, and where they end. Raises ValueError for too many, struct.error at the file's end."""
        size = struct.calcsize(self.order + self.number)
        (count,) = struct.unpack(self.order + self.number, _at(file, start, size))
        if count > MAX_ENTRIES:
            raise ValueError(f"{count} entries")
        table = _at(file, start + size, count * self.step)
        if len(table) < count * self.step:
            raise struct.error("it ends early")
        return table, start + size + len(table)

    def entry(self, data: bytes) -> tuple[int, int, int, int]:
        """Tag, type, bytes of the value (0 for an unknown type), and where these are if they are not in the entry."""
        tag, kind, number = struct.unpack_from(f"{self.order}HH{self.offset}", data)
        (value,) = struct.unpack_from(self.order + self.offset, data, 4 + self.width)
        return tag, kind, TIFF_TYPES.get(kind, 0) * number, value

    def fits(self, data: bytes, size: int) -> bool:
        """Whether the value of an entry is inside a file of `size` bytes, and not too large."""
        *_, length, value = self.entry(data)
        return 0 < length <= self.width or 0 < length <= min(MAX_METADATA, size - value)


def tiff_parts(file: BinaryIO, size: int, facts: Facts) -> list[Part] | None:
    """The file with a directory of the tags that pixels need, if others are damaged or large."""
    head = _at(file, 0, 16)
    big = head[2:4] in (b"+\0", b"\0+")
    tiff = _Tiff("<" if head[:2] == b"II" else ">", *(("Q", "Q") if big else ("I", "H")))
    (start,) = struct.unpack_from(tiff.order + tiff.offset, head, 8 if big else 4)
    table, end = tiff.table(file, start)
    (following,) = struct.unpack(tiff.order + tiff.offset, _at(file, end, tiff.width))
    facts.several |= 0 < following < size
    kept, values = list[bytes](), dict[int, int]()
    for entry in _split(table, tiff.step):
        tag, kind, length, value = tiff.entry(entry)
        if tag in PIXEL_TAGS:
            kept.append(entry)
            short = entry[4 + tiff.width :][:2] if length <= tiff.width else _at(file, value, 2)
            values[tag] = struct.unpack(tiff.order + "H", short)[0] if kind == 3 and len(short) == 2 else 0
        elif not tiff.fits(entry, size):
            facts.broken.add({34675: PROFILE, 700: XMP}.get(tag, TAGS))
        elif tag in DIRECTORIES and not _sound_directory(tiff, file, entry, size):
            facts.broken.add(EXIF)
        elif tag == 34675:
            facts.add_profile(_at(file, value, 40) if length > tiff.width else b"")
    facts.deep = values.get(258) == 16 and values.get(277, 1) >= 3
    if not facts.broken or size + 1 >= 1 << (8 * tiff.width):
        return None
    pad = b"\0" * (size % 2)
    header = head[: 8 if big else 4] + struct.pack(tiff.order + tiff.offset, size + len(pad))
    directory = struct.pack(tiff.order + tiff.number, len(kept)) + b"".join(kept) + b"\0" * tiff.width
    return [header, (len(header), size), pad + directory]


def _sound_directory(tiff: _Tiff, file: BinaryIO, entry: bytes, size: int) -> bool:
    """Whether an entry names a directory of tags that are all inside the file."""
    value = tiff.entry(entry)[3] if tiff.entry(entry)[1] in (4, 13, 16, 18) else 0
    try:
        return value > 0 and all(tiff.fits(each, size) for each in _split(tiff.table(file, value)[0], tiff.step))
    except (struct.error, ValueError):
        return False


def _split(table: bytes, step: int) -> list[bytes]:
    return [table[k : k + step] for k in range(0, len(table), step)]


def _joined(parts: list[Part]) -> list[Part]:
    """The same parts, with neighbours joined."""

    def joined() -> Iterator[Part]:
        start, end = 0, 0
        for part in parts:
            assert not isinstance(part, bytes), "parts of the file"
            if part[0] != end:
                yield start, end
                start = part[0]
            end = part[1]
        yield start, end

    return list(joined())


#: the first bytes of a format, and where its pixels are found
FINDERS: tuple[tuple[bytes, Callable[[BinaryIO, int, Facts], list[Part] | None]], ...] = (
    (b"\x89PNG\r\n\x1a\n", png_parts),
    (b"\xff\xd8\xff", jpeg_parts),
    (b"II*\0", tiff_parts),
    (b"MM\0*", tiff_parts),
    (b"II+\0", tiff_parts),
    (b"MM\0+", tiff_parts),
)
