"""One sample ⇔ one file with its label: a PNG for a picture, an npy file for a float32 array.

A sound or video is an npy file, which is exact, and a WAV or GIF next to it, to listen to or watch.

Shape legend: (H, W, C) picture with C of 1 (grey), 3 or 4; (C, *S) array.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from selftrans.encoders.autoencoder import Autoencoder
from selftrans.encoders.media import Media
from selftrans.messages import first_line

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"


class SampleFile(NamedTuple):
    """A file format for samples."""

    suffix: str
    check: Callable[[np.ndarray], None]  #: ValueError unless a batch of samples can be stored
    write: Callable[[IO[bytes], np.ndarray, int], None]  #: one sample and its label
    is_complete: Callable[[Path], bool]  #: cheap; False for a missing file
    read: Callable[[Path], tuple[np.ndarray, int]]  #: a sample and its label; ValueError for anything else
    view_suffix: str = ""  #: of a second file, which people can open; empty: there is none
    view: Callable[[IO[bytes], np.ndarray], None] | None = None  #: writes it, before the first file


def check_pictures(images: np.ndarray) -> None:
    """ValueError unless these are pictures, uint8 (n, H, W, C)."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"images of {images.dtype} {images.shape} cannot be PNGs; give uint8 (n, H, W, C) with C of 1, 3 or 4"
        )


def write_png(file: IO[bytes], image: np.ndarray, label: int) -> None:
    """Write a picture (H, W, C), with its label as a text chunk."""
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_text("label", str(label))
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.save(file, format="PNG", compress_level=1, pnginfo=text)  # level 6 takes three times as long and saves 3 %


def is_complete_png(path: Path) -> bool:
    """Whether a PNG has its signature and its end marker: after a power loss, a renamed file can lack its content."""
    try:
        with path.open("rb") as file:
            start = file.read(len(PNG_START))
            file.seek(-len(PNG_END), os.SEEK_END)
            return start == PNG_START and file.read() == PNG_END
    except OSError:
        return False


def read_png(path: Path) -> tuple[np.ndarray, int]:
    """A picture, uint8 (H, W, C), and its label (-1 if the PNG has none). ValueError when the file is not a sample."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            pixels = np.asarray(picture)
            label = int(picture.info.get("label", -1))
            if picture.mode not in ("L", "RGB", "RGBA") or not -1 <= label < 1 << 31:
                raise ValueError(f"mode {picture.mode}, label {label!s:.20}")
    except Exception as error:  # PIL raises many types for a damaged file
        raise _no_sample(path, error) from error
    return (pixels[..., None] if pixels.ndim == 2 else pixels), label


def check_arrays(images: np.ndarray) -> None:
    """ValueError unless these are float32 arrays (n, C, *S) of one to three spatial dimensions."""
    if images.dtype != np.float32 or not 3 <= images.ndim <= 5 or not images[:1].size:
        raise ValueError(f"samples are {images.dtype} {images.shape}; npy files hold float32 (n, C, *S)")


def write_npy(file: IO[bytes], image: np.ndarray, label: int) -> None:
    """Write an array (C, *S), then its label as a second array: `np.load` reads the first."""
    npy.write_array(file, np.ascontiguousarray(image), version=(1, 0), allow_pickle=False)
    npy.write_array(file, np.asarray(label, dtype=np.int64), version=(1, 0), allow_pickle=False)


def is_complete_npy(path: Path) -> bool:
    """Whether a file of `write_npy` has the size that follows from its headers."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(_end_of_array(file, "<f4", (2, 3, 4)))
            return _end_of_array(file, "<i8", (0,)) == size
    except Exception:  # numpy raises many types for a damaged header
        return False


def read_npy(path: Path) -> tuple[np.ndarray, int]:
    """An array, float32 (C, *S), and its label. ValueError when the file is not a sample."""
    try:
        if not is_complete_npy(path):  # before memory is allocated for the size in a header
            raise ValueError("its size does not match its header")
        with path.open("rb") as file:
            image = npy.read_array(file, allow_pickle=False)
            label = int(npy.read_array(file, allow_pickle=False))
        if not 0 <= label < 1 << 31 or not np.isfinite(image).all():
            raise ValueError(f"label {label}, or values that are not finite")
    except Exception as error:
        raise _no_sample(path, error) from error
    return image, label


def _end_of_array(file: IO[bytes], dtype: str, dims: tuple[int, ...]) -> int:
    """Offset of the end of the array that begins here. ValueError unless it has this dtype and one of these `dims`."""
    if npy.read_magic(file) != (1, 0):
        raise ValueError("another version of the npy format")
    shape, fortran, stored = npy.read_array_header_1_0(file)
    if stored != np.dtype(dtype) or fortran or len(shape) not in dims or min(shape, default=1) < 1:
        raise ValueError(f"it is {stored} {shape}")
    return file.tell() + math.prod(shape) * stored.itemsize


def _no_sample(path: Path, error: Exception) -> ValueError:
    reason = first_line(str(error).replace(str(path), "it") or type(error).__name__, 100)
    return ValueError(f"{path} is not a valid sample ({reason}); delete it and repeat the command")


PNG = SampleFile(".png", check_pictures, write_png, is_complete_png, read_png)
NPY = SampleFile(".npy", check_arrays, write_npy, is_complete_npy, read_npy)


def file_kind(autoencoder: Autoencoder) -> SampleFile:
    """The file format for the samples that an autoencoder decodes."""
    if autoencoder.pictures:
        return PNG
    if isinstance(autoencoder, Media):
        return NPY._replace(view_suffix=autoencoder.suffix, view=autoencoder.write_view)
    return NPY
