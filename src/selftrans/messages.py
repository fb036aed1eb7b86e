"""Numbers, names and errors in messages; text from files is made safe for a terminal."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parent
#: the pages of the documentation: wheels have them in the package
DOCS = PACKAGE / "docs" if (PACKAGE / "docs").is_dir() else PACKAGE.parents[1] / "docs"
JOINERS = "\u200c\u200d"  #: invisible, but parts of words in some scripts, and of emoji


def printable(text: object, limit: int | None = 160) -> str:
    """Text from a file, `escaped`, of at most `limit` characters; what is longer ends with an ellipsis."""
    if limit is None:
        return escaped(text)
    shown = escaped(str(text)[: limit + 1])
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def escaped(text: object) -> str:
    """Text on one line, in which only what a terminal does not print is escaped: `a\\nb`. For a path that is named in full."""
    return "".join(c if _is_shown(c) else ascii(c)[1:-1] for c in str(text))


def page(name: str) -> str:
    """Where a page of the documentation, such as `data.md`, lies on this machine."""
    return escaped(DOCS / name)


def as_word(path: object) -> str:
    """A path as one word of a command line, to be pasted. What a terminal does not print, as bytes in `$'...'`: `a$'\x1b'`."""
    text = str(path)
    if all(map(_is_shown, text)):
        return shlex.quote(text)
    text = text.replace("\\", r"\\").replace("'", r"\'")
    return "".join(["$'", *(c if _is_shown(c) else _as_bytes(c) for c in text), "'"])


def _as_bytes(character: str) -> str:
    r"""`\xe2\x80\xaf`: a character in UTF-8, or the byte of a file's name that is not UTF-8."""
    undecoded = "\udc80" <= character <= "\udcff"
    return "".join(
        f"\\x{byte:02x}" for byte in character.encode(errors="surrogateescape" if undecoded else "surrogatepass")
    )


def _is_shown(character: str) -> bool:
    return character.isprintable() or character in JOINERS


def on_one_line(message: str) -> str:
    """A message without line breaks and tabs. Other spaces stay as they are: names of files have them."""
    return " ".join(filter(None, (part.strip(" ") for part in re.split(r"[\t\n\v\f\r]", message))))


def one_line(text: str) -> str:
    """A caption or a name on one line that can be encoded in UTF-8, without control characters and double spaces."""
    encodable = text.encode("utf-8", "replace").decode("utf-8")
    return " ".join("".join(c if _is_shown(c) else " " for c in encodable).split())


def decoded_text(data: bytes) -> str:
    """Text in UTF-8, or in UTF-16 with a byte order mark, as some editors on Windows store it. Else UnicodeDecodeError."""
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if utf16 else "utf-8-sig")


def listed(names: Sequence[object], most: int = 8) -> str:
    """The first `most` names, each `printable`, separated by commas, and how many more there are."""
    return ", ".join(map(printable, names[:most])) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def terminal_width() -> int | None:
    """Columns of the terminal that reads standard output; None for a file or a pipe, where no line is broken."""
    return max(40, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None


def redirect_closed_output() -> None:
    """Redirect standard output and error to `os.devnull` if their terminal was closed, or the reader of their pipe has ended.

    Otherwise the next line that is printed there would be an error, and end the work.
    """
    for stream in (1, 2):
        with contextlib.suppress(OSError, AttributeError):  # a stream that is closed; no `poll` on Windows
            poll = select.poll()
            poll.register(stream, 0)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream)
                os.close(null)


def filled(text: str) -> str:
    """Text wrapped to the width of the terminal."""
    width = terminal_width()
    return text if width is None else textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def plural(count: int, noun: str) -> str:
    """`1 picture`, `1,200 pictures`: a number and its noun."""
    ending = "es" if noun.endswith(("s", "x", "ch")) else "s"
    return f"{count:,} {noun if count == 1 else noun + ending}"


def shape_text(shape: Sequence[int]) -> str:
    """`3x32x32`: the sides of an array."""
    return "x".join(map(str, shape))


def three_digits(value: float) -> str:
    """A positive number with three digits, above 1,000 with all of the whole number: `0.0123`, `45.6`, `1,234`."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def gigabytes(size: float) -> str:
    """A number of bytes with three digits: `74.4 kB`, `1.23 MB`, `9.8 TB`; from 0.1 GB on in GB, `0.123 GB`."""
    for unit, scale, least in (("TB", 1e12, 0.9995e12), ("GB", 1e9, 0.9995e8), ("MB", 1e6, 0.9995e6)):
        if size >= least:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def duration(seconds: float) -> str:
    """`1 d 3 h`, `2 h 5 min`, `40 s`: the two largest units."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    parts: list[str] = []
    rest = round(seconds)
    for name, length in units:
        count, rest = divmod(rest, length)
        if count or (name == "s" and not parts):
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])


def are(count: int) -> str:
    """`is` or `are`, for a number of things."""
    return "is" if count == 1 else "are"


def first_line(error: object, limit: int = 160) -> str:
    """The first line of an error's message without the full stop, for use in another message; its type if it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # a final colon introduces the next line
    text = " ".join(lines[:2] if lines[0].rstrip().endswith(":") else lines[:1])
    text = on_one_line(text).rstrip(".")
    if len(text) > limit:
        start = text[: limit - 3]
        text = f"{start.rpartition(' ')[0] or start}..."
    return printable(text, limit)


def is_own_code(file: str) -> bool:
    """Whether a source file belongs to this package: of the warnings, only those that it gives are shown."""
    return Path(file).is_relative_to(PACKAGE)


def check_utf8(path: Path) -> None:
    """ValueError for a folder whose name is not UTF-8: safetensors writes files there, but cannot open them."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the name {path} is not UTF-8, as safetensors needs; choose another --out") from error
