"""Pictures with a caption below each, for sheets of samples.

Shape legend: n pictures, (H, W, C) picture with C of 1 or 3.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from selftrans.evaluate import fonts

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

SIZE = 11  #: of the font, in pixels
WIDEST = 132  #: pixels that a caption may take where its picture is narrower
LINES = 3  #: most lines of a caption; what is longer ends with an ellipsis


def with_captions(pictures: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Pictures uint8 (n, H, W, 1 or 3) on white, each with its caption below: uint8 (n, H', W', 3), of one size.

    A caption is wrapped to the width of its picture, or of WIDEST pixels, and shortened to LINES lines.
    ValueError unless there is one caption for each picture.
    """
    from PIL import Image, ImageDraw

    if len(captions) != len(pictures):
        raise ValueError(f"{len(pictures)} pictures but {len(captions)} captions; give one for each")
    height, width = pictures.shape[1:3]
    texts = [fonts.face_for(" ".join(caption.split())) for caption in captions]
    typed = [(text, _font(face.file)) for text, face in texts]
    longest = max(int(font.getlength(text)) + 1 for text, font in typed)
    wide = max(width, min(longest, WIDEST))
    wrapped = [(wrap(text, wide, font), font) for text, font in typed]
    step = max(sum(font.getmetrics()) for _, font in typed)
    sheet = np.full(
        (len(pictures), height + 2 + step * max(len(lines) for lines, _ in wrapped), wide, 3), 255, dtype=np.uint8
    )
    left = (wide - width) // 2
    sheet[:, :height, left : left + width] = pictures  # one channel becomes three
    for picture, (lines, font) in zip(sheet, wrapped, strict=True):
        image = Image.fromarray(picture)
        draw = ImageDraw.Draw(image)
        for i, line in enumerate(lines):
            draw.text((wide // 2, height + 2 + i * step), line, fill=(34, 34, 34), font=font, anchor="ma")
        picture[:] = np.asarray(image)
    return sheet


def wrap(text: str, width: int, font: FreeTypeFont) -> list[str]:
    """The lines of `text` at `width` pixels, at most LINES; a word that is wider than a line is cut."""
    usual = width * len(text) / max(1.0, font.getlength(text))  # characters of a line
    for length in range(int(1.5 * usual) + 1, 0, -1):
        lines = textwrap.wrap(text, length, max_lines=LINES, placeholder="…") or [""]
        if all(font.getlength(line) <= width for line in lines):
            break
    return lines


@functools.cache
def _font(file: str) -> FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.truetype(file, SIZE)
