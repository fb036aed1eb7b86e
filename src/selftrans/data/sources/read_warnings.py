"""Warnings that come up while samples are decoded: counted, and given once, not once a sample."""

from __future__ import annotations

import threading
import warnings
from collections import Counter

from selftrans.data.sources.duplicates import Duplicates, describe_duplicates
from selftrans.data.sources.metadata import MAX_METADATA, Facts
from selftrans.messages import are, plural, printable

BROKEN, SEVERAL, ENLARGED, CONSTANT = "broken", "several", "enlarged", "constant"
SENTENCES = {
    BROKEN: "metadata that are damaged, or of more than {limit} MB, are ignored in {pictures} ({kinds}), such as {first}; the "
    "pixels are read",
    SEVERAL: "{pictures} {are} animated or of several pages, such as {first}; only the first frame is read",
    ENLARGED: "{pictures} {are} smaller than the size asked for and {are} enlarged, such as {first}",
    CONSTANT: "{pictures} {are} of one value throughout (blank, or silent), such as {first}; leave them out if that is a "
    "mistake",
}


class ReadWarnings:
    """Counts a source's pictures with ignored metadata, with several frames, those enlarged, and samples of one value; keeps
    its duplicates.

    Safe from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._broken, self._first = Counter[str](), dict[str, str]()
        self._pictures = Counter[str]()
        self.duplicates = list[Duplicates]()  #: of each part of the source

    def add(self, name: str, facts: Facts, enlarged: str = "") -> None:
        """Count one picture that was read; `enlarged`: its size and the larger one it got, as text; empty: not enlarged."""
        found = {BROKEN: facts.broken, SEVERAL: facts.several, ENLARGED: enlarged}
        with self._lock:
            for kind in (kind for kind, given in found.items() if given):
                self._pictures[kind] += 1
                self._first.setdefault(kind, f"{printable(name)} ({enlarged})" if kind == ENLARGED else printable(name))
            self._broken.update(facts.broken)

    def add_constant(self, name: str) -> None:
        """Count one sample whose values are all the same, in each channel."""
        with self._lock:
            self._pictures[CONSTANT] += 1
            self._first.setdefault(CONSTANT, printable(name))

    def sentences(self, noun: str = "picture") -> list[str]:
        """One sentence for each kind, with how many samples and the name of the first."""
        given = {
            "kinds": ", ".join(f"{n:,} {kind}" for kind, n in sorted(self._broken.items())),
            "limit": MAX_METADATA >> 20,
        }
        said = [
            sentence.format(pictures=plural(count, noun), are=are(count), first=self._first[kind], **given)
            for kind, sentence in SENTENCES.items()
            if (count := self._pictures[kind])
        ]
        duplicates = describe_duplicates(self.duplicates, noun)
        return [*said, duplicates] if duplicates else said

    def emit(self, noun: str = "picture") -> None:
        """Give each sentence as a warning, and set all counts to zero."""
        for sentence in self.sentences(noun):
            warnings.warn(sentence, stacklevel=3)
        with self._lock:
            for counted in (self._broken, self._pictures, self._first, self.duplicates):
                counted.clear()
