"""Warnings that come up while pictures are decoded: counted, and given once, not once a picture."""

from __future__ import annotations

import threading
import warnings
from collections import Counter

from selftrans.data.sources.duplicates import Duplicates, describe_duplicates
from selftrans.data.sources.metadata import MAX_METADATA, Facts
from selftrans.messages import are, plural, printable


class ReadWarnings:
    """Counts a source's pictures with ignored metadata, with several frames, and those enlarged; keeps its duplicates.

    Safe from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._broken, self._first = Counter[str](), dict[str, str]()
        self._pictures = Counter[str]()
        self.duplicates = list[Duplicates]()  #: of each part of the source

    def add(self, name: str, facts: Facts, enlarged: str = "") -> None:
        """Count one picture that was read; `enlarged`: its size and the larger one it got, as text; empty: not enlarged."""
        if not facts.broken and not facts.several and not enlarged:
            return
        kinds = {"broken": name if facts.broken else "", "several": name if facts.several else ""}
        kinds["enlarged"] = f"{printable(name)} ({enlarged})" if enlarged else ""
        with self._lock:
            for key, first in kinds.items():
                if first:
                    self._pictures[key] += 1
                    self._first.setdefault(key, first)
            self._broken.update(facts.broken)

    def sentences(self) -> list[str]:
        """One sentence for each kind, with how many pictures and the name of the first."""
        said = list[str]()
        if count := self._pictures["broken"]:
            kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(self._broken.items()))
            said.append(
                f"metadata that are damaged, or of more than {MAX_METADATA >> 20} MB, are ignored in "
                f"{plural(count, 'picture')} ({kinds}), such as {printable(self._first['broken'])}; the pixels are read"
            )
        if count := self._pictures["several"]:
            said.append(
                f"{plural(count, 'picture')} {are(count)} animated or of several pages, such as "
                f"{printable(self._first['several'])}; only the first frame is read"
            )
        if count := self._pictures["enlarged"]:
            said.append(
                f"{plural(count, 'picture')} {are(count)} smaller than the size asked for and {are(count)} enlarged, such as "
                f"{self._first['enlarged']}"
            )
        if duplicates := describe_duplicates(self.duplicates, "picture"):
            said.append(duplicates)
        return said

    def emit(self) -> None:
        """Give each sentence as a warning, and set all counts to zero."""
        for sentence in self.sentences():
            warnings.warn(sentence, stacklevel=3)
        with self._lock:
            self._broken.clear()
            self._pictures.clear()
            self._first.clear()
            self.duplicates.clear()
