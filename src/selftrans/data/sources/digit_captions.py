"""English sentences about scanned digits: which digit it is, and how thick, slanted, large and where.

`TRAINED` is the wording of the captions. `RESERVED` has other synonyms and patterns for the same things, and is never used for
training, so that prompts in it show whether the meaning was learnt. Levels -1, 0, 1 are those of `digit_attributes.levels`.
Sentences depend on their index only: the same in every process, on every machine, with every version of numpy.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from selftrans.data.sources.captions import with_captions
from selftrans.data.sources.digit_attributes import ATTRIBUTES, attributes, levels
from selftrans.data.sources.source import Source

CAPTIONS = 4  #: captions of a scan
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

#: the words for each of the levels -1, 0, 1; an empty tuple: none of this kind
Said = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


class Described(NamedTuple):
    """What a sentence says: the digit, and the levels (-1, 0, 1) of the attributes that it mentions."""

    digit: int
    levels: Mapping[str, int]


@dataclass(frozen=True)
class Wording:
    """The words and patterns of a set of sentences."""

    nouns: tuple[str, ...]  #: {} is the name of the digit, or its numeral
    adjectives: Mapping[str, Said]  #: attribute -> words before the noun
    phrases: Mapping[str, Said]  #: attribute -> words after the noun
    patterns: tuple[str, ...]  #: of {noun}, with its adjectives and article, and {phrases}
    bare: tuple[str, ...]  #: patterns of a sentence without phrases


TRAINED = Wording(
    nouns=("{}", "{}", "digit {}", "handwritten {}", "number {}"),
    adjectives={
        "thickness": (("thin", "fine", "light"), (), ("thick", "heavy", "fat")),
        "size": (("small", "little"), ("medium-sized",), ("large", "big")),
    },
    phrases={
        "thickness": (
            ("drawn with thin strokes", "in thin lines", "in light strokes", "from a fine brush"),
            ("of medium thickness", "in medium lines"),
            ("drawn with thick strokes", "in thick lines", "in heavy strokes", "from a wide brush"),
        ),
        "slant": (
            ("leaning left", "slanted to the left", "sloping left", "bent to the left"),
            ("upright", "standing straight", "not leaning"),
            ("leaning right", "slanted to the right", "sloping right", "bent to the right"),
        ),
        "size": (
            ("of small size", "written small"),
            ("of medium size",),
            ("of large size", "written large"),
        ),
        "column": (
            ("on the left", "placed to the left", "at the left side"),
            ("in the middle", "neither left nor right"),
            ("on the right", "placed to the right", "at the right side"),
        ),
        "row": (
            ("near the top", "placed high", "high up"),
            ("at medium height", "neither high nor low"),
            ("near the bottom", "placed low", "low down"),
        ),
    },
    patterns=(
        "{noun}, {phrases}",
        "{noun} {phrases}",
        "this is {noun}, {phrases}",
        "scan of {noun}, {phrases}",
        "{phrases}: {noun}",
    ),
    bare=("{noun}", "this is {noun}", "scan of {noun}"),
)

RESERVED = Wording(
    nouns=("numeral {}", "figure {}", "written {}"),
    adjectives={
        "thickness": (("slender", "delicate", "skinny"), (), ("bold", "broad", "chunky")),
        "size": (("tiny", "miniature"), ("average",), ("huge", "giant")),
    },
    phrases={
        "thickness": (
            ("in slender ink", "from a narrow pen"),
            ("of ordinary weight", "from an ordinary pen"),
            ("in bold ink", "from a broad pen"),
        ),
        "slant": (
            ("tilted to the left", "tipping leftwards"),
            ("vertical", "not tilted"),
            ("tilted to the right", "tipping rightwards"),
        ),
        "size": (("with tiny dimensions",), ("with ordinary dimensions",), ("with huge dimensions",)),
        "column": (
            ("shifted towards the left edge", "moved leftwards"),
            ("centred sideways", "not moved sideways"),
            ("shifted towards the right edge", "moved rightwards"),
        ),
        "row": (
            ("in the upper part", "raised upwards"),
            ("vertically centred", "not raised or lowered"),
            ("in the lower part", "lowered downwards"),
        ),
    },
    patterns=("draw {noun}, {phrases}", "someone wrote {noun}: {phrases}", "see {noun}, {phrases}"),
    bare=("draw {noun}", "someone wrote {noun}", "see {noun}"),
)


def sentence(described: Described, wording: Wording, key: str) -> str:
    """A sentence in a wording; `key` chooses the words and their order. "a thick three, leaning right"."""
    chance = random.Random(key)

    pick = partial(_pick, chance)
    noun = pick(wording.nouns).format(pick((NAMES[described.digit], str(described.digit))))
    adjectives, phrases = [], []
    for name in sorted(described.levels, key=lambda _: chance.random()):
        level = described.levels[name] + 1
        before = wording.adjectives[name][level] if name in wording.adjectives else ()
        if before and chance.random() < 0.6:
            adjectives.append(pick(before))
        else:
            phrases.append(pick(wording.phrases[name][level]))
    noun = _with_article(" ".join([*adjectives, noun]))
    if not phrases:
        return pick(wording.bare).format(noun=noun)
    return pick(wording.patterns).format(noun=noun, phrases=_listed(phrases, pick((", ", " and "))))


def captions(images: np.ndarray, labels: np.ndarray) -> list[tuple[str, ...]]:
    """`CAPTIONS` sentences for each image (N, R, C) uint8 of the digits `labels` (N,), in the wording `TRAINED`.

    The first mentions every attribute, the others some of them. Levels are thirds among the images of the same digit.
    """
    measured = levels(attributes(images), labels)
    found = []
    for i, digit in enumerate(labels):
        every = {name: int(level[i]) for name, level in measured.items()}
        keys = [f"caption {i} {k}" for k in range(CAPTIONS)]
        mentioned = [every] + [_some(every, key) for key in keys[1:]]
        found.append(
            tuple(
                sentence(Described(int(digit), some), TRAINED, key) for some, key in zip(mentioned, keys, strict=True)
            )
        )
    return found


def digits_with_captions(digits: Source) -> Source:
    """The source of scanned digits, with `captions` in place of labels."""
    images = np.stack([np.asarray(digits.open(i)) for i in range(len(digits))])
    return with_captions(digits, captions(images, digits.labels))


def prompts(count: int, seed: int = 0) -> list[Described]:
    """What `count` prompts ask for: the digits in turn, the attributes at levels that are drawn independently.

    Half of them mention every attribute, half some of them; each mentions at least one.
    """
    found = []
    for k in range(count):
        key = f"prompt {seed} {k}"
        chance = random.Random(key)
        every = {name: int(chance.random() * 3) - 1 for name in ATTRIBUTES}
        found.append(Described(k % len(NAMES), every if k // len(NAMES) % 2 == 0 else _some(every, key)))
    return found


def _some(every: Mapping[str, int], key: str) -> dict[str, int]:
    """Each attribute with probability 1/2, one at least."""
    chance = random.Random(f"{key} mentions")
    kept = {name: level for name, level in every.items() if chance.random() < 0.5}
    name = _pick(chance, list(every))
    return kept or {name: every[name]}


def _pick(chance: random.Random, options: Sequence[str]) -> str:
    # the values of `random` are the same in every version of Python; those of `choice` are not
    return options[int(chance.random() * len(options))]


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun.startswith(("eight", "8", "average")) else f"a {noun}"


def _listed(phrases: Sequence[str], joint: str) -> str:
    """ "x", "x and y", "x, y and z" or, with the joint " and ", "x and y and z" for two only."""
    if len(phrases) < 3:
        return joint.join(phrases)
    return ", ".join(phrases[:-1]) + f" and {phrases[-1]}"
