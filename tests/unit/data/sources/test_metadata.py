"""Metadata never cost a picture: files of every format with damaged or bulky metadata have the pixels of the plain file."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from selftrans.data.sources import metadata
from selftrans.data.sources.decode import open_picture, to_array, upright_size
from selftrans.data.sources.metadata import Facts, exif_orientation, facts_of
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.read_warnings import ReadWarnings
from tests.support.memory import traced_peak
from tests.support.pictures import encoded, noise, write, zipped

PIXELS = noise(24)[:16]  # 16 high, 24 wide
PICTURE = Image.fromarray(PIXELS)


def exif(orientation: int = 6, note: str = "x" * 40) -> bytes:
    made = Image.Exif()
    made[0x0112], made[0x010E] = orientation, note
    return made.tobytes()


def damaged_exif(orientation: int) -> bytes:
    """EXIF whose description, the tag before the orientation, is said to be far outside of it."""
    data = bytearray(exif(orientation))
    start = len(b"Exif\0\0")
    struct.pack_into(("<" if data[start:].startswith(b"II") else ">") + "I", data, start + 10 + 8, 10**9)
    return bytes(data)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, last: bool = False) -> bytes:
    """A PNG with chunks after its header, or (last) before its end."""
    plain = encoded(PICTURE)
    at = len(plain) - 12 if last else 33
    return plain[:at] + b"".join(chunks) + plain[at:]


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def jpeg(*segments: bytes) -> bytes:
    plain = encoded(PICTURE, "JPEG", quality=95)
    return plain[:2] + b"".join(segments) + plain[2:]


BIG = zlib.compress(b" " * 2_000_000)
RANDOM = np.random.default_rng(0).bytes(100)
#: name -> file, and the kinds of metadata that are noticed
DAMAGED: dict[str, tuple[Callable[[], bytes], set[str]]] = {
    "png zTXt of 2 MB": (lambda: png(chunk(b"zTXt", b"k\0\0" + BIG)), {"text"}),
    "png iTXt of 2 MB": (lambda: png(chunk(b"iTXt", b"k\0\1\0\0\0" + BIG)), {"text"}),
    "png tEXt of 2 MB": (lambda: png(chunk(b"tEXt", b"k\0" + b"x" * 2_000_000)), {"text"}),
    "png zTXt after the pixels": (lambda: png(chunk(b"zTXt", b"k\0\0" + BIG), last=True), {"text"}),
    "png zTXt that is damaged": (lambda: png(chunk(b"zTXt", b"k\0\0" + RANDOM)), {"text"}),
    "png tEXt of a wrong checksum": (lambda: png(chunk(b"tEXt", b"k\0v")[:-4] + b"abcd"), set()),
    "png eXIf of random bytes": (lambda: png(chunk(b"eXIf", RANDOM)), {"EXIF"}),
    "png eXIf that ends early": (lambda: png(chunk(b"eXIf", exif().removeprefix(b"Exif\0\0")[:12])), {"EXIF"}),
    "png iCCP of random bytes": (lambda: png(chunk(b"iCCP", b"x\0\0" + RANDOM)), {"colour profile"}),
    "png iCCP that is no profile": (lambda: png(chunk(b"iCCP", b"x\0\0" + zlib.compress(RANDOM))), {"colour profile"}),
    "png gAMA of one byte": (lambda: png(chunk(b"gAMA", b"\0")), {"gamma and size"}),
    "png cHRM and pHYs, empty": (lambda: png(chunk(b"cHRM", b""), chunk(b"pHYs", b"")), {"gamma and size"}),
    "png truncated after the pixels": (lambda: png(chunk(b"zTXt", b"k\0\0" + BIG), last=True)[:-400], {"text"}),
    "jpeg EXIF of random bytes": (lambda: jpeg(segment(0xE1, b"Exif\0\0" + RANDOM)), {"EXIF"}),
    "jpeg EXIF with a tag outside": (lambda: jpeg(segment(0xE1, damaged_exif(1))), set()),
    "jpeg MPF of random bytes": (lambda: jpeg(segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff" + RANDOM)), set()),
    "jpeg profile of random bytes": (lambda: jpeg(segment(0xE2, b"ICC_PROFILE\0\1\1" + RANDOM)), {"colour profile"}),
    "jpeg Photoshop of random bytes": (lambda: jpeg(segment(0xED, b"Photoshop 3.0\x008BIM" + RANDOM)), set()),
    "webp EXIF and profile": (
        lambda: encoded(PICTURE, "WEBP", lossless=True, exif=RANDOM, icc_profile=RANDOM),
        {"EXIF", "colour profile"},
    ),
    "tiff profile": (lambda: encoded(PICTURE, "TIFF", icc_profile=RANDOM), {"colour profile"}),
    "gif comment": (lambda: encoded(PICTURE.convert("P"), "GIF", comment=b"x" * 100_000), set()),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_picture_with_damaged_metadata_has_its_pixels(name: str) -> None:
    make, noticed = DAMAGED[name]
    kind = name.split()[0]
    plain = Image.open(io.BytesIO({"jpeg": jpeg(), "gif": encoded(PICTURE.convert("P"), "GIF")}.get(kind, png())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's too
        with open_picture(io.BytesIO(make())) as image:
            assert upright_size(image) == (16, 24)
            np.testing.assert_array_equal(to_array(image, (16, 24), 3), np.asarray(plain.convert("RGB")))
            assert facts_of(image).broken == noticed


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "XMP", "ImageMagick"])
def test_orientation_is_applied_in_every_format(kind: str, orientation: int) -> None:
    if kind == "XMP":
        data = png(chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<a tiff:Orientation="%d"/>' % orientation))
    elif kind == "ImageMagick":
        text = b"\nexif\n%8d\n" % len(exif(orientation)) + exif(orientation).hex().encode() + b"\n"
        data = png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)))
    elif kind == "TIFF":
        data = encoded(PICTURE, "TIFF", tiffinfo={274: orientation})
    else:
        data = encoded(PICTURE, kind, exif=exif(orientation), **({"lossless": True} if kind == "WEBP" else {}))
    turns: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda x: x, lambda x: x[:, ::-1], lambda x: x[::-1, ::-1], lambda x: x[::-1],
        lambda x: x.swapaxes(0, 1), lambda x: np.rot90(x, -1), lambda x: x[::-1, ::-1].swapaxes(0, 1), np.rot90,
    ]  # fmt: skip
    expected = turns[orientation - 1](PIXELS)
    with open_picture(io.BytesIO(data)) as image:
        assert upright_size(image) == expected.shape[:2]
        found = to_array(image, expected.shape[:2], 3)
    if kind == "JPEG":  # lossy: the nearest of the eight is the right one
        off = [np.abs(found.astype(int) - turn(PIXELS)).mean() for turn in turns if turn(PIXELS).shape == found.shape]
        assert min(off) == np.abs(found.astype(int) - expected).mean()
    else:
        np.testing.assert_array_equal(found, expected)


def test_orientation_is_read_where_other_tags_are_damaged() -> None:
    data = damaged_exif(6)
    assert exif_orientation(data) == 6 and exif_orientation(data.removeprefix(b"Exif\0\0")) == 6
    assert exif_orientation(exif(0)) is None and exif_orientation(exif(9)) is None
    for broken in (b"", b"II*\0", RANDOM, b"MM\0*\0\0\0\x08\0\x09"):
        with pytest.raises(ValueError, match="EXIF"):
            exif_orientation(broken)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_with_damaged_exif_is_read() -> None:
    plain = encoded(PICTURE, "AVIF", quality=90)
    data = bytearray(encoded(PICTURE, "AVIF", quality=90, exif=exif(1)))
    at = max(data.find(b"MM\0*"), data.find(b"II*\0"))
    assert at > 0 and b"Exif" in data
    data[at : at + 8] = b"damaged!"
    read = [to_array(open_picture(io.BytesIO(bytes(each))), (16, 24), 3) for each in (plain, data)]
    np.testing.assert_array_equal(*read)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_damaged_metadata_are_said_once(tmp_path: Path, kind: str) -> None:
    files = {f"{i}.png": png(chunk(b"eXIf", RANDOM), chunk(b"zTXt", b"k\0\0" + BIG)) for i in range(3)} | {
        "x.png": png()
    }
    source = open_source(write(tmp_path / "x", files) if kind == "folder" else zipped(tmp_path / "x.zip", files))
    for i in range(4):
        np.testing.assert_array_equal(source.read(i), PIXELS)
    with pytest.warns(UserWarning, match="ignored in 3 pictures") as said:
        source.read_warnings.emit()
    assert [str(each.message) for each in said] == [
        "metadata that are damaged, or of more than 1 MB, are ignored in 3 pictures (3 EXIF, 3 text), such as 0.png; the "
        "pixels are read"
    ]
    assert source.read_warnings.sentences() == []


def test_animations_are_their_first_frame_and_said_once(tmp_path: Path) -> None:
    frames = [Image.fromarray(noise(8, k)).convert("P") for k in range(3)]
    files = {
        "a.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "b.webp": encoded(frames[0].convert("RGB"), "WEBP", save_all=True, append_images=frames[1:], lossless=True),
        "c.png": encoded(frames[0].convert("RGB"), "PNG", save_all=True, append_images=frames[1:]),
        "d.tif": encoded(frames[0].convert("RGB"), "TIFF", save_all=True, append_images=frames[1:]),
        "e.gif": encoded(frames[0], "GIF"),
    }
    source = open_source(write(tmp_path / "x", files))
    for i in range(5):
        np.testing.assert_array_equal(source.read(i), np.asarray(frames[0].convert("RGB")))
    said = "4 pictures are animated or of several pages, such as a.gif; only the first frame is read"
    assert source.read_warnings.sentences() == [said]


def test_bulky_metadata_take_little_memory() -> None:
    bomb = zlib.compress(b" " * 64_000_000, 1)
    data = png(*[chunk(b"zTXt", b"k\0\0" + bomb)] * 4, chunk(b"iCCP", b"x\0\0" + bomb))

    def read(_: int) -> None:
        with open_picture(io.BytesIO(data)) as image:
            np.testing.assert_array_equal(to_array(image, (16, 24), 3), PIXELS)

    assert traced_peak(read) < 8 << 20


def test_parts_are_copied_except_from_a_very_large_file(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png(chunk(b"tEXt", b"k\0v"))
    for most, copied in ((len(data), True), (len(data) - 1, False)):
        monkeypatch.setattr(metadata, "MAX_COPIED", most)
        with open_picture(file := io.BytesIO(data)) as image:
            assert file.closed is copied and (image.fp is file) is not copied
            np.testing.assert_array_equal(to_array(image, (16, 24), 3), PIXELS)


def test_what_is_noticed_is_counted_by_kind() -> None:
    noticed = ReadWarnings()
    noticed.add("plain.png", Facts())
    noticed.add("a\n.gif", Facts(several=True))
    assert noticed.sentences() == [
        "1 picture is animated or of several pages, such as a\\n.gif; only the first frame is read"
    ]
