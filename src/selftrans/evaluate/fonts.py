"""Text in pictures: captions below them, in fonts of this machine where matplotlib's DejaVu Sans lacks a character.

A character that no font has would be drawn as an empty box. It is written as its escape instead (`\\u732b`), and a class
with such a name as its number (`class 7`). Shape legend: n pictures, (H, W, C) picture with C of 1 or 3.
"""

from __future__ import annotations

import functools
import textwrap
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from selftrans.messages import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.ImageFont import FreeTypeFont

DEFAULT = "DejaVu Sans"  #: brought by matplotlib: it has most alphabets
#: beginnings of the names of fonts without letters: they draw boxes that name a script, or mathematical symbols
NO_TEXT = ("Last", "STIX", "cm")
#: words in the names of fonts for text, the most suitable first; others are decorative more often
PREFERRED = ("noto sans", "sans", "gothic", "hei", "")
SHOWN = 12  #: most characters that a warning lists
SIZE = 11  #: of the font of captions, in pixels
WIDEST = 132  #: pixels that a caption may take where its picture is narrower
LINES = 3  #: most lines of a caption; what is longer ends with an ellipsis


class Face(NamedTuple):
    """A font of this machine."""

    family: str
    file: str


def lacking(text: str, *faces: Face) -> frozenset[str]:
    """The characters of a text, spaces excepted, that none of these fonts has (no fonts given: DejaVu Sans)."""
    unknown = {each for each in text if not each.isascii() or not each.isprintable()} - set(" \n")
    for face in faces or (default(),):
        unknown -= {each for each in unknown if each.isprintable() and _has(face.file, each)}
    return frozenset(unknown)


def default() -> Face:
    """DejaVu Sans."""
    from matplotlib.font_manager import findfont

    return Face(DEFAULT, str(findfont(DEFAULT)))


_named: set[str] = set()  #: characters that a warning of this process has named


@functools.lru_cache(maxsize=64)
def fallbacks(characters: frozenset[str]) -> tuple[Face, ...]:
    """Fonts of this machine which together have as many of these characters as possible; a warning names the others, once."""
    left, found = {each for each in characters if each.isprintable()}, list[Face]()
    for face in _faces() if left else ():
        if has := {each for each in left if _has(face.file, each)}:
            found.append(face)
            left -= has
        if not left:
            break
    left -= _named
    _named.update(left)
    if left:
        shown = printable("".join(sorted(left)[:SHOWN])) + ("..." if len(left) > SHOWN else "")
        warnings.warn(
            f"no font of this machine has {shown}: pictures show escapes such as {ascii(min(left))[1:-1]}, and numbers of "
            "classes; install a font that has them, such as Noto Sans CJK",
            stacklevel=2,
        )
    return tuple(found)


def drawable(text: str, without: Collection[str]) -> str:
    """The text with the characters `without` escaped."""
    return "".join(ascii(each)[1:-1] if each in without else each for each in text)


def class_names(names: Sequence[str]) -> list[str]:
    """The names of classes as pictures show them: on one line, and `class K` for one that no font has all characters of."""
    lines = [printable(" ".join(name.split())) for name in names]
    unknown = lacking("".join(lines))
    faces = (default(), *fallbacks(unknown)) if unknown else ()
    return [f"class {k}" if faces and lacking(line, *faces) else line for k, line in enumerate(lines)]


def face_for(text: str) -> tuple[str, Face]:
    """The text, and one font that has all of its characters; DejaVu Sans where none has, with its characters escaped."""
    if unknown := lacking(text):
        for face in fallbacks(unknown):
            if all(_has(face.file, each) for each in text):
                return text, face
    return drawable(text, unknown), default()


def fit(figure: Figure) -> None:
    """Give each text of a figure fonts for all of its characters; those that no font has become escapes."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        string = text.get_text()
        if unknown := lacking(string):
            faces = default(), *fallbacks(unknown)
            text.set_fontfamily([face.family for face in faces])
            text.set_text(drawable(string, lacking(string, *faces)))


def with_captions(pictures: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Pictures uint8 (n, H, W, 1 or 3) on white, each with its caption below: uint8 (n, H', W', 3), of one size.

    A caption is wrapped to the width of its picture, or of WIDEST pixels, and shortened to LINES lines.
    """
    from PIL import Image, ImageDraw

    height, width = pictures.shape[1:3]
    texts = [face_for(" ".join(caption.split())) for caption in captions]
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


def _has(file: str, character: str) -> bool:
    font = _opened(file)
    return font is not None and bool(font.get_char_index(ord(character)))


@functools.lru_cache(maxsize=32)
def _opened(file: str):  # type: ignore[no-untyped-def]  # matplotlib has no types
    from matplotlib.ft2font import FT2Font

    try:
        return FT2Font(file)
    except (OSError, RuntimeError):
        return None


@functools.cache
def _faces() -> list[Face]:
    """The upright fonts of this machine with text, the most suitable first."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    known = {entry.fname for entry in fontManager.ttflist}
    for file in findSystemFonts():  # matplotlib's own list may be old: it was made at its first start on this machine
        if file not in known:
            try:
                fontManager.addfont(file)
            except Exception:
                continue
    upright = {
        Face(entry.name, str(entry.fname))
        for entry in fontManager.ttflist
        if entry.style == "normal"
        and entry.weight in (400, "normal", "regular")
        and getattr(entry, "index", 0) == 0
        and not entry.name.startswith(NO_TEXT)
        and Path(entry.fname).exists()
    }

    def suitable(face: Face) -> tuple[int, str, str]:
        return next(rank for rank, word in enumerate(PREFERRED) if word in face.family.lower()), *face

    return sorted(upright, key=suitable)
