"""Sizes of pictures as options and manifests give them: SIDE of a square, or HEIGHTxWIDTH."""

from __future__ import annotations

import re
from typing import TypeAlias

from selftrans.messages import shape_text

Resolution: TypeAlias = int | tuple[int, int]  #: the side of a square, or (height, width)

MAX_RESOLUTION = 16_384


def sides(resolution: Resolution) -> tuple[int, int]:
    """(height, width) of a resolution; a number is the side of a square."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def check_range(resolution: Resolution) -> None:
    """ValueError for a side to which nothing is resized."""
    if not all(1 <= side <= MAX_RESOLUTION for side in sides(resolution)):
        raise ValueError(f"resolution {size_text(resolution)} is not between 1 and {MAX_RESOLUTION}")


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
    return shape_text(sides(resolution))


def parse_resolution(text: str) -> Resolution:
    """Parse SIDE or HEIGHTxWIDTH. Raises ValueError for any other text."""
    match = re.fullmatch(r"([1-9]\d{0,5})(?:[xX×]([1-9]\d{0,5}))?", text.strip())
    if match is None:
        raise ValueError(f"resolution {text!r} should be a side, as 256, or HEIGHTxWIDTH, as 192x256")
    return resolution_of(int(match[1]), int(match[2] or match[1]))
