"""What may surprise in a source before it is encoded: classes without samples, and deep pictures that use few of their bits."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from selftrans.data.present import present_classes
from selftrans.data.sources.metadata import facts_of
from selftrans.data.sources.passed_over import unread_pictures
from selftrans.data.sources.source import Samples, Source
from selftrans.storage import listed, plural, printable

MOST_PAIRS = 4  #: of names that look the same, in a warning
LOOKED_AT = 24  #: pictures of which the range of values is read, spread over the source


def surprises(samples: Samples) -> Iterator[str]:
    """Sentences on classes without samples or of nearly the same name, and on pictures of formats that are not read."""
    labels, classes = np.delete(samples.labels, list(samples.faults)), samples.classes
    if present := present_classes(labels, classes):
        absent = sorted(set(range(len(classes))) - set(present))
        named = listed([classes[k] for k in absent])
        yield (
            f"{len(absent):,} of {plural(len(classes), 'class')} {'has' if len(absent) == 1 else 'have'} no samples: {named}; "
            f"{'it keeps its label' if len(absent) == 1 else 'they keep their labels'}, and samples are "
            "drawn from the others only"
        )
    if pairs := _alike(classes):
        named = ", ".join(f"{printable(one)} and {printable(other)}" for one, other in pairs[:MOST_PAIRS])
        more = ", …" if len(pairs) > MOST_PAIRS else ""
        yield (
            f"classes whose names look the same but for case, spaces or composed letters: {named}{more}; they stay apart, so "
            "merge their folders if they are one"
        )
    if unread := unread_pictures(samples.ignored):
        yield f"pictures of formats that are not read are left out: {unread}; convert them, for example to png"


def _alike(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of classes whose names look the same: Cat and cat, or é as one character and as two."""
    first, pairs = dict[str, str](), list[tuple[str, str]]()
    for name in classes:
        look = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        if first.setdefault(look, name) != name:
            pairs.append((first[look], name))
    return pairs


def deep_values(source: Source) -> Iterator[str]:
    """A sentence on pictures of 16 bits whose values use few of them: they would be nearly black.

    At most LOOKED_AT pictures are opened, and those of 8 bits not decoded: one folder may hold both.
    """
    if source.reading.range is not None:
        return
    low, high, seen, colour = 1 << 16, -1, 0, False
    for i in np.unique(np.linspace(0, len(source) - 1, min(len(source), LOOKED_AT)).astype(int)).tolist():
        try:
            with source.open(i) as image:
                if image.width * image.height > source.reading.max_pixels:
                    continue
                deep_colour = facts_of(image).deep
                if not (deep_colour or image.mode == "I" or image.mode.startswith("I;16")):
                    continue
                values, colour = np.asarray(image), deep_colour
        except Exception:  # decoders raise any type on a damaged file; it is reported when it is read
            continue
        low, high, seen = min(low, int(values.min())), max(high, int(values.max())), seen + 1
    if colour and seen and high < 64:
        yield (
            f"pictures of 16 bits in colour use little of their range: at most {high} of 255 in the upper 8 bits, which are "
            "those that are read; they would be nearly black: scale them before"
        )
    elif not colour and seen and low >= 0 and high < 1 << 14:
        bits = next(bits for bits in (8, 10, 12, 14) if high < 1 << bits)
        yield (
            f"pictures of 16 bits use little of their range: values {low} to {high} of 65535 in {seen} of them; they would be "
            f"nearly black: give --range 0 {(1 << bits) - 1} if they hold {bits} bits"
        )
