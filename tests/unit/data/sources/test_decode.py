"""Decoding compared with PIL and hand-made pixels: all pixel formats, ADM's resizing, damaged and malicious files."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from selftrans.data.resolution import Resolution, parse_resolution, size_text
from selftrans.data.sources import decode
from selftrans.data.sources.decode import BadSample, Reading, centre_crop, open_picture, to_array, upright_size
from selftrans.data.sources.metadata import turned_upright as upright
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.source import Source
from tests.support.pictures import encoded, noise, write, zipped


def read_one(tmp_path: Path, data: bytes, name: str = "a.png", **options: Any) -> np.ndarray:
    return open_source(write(tmp_path / "one", {name: data}), **options).read(0)


@pytest.mark.parametrize(
    "mode", ["palette", "grey", "one bit", "cmyk", "rgba", "grey alpha", "palette alpha", "16 bit"]
)
def test_every_kind_of_pixel_becomes_rgb(tmp_path: Path, mode: str) -> None:
    rgb, grey, alpha = noise(seed=5), noise(seed=6, channels=1), noise(seed=7, channels=1)
    white = lambda x, a: x * (a / 255) + 255 * (1 - a / 255)  # noqa: E731 - composited on white, exactly
    if mode == "palette":
        image = Image.fromarray(grey // 64)
        image.putpalette(list(range(12)))  # value v shows as 3v, 3v + 1, 3v + 2
        expected = (grey // 64)[..., None] * 3.0 + np.arange(3)
    elif mode == "grey":
        image, expected = Image.fromarray(grey), np.repeat(grey[..., None], 3, axis=2)
    elif mode == "one bit":
        image, expected = Image.fromarray(grey > 99), np.repeat((grey > 99)[..., None] * 255.0, 3, axis=2)
    elif mode == "cmyk":
        image = Image.fromarray(np.concatenate([255 - rgb, np.zeros((8, 8, 1), np.uint8)], axis=2), "CMYK")
        expected = rgb
    elif mode == "rgba":
        image = Image.fromarray(np.concatenate([rgb, alpha[..., None]], axis=2))
        expected = white(rgb, alpha[..., None])
    elif mode == "grey alpha":
        image = Image.fromarray(np.stack([grey, alpha], axis=2))
        expected = np.repeat(white(grey, alpha)[..., None], 3, axis=2)
    elif mode == "palette alpha":
        image = Image.fromarray(grey // 64)
        image.putpalette(list(range(12)))
        image.info["transparency"] = 2
        expected = np.where((grey // 64 == 2)[..., None], 255.0, (grey // 64)[..., None] * 3.0 + np.arange(3))
    else:
        deep = np.random.default_rng(8).integers(0, 65536, (8, 8), dtype=np.uint16)
        image, expected = Image.fromarray(deep), np.repeat(np.rint(deep / 257)[..., None], 3, axis=2)
    image = read_one(
        tmp_path, encoded(image, "TIFF" if mode == "cmyk" else "PNG"), "a.tif" if mode == "cmyk" else "a.png"
    )
    assert image.shape == (8, 8, 3)
    assert np.abs(image - expected.astype(float)).max() <= 1  # rounding


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated: viewers rotate it by 90 degrees clockwise
    stored = np.rot90(upright, k=1)
    image = read_one(tmp_path, encoded(np.ascontiguousarray(stored), "JPEG", exif=exif, quality=95), "a.jpg")
    assert image[:6].min() > 240 and image[10:].max() < 15


def adm(image: Image.Image, side: int) -> np.ndarray:
    """ADM's preprocessing: halve, resize the complete picture, then crop."""
    while min(image.size) >= 2 * side:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
    return array[top : top + side, left : left + side]


@pytest.mark.parametrize("size", [(64, 64), (100, 37), (37, 100), (33, 33), (16, 16), (9, 13), (200, 65), (17, 16)])
def test_resize_equals_adm_preprocessing(size: tuple[int, int]) -> None:
    y, x = np.mgrid[: size[1], : size[0]]
    rings = (127.5 + 127.5 * np.sin((x**2 + y**2) / 40)).astype(np.uint8)
    image = Image.fromarray(np.stack([rings, 255 - rings, (3 * x + y).astype(np.uint8)], axis=2))
    difference = np.asarray(centre_crop(image, 16, 16)).astype(int) - adm(image, 16)
    assert np.abs(difference).max() <= 1


