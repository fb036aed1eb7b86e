"""Pictures with a caption below each, for sheets of samples.

Shape legend: n pictures, (H, W, C) picture with C of 1 or 3.
"""

from __future__ import annotations

import functools
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
    lines, words = [""], text.split(" ")
    while words:
        word = words.pop(0)
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
        elif lines[-1]:
            lines.append("")
            words.insert(0, word)
        else:
            fits = max(1, _fitting(word, width, font))
            lines[-1] = word[:fits]
            words.insert(0, word[fits:])
    if len(lines) > LINES:
        last = lines[LINES - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: LINES - 1], last.rstrip() + "…"]
    return lines


def _fitting(word: str, width: int, font: FreeTypeFont) -> int:
    """How many of the first characters fit into `width` pixels."""
    return next((k - 1 for k in range(1, len(word) + 1) if font.getlength(word[:k]) > width), len(word))


@functools.cache
def _font(file: str | None = None) -> FreeTypeFont:
    """A font file; None: DejaVu Sans."""
    from PIL import ImageFont

    return ImageFont.truetype(file or fonts.default().file, SIZE)
