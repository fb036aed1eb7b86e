"""What is noticed while pictures are decoded, counted and said once, not once a picture."""

from __future__ import annotations

import threading
import warnings
from collections import Counter

from selftrans.data.sources.metadata import MAX_METADATA, Facts
from selftrans.storage import are, plural, printable


class Noticed:
    """Counts of a source's pictures with metadata that are ignored, and with several frames; used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._broken, self._first = Counter[str](), dict[str, str]()
        self._pictures = Counter[str]()

    def add(self, name: str, facts: Facts) -> None:
        """Count one picture that was read."""
        if not facts.broken and not facts.several:
            return
        with self._lock:
            for key, found in (("broken", bool(facts.broken)), ("several", facts.several)):
                if found:
                    self._pictures[key] += 1
                    self._first.setdefault(key, name)
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
        return said

    def warn(self) -> None:
        """Warn with each sentence, and begin again."""
        for sentence in self.sentences():
            warnings.warn(sentence, stacklevel=3)
        with self._lock:
            self._broken.clear()
            self._pictures.clear()
            self._first.clear()