def test_box_halving_is_a_mean_of_four(tmp_path: Path) -> None:
    array = noise(16, seed=9)
    mean = array.reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
    assert np.abs(read_one(tmp_path, encoded(array), resolution=8) - mean).max() <= 1  # PIL rounds after each direction


def test_crop_is_central(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = noise(8, seed=10)
    assert np.array_equal(read_one(tmp_path, encoded(wide), resolution=8), noise(8, seed=10))


def test_very_long_picture_needs_little_memory(tmp_path: Path) -> None:
    # the complete resized picture would be 256 x 5,120,000
    image = read_one(tmp_path, encoded(np.full((1, 20_000), 77, np.uint8)), resolution=256)
    assert image.shape == (256, 256, 3) and (image == 77).all()


def test_grey_on_request(tmp_path: Path) -> None:
    array = noise(8, seed=11, channels=1)
    assert np.array_equal(read_one(tmp_path, encoded(array), reading=Reading(grey=True))[..., 0], array)


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("fault", ["truncated", "zero bytes", "text", "float", "svg", "heic"])
def test_unreadable_pictures_are_named(tmp_path: Path, kind: str, fault: str) -> None:
    jpeg = encoded(noise(64), "JPEG")
    data = {
        "truncated": jpeg[: len(jpeg) // 2],
        "zero bytes": b"",
        "text": b"hello",
        "float": encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"),
        "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"x" * 200,
        "svg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",  # PIL would start an external program
    }[fault]
    files = {"cat/ok.png": encoded(noise(8)), "dog/bad one.jpg": data}
    source = open_source(
        write(tmp_path / "x", files) if kind == "folder" else zipped(tmp_path / "x.zip", files), resolution=8
    )
    assert source.read(0).shape == (8, 8, 3)
    with pytest.raises(ValueError, match=r"^dog/bad one.jpg: cannot be read as a picture \(.+\)$"):
        source.read(1)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the file is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "a pointer of Git LFS .* run `git lfs pull`",
        ),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html>", "a web page in place of the picture; download it again"),
        (b"<HTML><body>404", "a web page in .*"),
        (bytes(99), "it begins with zeros, as after an incomplete copy"),
        (b"hello", "of an unknown format"),
    ],
)
def test_what_is_in_place_of_a_picture_is_said(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^a\.png: cannot be read as a picture \({said}\)$"):
        read_one(tmp_path, data, resolution=8)


def test_file_without_permission_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("selftrans.data.sources.decode.SizedFile.open", refused)
    with pytest.raises(ValueError, match=r"^a\.png: cannot be read as a picture \(Permission denied\)$"):
        read_one(tmp_path, encoded(noise(8)), resolution=8)


def test_decompression_bomb(tmp_path: Path) -> None:
    # a header that claims 60000 x 60000 pixels, in a hundred bytes
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(ValueError, match=r"a.png: cannot be read .*pixels"):
        read_one(tmp_path, data + b"\0\0\0\0IDAT", resolution=8)


def test_picture_above_the_pixel_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "one", {"a.png": encoded(noise(8))})
    with pytest.raises(ValueError, match=r"8x8 is more than the limit of 40 pixels; raise it with --max-pixels"):
        open_source(tmp_path / "one", reading=Reading(max_pixels=40)).read(0)
    frames = {"save_all": True, "append_images": [Image.fromarray(noise(8, 1))]}
    Image.init()
    written = ["QOI"] if "QOI" in Image.SAVE else []  # older releases of Pillow only read it
    kinds = ["GIF", "TIFF", "PNG", "JPEG", "BMP", "PPM", "JPEG2000", *written]
    for kind in kinds:
        data = encoded(noise(8), kind, **(frames if kind in ("GIF", "TIFF", "PNG") else {}))
        write(tmp_path / "all", {f"{kind}.{'jp2' if kind == 'JPEG2000' else kind}": data})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # Pillow's own, which belongs to the caller, does not apply
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = open_source(tmp_path / "all", reading=Reading(max_pixels=64))
        assert {source.read(i).shape for i in range(len(kinds))} == {(8, 8, 3)}
        if int(version("pillow").split(".")[0]) >= 13:  # older releases do not check it in WEBP
            with pytest.raises(ValueError, match="more than 40 pixels, which Pillow refuses in WEBP; save it as png"):
                open_picture(io.BytesIO(encoded(noise(8), "WEBP")))
    assert Image.MAX_IMAGE_PIXELS == 20
    with pytest.raises(ValueError, match="max_pixels 0"):
        open_source(tmp_path / "one", reading=Reading(max_pixels=0))


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000", "PNG"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_large_pictures_are_decoded_at_a_reduced_scale(
    monkeypatch: pytest.MonkeyPatch, kind: str, orientation: int
) -> None:
    y, x = np.mgrid[:480, :800]
    smooth = Image.fromarray((127 + 60 * np.sin(x / 90) + 60 * np.cos(y / 70)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth, kind, **({} if kind == "JPEG2000" else {"exif": exif}))
    target = (40, 24) if orientation == 6 and kind != "JPEG2000" else (24, 40)
    plain = to_array(open_picture(io.BytesIO(data)), target, 1)
    monkeypatch.setattr(decode, "LARGE", 100_000)
    decoded = list[tuple[int, int]]()
    monkeypatch.setattr(
        decode, "turned_upright", lambda image: decoded.append((image.load(), image.size)[1]) or upright(image)
    )
    reduced = to_array(open_picture(io.BytesIO(data)), target, 1)
    if kind == "JPEG2000":  # of a file without smaller copies of itself
        whole = encoded(smooth, kind, num_resolutions=1)
        assert np.abs(to_array(open_picture(io.BytesIO(whole)), target, 1).astype(int) - plain).max() <= 3
        assert decoded.pop() == (800, 480)
    assert decoded == [(800, 480) if kind == "PNG" else (100, 60)], "at least twice the target"
    assert np.abs(reduced.astype(int) - plain).max() <= (9 if kind == "JPEG2000" else 3)  # its filter is not a mean


EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010E] = 6, "x" * 40
METADATA = {
    "PNG": {"exif": EXIF, "icc_profile": b"x" * 200},
    "JPEG": {"exif": EXIF, "icc_profile": b"x" * 200, "comment": b"x"},
    "TIFF": {"description": "x" * 40, "icc_profile": b"x" * 200, "tiffinfo": {274: 6, 34665: 9}},
    "WEBP": {"exif": EXIF, "icc_profile": b"x" * 200},
}
VALID = [encoded(noise(9), kind, **options) for kind, options in METADATA.items()] + [
    encoded(noise(9), kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000")
]


@pytest.mark.filterwarnings("ignore")  # PIL's warnings about damaged files
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_decodes_or_is_one_line(data: st.DataObject) -> None:
    damaged = bytearray(data.draw(st.sampled_from(VALID)))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    source = Source(
        ["a\nb.jpg"], lambda i: open_picture(io.BytesIO(damaged)), labels=np.zeros(1, np.int64), resolution=8
    )
    try:
        assert source.read(0).shape == (8, 8, 3)
    except BadSample as error:
        message = str(error)
    else:
        message = "a\\nb.jpg: read"
    assert message.startswith("a\\nb.jpg: ") and "\n" not in message


@pytest.mark.parametrize(("text", "size"), [("32", 32), ("32x48", (32, 48)), ("7X7", 7), (" 9×8 ", (9, 8))])
def test_resolution_is_a_side_or_height_and_width(text: str, size: Resolution) -> None:
    assert parse_resolution(text) == size
    assert parse_resolution(size_text(size)) == size
    for wrong in (f"-{text}", f"{text}x3x3", "0", "4x0", "", "a", "4,5", "12345678"):
        with pytest.raises(ValueError, match=r"should be a side, as 256, or HEIGHTxWIDTH"):
            parse_resolution(wrong)


def test_crop_to_another_shape_is_the_centre() -> None:
    columns = np.tile(np.arange(60, dtype=np.uint8), (20, 1))  # 20 high, 60 wide: each column has its number
    crop = np.asarray(centre_crop(Image.fromarray(columns), 20, 30))
    np.testing.assert_array_equal(crop, columns[:, 15:45])
    half = np.asarray(centre_crop(Image.fromarray(columns), 10, 15)).astype(
        float
    )  # halved by a box filter, then cropped
    np.testing.assert_allclose(half[0], 16 + 2 * np.arange(15) - 0.5, atol=0.6)
    tall = np.asarray(centre_crop(Image.fromarray(columns.T.copy()), 30, 20))
    np.testing.assert_array_equal(tall, columns.T[15:45])


def test_size_from_a_header_is_that_of_the_upright_picture() -> None:
    image = Image.fromarray(noise(8)[:5])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    buffer = io.BytesIO(encoded(image, "JPEG", exif=exif))
    assert upright_size(Image.open(buffer)) == (8, 5)
    assert to_array(open_picture(buffer), (8, 5), 3).shape == (8, 5, 3)
