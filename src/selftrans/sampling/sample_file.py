"""One sample ⇔ one file that carries its label: a PNG of a picture, or an npy file of float32 numbers.

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

from selftrans.storage import first_line

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"


class SampleFile(NamedTuple):
    """How a sample is stored."""

    suffix: str
    check: Callable[[np.ndarray], None]  #: ValueError unless a batch of samples can be stored
    write: Callable[[IO[bytes], np.ndarray, int], None]  #: one sample and its label
    is_complete: Callable[[Path], bool]  #: cheap; False where nothing is
    read: Callable[[Path], tuple[np.ndarray, int]]  #: a sample and its label; ValueError for anything else


def check_pictures(images: np.ndarray) -> None:
    """ValueError unless these are pictures, uint8 (n, H, W, C)."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"images of {images.dtype} {images.shape} are no PNGs; give uint8 (n, H, W, C) with C of 1, 3 or 4"
        )


def write_png(file: IO[bytes], image: np.ndarray, label: int) -> None:
    """A picture (H, W, C), its label as text."""
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_text("label", str(label))
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.save(file, format="PNG", compress_level=1, pnginfo=text)  # level 6 costs thrice the time for 3 %


def is_complete_png(path: Path) -> bool:
    """Whether a PNG goes from its signature to its end mark: a rename can reach the disk before the bytes do."""
    try:
        with path.open("rb") as file:
            start = file.read(len(PNG_START))
            file.seek(-len(PNG_END), os.SEEK_END)
            return start == PNG_START and file.read() == PNG_END
    except OSError:
        return False


def read_png(path: Path) -> tuple[np.ndarray, int]:
    """A picture, uint8 (H, W, C), and its label (-1 when the PNG has none). ValueError for anything but a sample."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            pixels = np.asarray(picture)
            label = int(picture.info.get("label", -1))
            if picture.mode not in ("L", "RGB", "RGBA") or not -1 <= label < 1 << 31:
                raise ValueError(f"mode {picture.mode}, label {label!s:.20}")
    except Exception as error:  # a damaged file makes PIL raise almost anything
        raise _no_sample(path, error) from error
    return (pixels[..., None] if pixels.ndim == 2 else pixels), label


def check_arrays(images: np.ndarray) -> None:
    """ValueError unless these are float32 arrays (n, C, *S) of one to three spatial dimensions."""
    if images.dtype != np.float32 or not 3 <= images.ndim <= 5 or not images[:1].size:
        raise ValueError(f"samples are {images.dtype} {images.shape}; npy files hold float32 (n, C, *S)")


def write_npy(file: IO[bytes], image: np.ndarray, label: int) -> None:
    """An array (C, *S), then its label as a second array: `np.load` reads the first."""
    npy.write_array(file, np.ascontiguousarray(image), version=(1, 0), allow_pickle=False)
    npy.write_array(file, np.asarray(label, dtype=np.int64), version=(1, 0), allow_pickle=False)


def is_complete_npy(path: Path) -> bool:
    """Whether a file of `write_npy` has the size that its headers give."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(_end_of_array(file, "<f4", (2, 3, 4)))
            return _end_of_array(file, "<i8", (0,)) == size
    except Exception:  # numpy raises almost anything for a damaged header
        return False


def read_npy(path: Path) -> tuple[np.ndarray, int]:
    """An array, float32 (C, *S), and its label. ValueError for anything but a sample."""
    try:
        if not is_complete_npy(path):  # before anything of the size in a header is allocated
            raise ValueError("its size is not that of its header")
        with path.open("rb") as file:
            image = npy.read_array(file, allow_pickle=False)
            label = int(npy.read_array(file, allow_pickle=False))
        if not 0 <= label < 1 << 31 or not np.isfinite(image).all():
            raise ValueError(f"label {label}, or numbers that are not finite")
    except Exception as error:
        raise _no_sample(path, error) from error
    return image, label


def _end_of_array(file: IO[bytes], dtype: str, dims: tuple[int, ...]) -> int:
    """Offset behind the array that begins here. ValueError unless it is of this dtype and one of these `dims`."""
    if npy.read_magic(file) != (1, 0):
        raise ValueError("another version of the npy format")
    shape, fortran, found = npy.read_array_header_1_0(file)
    if found != np.dtype(dtype) or fortran or len(shape) not in dims or min(shape, default=1) < 1:
        raise ValueError(f"it is {found} {shape}")
    return file.tell() + math.prod(shape) * found.itemsize


def _no_sample(path: Path, error: Exception) -> ValueError:
    reason = first_line(str(error).replace(str(path), "it") or type(error).__name__, 100)
    return ValueError(f"{path} is no sample ({reason}); delete it and repeat the command")


PNG = SampleFile(".png", check_pictures, write_png, is_complete_png, read_png)
NPY = SampleFile(".npy", check_arrays, write_npy, is_complete_npy, read_npy)
