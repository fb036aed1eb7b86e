"""The classes of images as a user names them: `cat dog`, `3 3 5`, `cat:10 dog:5` ⇒ labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from selftrans.messages import escaped, listed, plural, printable
from selftrans.sample_config import Labels
from selftrans.suggest import closest, did_you_mean
from selftrans.types import Conditions

MOST = 1_000_000  #: images that counts may ask for
NO_CLASS = "no class"  #: name of the null label
SHOWN = 12  #: classes whose counts are listed


def chosen_labels(words: Sequence[str], classes: Sequence[str], conditions: Conditions) -> tuple[Labels, bool]:
    """The labels that `words` name, and whether they say how many images of each.

    A word is a class by its name or, if no class has that name, by its number, and may end in `:COUNT`; `balanced` or `random`
    stands alone. Labels without counts repeat over the images. Raises ValueError for a class that the model does not have.
    """
    if len(words) == 1 and words[0] in ("balanced", "random"):
        return "balanced" if words[0] == "balanced" else "random", False
    if conditions.kind != "labels":
        raise ValueError(f"labels are for models of classes, this one has {conditions}; leave them out")
    if not words:
        raise ValueError("no classes are given; write --labels CLASS [CLASS ...], or leave --labels out")
    found, counts = list[tuple[int, int]](), False
    for word in words:
        label, count = _label(word, classes, conditions.num_classes), 1
        head, _, tail = word.rpartition(":")
        if label is None and head and re.fullmatch(r"\d{1,9}", tail):
            label, count, counts = _label(head, classes, conditions.num_classes), int(tail), True
        if label is None:
            near = did_you_mean(closest(word, classes, most=1)) if classes else ""
            has = f"{plural(conditions.num_classes, 'class')}{': ' + listed(classes) if classes else ''}"
            raise ValueError(
                f"class {printable(word, 60)!r} is unknown{near}; the model has {has}, or 0 to {conditions.num_classes - 1}"
            )
        found.append((label, count))
    total = sum(count for _, count in found)
    if not 1 <= total <= MOST:
        raise ValueError(f"the counts of the labels add up to {total:,}; ask for 1 to {MOST:,} images")
    return tuple(label for label, count in found for _ in range(count)), counts


def _label(word: str, classes: Sequence[str], count: int) -> int | None:
    """The number of a class; `count` itself is the null label. A name may also be given as it is printed, `a\\nb`."""
    for names in (classes, [escaped(name) for name in classes]):
        if word in names:
            return names.index(word)
    return int(word) if re.fullmatch(r"\d{1,9}", word) and int(word) <= count else None


def per_class(labels: Iterable[int], classes: Sequence[str]) -> dict[str, int]:
    """How many images each class has, in the order of the labels; a class without a name is its number.

    The null label comes after the classes, and would read like one more: it is `NO_CLASS`.
    """
    found, names = Counter(map(int, labels)), [*classes, NO_CLASS] if classes else []
    return {names[k] if k < len(names) else str(k): found[k] for k in sorted(found)}


def in_words(counts: dict[str, int]) -> str:
    """`10 of cat, 5 of dog`; of many classes the fewest and the most."""
    if len(counts) <= SHOWN:
        return ", ".join(f"{count:,} of {printable(name, 60)}" for name, count in counts.items())
    few, most = min(counts.values()), max(counts.values())
    return f"{few:,}{'' if few == most else f' to {most:,}'} of each of {plural(len(counts), 'class')}"
