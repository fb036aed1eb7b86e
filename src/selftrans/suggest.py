"""Suggestions for misspelt names in error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(word: str, known: Iterable[str], *, most: int = 2) -> list[str]:
    """At most `most` known words similar to `word`, the most similar first; empty if there are none."""
    return difflib.get_close_matches(word, list(known), n=most, cutoff=0.5)


def did_you_mean(words: list[str]) -> str:
    """`; did you mean a or b?`, to append to a message; empty for no words."""
    if not words:
        return ""
    *others, last = words
    return f"; did you mean {', '.join(others) + ' or ' if others else ''}{last}?"


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` with the closest known words, or else `; choose one of ...` with all known words."""
    known = list(known)
    return did_you_mean(closest(word, known)) or f"; choose one of {', '.join(known)}"
