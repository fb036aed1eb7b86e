"""Exact duplicates among samples, found by a hash of what was decoded: how many there are, and how many have another label."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from selftrans.messages import plural, printable

MOST = 1 << 24  #: samples that are compared; their hashes take 8 bytes each


class Duplicates(NamedTuple):
    """What was found among samples."""

    compared: int
    number: int = 0  #: copies: samples that equal an earlier one, their original
    relabelled: int = 0  #: copies whose label is not that of the original
    example: tuple[str, str] = ("", "")  #: names of a copy (with another label, if there is one) and of its original
    partial: bool = False  #: whether samples of earlier calls or of other parts were not compared


class DuplicateFinder:
    """Hashes of decoded samples, by their position; filled from any thread. `partial`: see `Duplicates`."""

    def __init__(self, count: int, *, partial: bool = False) -> None:
        self._partial = partial
        self._hashes = np.zeros(min(count, MOST), dtype=np.uint64)  #: 0: not decoded

    def add(self, positions: Iterable[int], arrays: Iterable[np.ndarray]) -> None:
        """Note the hashes of decoded samples."""
        for i, array in zip(positions, arrays, strict=True):
            if i < len(self._hashes):
                digest = hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=8).digest()
                self._hashes[i] = max(1, int.from_bytes(digest, "little"))

    def find(self, labels: np.ndarray, name: Callable[[int], str]) -> Duplicates:
        """What was found among the samples that were added; `labels` and `name` are those of all positions."""
        at = np.flatnonzero(self._hashes)
        order = at[np.argsort(self._hashes[at], kind="stable")]  # duplicates follow each other, in their order
        values = self._hashes[order]
        copy = np.concatenate([np.zeros(min(1, len(at)), dtype=bool), values[1:] == values[:-1]])
        if not copy.any():
            return Duplicates(len(at), partial=self._partial)
        first = order[np.maximum.accumulate(np.where(copy, 0, np.arange(len(order))))]
        other = copy & (labels[order] != labels[first])
        candidates = np.flatnonzero(other if other.any() else copy)
        k = candidates[np.argmin(order[candidates])]
        example = name(int(order[k])), name(int(first[k]))
        return Duplicates(len(at), int(copy.sum()), int(other.sum()), example, self._partial)


def describe_duplicates(parts: Sequence[Duplicates], noun: str) -> str:
    """One sentence on what was found among several parts of the data; empty when there are none."""
    compared, count = sum(part.compared for part in parts), sum(part.number for part in parts)
    relabelled = sum(part.relabelled for part in parts)
    if not count:
        return ""
    copy, first = map(printable, max(parts, key=lambda part: (part.relabelled > 0, part.number > 0)).example)
    copies = "is, as stored, an exact copy of an earlier one"
    if count > 1:
        copies = "are, as stored, exact copies of earlier ones"
    said, example = f"{count:,} of {plural(compared, noun)} {copies}", f"such as {copy} ({first})"
    if relabelled:
        have = "has" if relabelled == 1 else "have"
        said = f"{said}, and {relabelled:,} of these {have} another label, {example}; check their labels"
    else:
        said = f"{said}, {example}; copies count several times"
    return f"{said}; only what is encoded now was compared" if any(part.partial for part in parts) else said
