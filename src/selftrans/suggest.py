"""The nearest known word to a misspelt one, and how an error message offers it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(word: str, known: Iterable[str], *, most: int = 2) -> list[str]:
    """At most `most` known words that resemble `word`, the most similar first; empty when none does."""
    return difflib.get_close_matches(word, list(known), n=most, cutoff=0.5)


def did_you_mean(words: list[str]) -> str:
    """`; did you mean a or b?`, to be appended to a message; empty for no words."""
    if not words:
        return ""
    *others, last = words
    return f"; did you mean {', '.join(others) + ' or ' if others else ''}{last}?"


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` with the closest known words, or `; choose one of ...` with all of them."""
    known = list(known)
    return did_you_mean(closest(word, known)) or f"; choose one of {', '.join(known)}"
