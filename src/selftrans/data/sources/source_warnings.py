"""Warnings about a source before it is encoded: classes without samples, labels that are not read, dark pictures, ..."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np

from selftrans.data.sources.captions import CAPTION_FILES
from selftrans.data.sources.file_kinds import (
    UNREAD_PICTURES,
    UNREAD_SOUNDS,
    UNREAD_VIDEOS,
    describe_unread,
    of_other_kinds,
)
from selftrans.data.sources.label_file import SUFFIXES
from selftrans.data.sources.labelling import NO_LABEL
from selftrans.data.sources.metadata import facts_of
from selftrans.data.sources.source import Samples, Source, present_classes
from selftrans.messages import listed, plural, printable

MOST_TABLES = 3  #: files of a kind that may hold labels
MOST_BYTES = 1 << 16  #: of each that are read
SHORTEST = 3  #: letters of a name without its extension that is looked for: shorter ones are in any file
#: sides of a picture, not other meanings of the words, such as the right answer
SIDES = re.compile(
    r"\b((on|to|at|from) the (left|right(?! (track|time|moment|place|way|person|people|price|answer|angle)s?\b))"
    r"|(left|right)([- ]?hand(ed)?|[- ]side|-?most|-?wards?))\b",
    re.I,
)
_OTHER = {"left": "right", "right": "left"}
MOST_PAIRS = 4  #: of names that look the same, in a warning
LOOKED_AT = 24  #: pictures of which the range of values is read, spread over the source


def source_warnings(samples: Samples, *, flip: bool = False) -> Iterator[str]:
    """One sentence for each warning. `flip`: mirrored pictures are stored, too."""
    labels, classes = np.delete(samples.labels, list(samples.faults)), samples.classes
    if present := present_classes(labels, classes):
        absent = sorted(set(range(len(classes))) - set(present))
        named = listed([classes[k] for k in absent])
        yield (
            f"{len(absent):,} of {plural(len(classes), 'class')} {'has' if len(absent) == 1 else 'have'} no samples: {named}; "
            f"{keep_labels(len(absent))}, and samples are drawn from the others only"
        )
    if pairs := _alike(classes):
        named = listed([f"{printable(one)} and {printable(other)}" for one, other in pairs], MOST_PAIRS)
        yield (
            f"classes whose names differ only in case, spaces or composed letters: {named}; they are separate classes, so "
            "merge their folders if they are the same"
        )
    if isinstance(samples, Source):
        yield from _label_warnings(samples)
        yield from dark_pictures(samples)
        kinds = [("pictures", UNREAD_PICTURES, "png")]
    else:
        kinds = [("sounds", UNREAD_SOUNDS, "wav"), ("videos", UNREAD_VIDEOS, "mp4")]
    for noun, suffixes, remedy in kinds:
        if left_out := describe_unread(samples.ignored, suffixes):
            yield f"{noun} of formats that are not read are left out: {left_out}; convert them, for example to {remedy}"
    if flip:
        yield from mirrored_captions(samples)
        yield from mirrored_classes(samples)


def keep_labels(classes: int) -> str:
    """What happens to the labels of so many classes without samples."""
    return "it keeps its label" if classes == 1 else "they keep their labels"


def _label_warnings(source: Source) -> Iterator[str]:
    """Sentences on classes that may mean a missing label, and on files that may hold the labels or captions of the pictures."""
    given = source.is_table or source.reading.labels is not None
    doubtful = [name for name in source.classes if name.casefold() in NO_LABEL] if given else []
    if doubtful and len(source.classes) > 1:
        yield f"the class {listed(doubtful)} may stand for a missing label; if so, leave such labels empty"
    if given or source.classes or source.captions is not None:
        return
    files = of_other_kinds(source.ignored)
    tables = [suffix for suffix in SUFFIXES if 0 < files.get(suffix, 0) <= MOST_TABLES]
    if naming := [suffix for suffix, read in source.tables if suffix in tables and _names_a_picture(source, read)]:
        yield f"the pictures have no classes; if a {naming[0]} file next to them holds labels, give it by --labels FILE"
    elif texts := [suffix for suffix in CAPTION_FILES if 2 * files.get(suffix, 0) > len(source)]:
        yield f"the pictures have no classes; if the {texts[0]} files next to them hold captions, give --text MODEL"


def _names_a_picture(source: Source, read: Callable[[int], bytes]) -> bool:
    """Whether the beginning of a table or json has the name of a picture as one of its values."""
    try:
        data = read(MOST_BYTES)
    except Exception:  # of a zip the type depends on the damage
        return False
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = unicodedata.normalize("NFC", data.decode(encoding, "ignore"))
    values = {value.strip().replace("\\", "/").rsplit("/", 1)[-1] for value in re.split(r'[,;\t\r\n"]', text)}
    for name in source.names:
        path = PurePosixPath(unicodedata.normalize("NFC", name))
        if path.name in values or (len(path.stem) >= SHORTEST and path.stem in values):
            return True
    return False


def mirrored_captions(samples: Samples) -> Iterator[str]:
    """A sentence on captions that name the left or right side, which is wrong for mirrored pictures."""
    captions = [caption for each in samples.captions or () for caption in each]
    if found := sum(map(bool, map(SIDES.search, captions))):
        say = "says" if found == 1 else "say"
        yield (
            f"{found:,} of {plural(len(captions), 'caption')} {say} left or right, which is wrong for the mirrored pictures of "
            "--flip; leave it out if that matters"
        )


def mirrored_classes(samples: Samples) -> Iterator[str]:
    """A sentence on classes that differ in the side alone, such as turn_left and turn_right, and are stored mirrored, too."""
    known = {name.casefold(): name for name in samples.classes}
    mirrored = {name: re.sub("left|right", lambda side: _OTHER[side[0]], name) for name in known}
    if pairs := [(known[name], known[mirrored[name]]) for name in known if name < mirrored[name] in known]:
        named = listed([f"{printable(one)} and {printable(other)}" for one, other in pairs], MOST_PAIRS)
        yield (
            f"the mirrored pictures of --flip keep their class, also those of classes that differ in the side: {named}; "
            "leave it out if that matters"
        )


def _alike(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of classes whose names look the same: Cat and cat, or é as one character and as two."""
    first, pairs = dict[str, str](), list[tuple[str, str]]()
    for name in classes:
        look = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        if first.setdefault(look, name) != name:
            pairs.append((first[look], name))
    return pairs


def all_grey(source: Source) -> bool:
    """Whether all pictures that are looked at (at most LOOKED_AT) are grey, but read as three equal channels."""
    modes = set[str]()
    for i in _looked_at(source) if source.channels == 3 else ():
        try:
            with source.open(i) as image:
                modes.add(image.mode)
        except Exception:  # decoders raise any type on a damaged file; it is reported when it is read
            continue
    return bool(modes) and all(mode in ("1", "L", "LA", "I", "F") or mode.startswith("I;16") for mode in modes)


def _looked_at(source: Source) -> list[int]:
    return np.unique(np.linspace(0, len(source) - 1, min(len(source), LOOKED_AT)).astype(int)).tolist()


def dark_pictures(source: Source) -> Iterator[str]:
    """A sentence on pictures of 16 bits whose values use few of them: they would be nearly black.

    At most LOOKED_AT pictures are opened, and those of 8 bits not decoded: one folder may hold both.
    """
    if source.reading.range is not None:
        return
    low, high, seen, colour = 1 << 16, -1, 0, False
    for i in _looked_at(source):
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
