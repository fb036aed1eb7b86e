"""Labels given as words or numbers ⇒ labels and classes of a source; pictures without a label are its faults."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from selftrans.data.sources.source import MAX_CLASSES, Source
from selftrans.messages import are, one_line, plural, printable

Label = str | int | None  #: a word or a number; None: no label
NO_LABEL = frozenset(("n/a", "na", "nan", "none", "null"))  #: words that stand for a missing label, in lower case
_NUMBER = re.compile(r"[+-]?\d{1,9}(\.0*)?")


def as_label(value: Any) -> Any:
    """A truth value as a word, a whole number of type float as an integer; any other value as it is."""
    if isinstance(value, bool):
        return str(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Numbered(NamedTuple):
    """Labels as a source holds them."""

    labels: np.ndarray  #: (n,) int64; 0 where there is none
    classes: tuple[str, ...]
    #: position without a label -> the word of NO_LABEL that stands there, if one does
    missing: Mapping[int, str | None]

    def faults(self, where: str) -> dict[int, str]:
        """Why each sample without a label has none, by its position."""
        why = "among numbers is read as none; rename it there if it is a class"
        return {
            i: f"no label in {where}: {printable(word)} {why}" if word else f"no label in {where}"
            for i, word in self.missing.items()
        }


def numbered(given: Sequence[Label], where: str) -> Numbered:
    """The classes of labels given as words or numbers, and each label as a number.

    If all are whole numbers (also as text: 3, 3.0), they are the labels, classes are named 0, 1, ..., and a negative number is
    a missing label. Otherwise the classes are the words, in the order of their code points. An empty word is a missing label.
    So is a word of NO_LABEL among numbers, if such words are less than half of all: if they are more, it is rather a class.
    Raises ValueError for more than MAX_CLASSES classes, and where there is no label at all.
    """
    word_of = {label: None if label is None else one_line(str(label)) or None for label in {*given}}
    words = [word_of[label] for label in given]
    distinct = {word for word in word_of.values() if word is not None}
    absent = {word for word in distinct if word.casefold() in NO_LABEL}
    # such as the "nan" that pandas writes for a missing number
    few = absent and 2 * sum(word in absent for word in words) < sum(word is not None for word in words)
    unread = dict[int, str]()
    if few and all(map(_NUMBER.fullmatch, distinct - absent)):
        distinct -= absent
        unread = {i: word for i, word in enumerate(words) if word is not None and word in absent}
        words = [None if word in absent else word for word in words]
    if all(map(_NUMBER.fullmatch, distinct)):
        number = {word: int(float(word)) for word in distinct}
        classes = tuple(map(str, range(min(max(number.values(), default=-1) + 1, MAX_CLASSES + 1))))
    else:
        classes = tuple(sorted(distinct))
        number = {word: i for i, word in enumerate(classes)}
    labels = [-1 if word is None else number[word] for word in words]
    if len(classes) > MAX_CLASSES:
        raise ValueError(f"{where} has more than {MAX_CLASSES:,} classes; check that these are labels of pictures")
    if not classes:
        raise ValueError(f"{where} has neither a label from 0 on nor a word; give each picture its class")
    missing = {i: unread.get(i) for i, label in enumerate(labels) if label < 0}
    return Numbered(np.maximum(np.array(labels, dtype=np.int64), 0), classes, missing)


def with_labels(source: Source, given: Mapping[str, Label], file: str, exactly: Sequence[str] | None = None) -> Source:
    """The source with the labels that a file gives to its names, or to the names `exactly`, one for each picture.

    Without `exactly`, a name that is not found as it stands is compared in Unicode's composed form, then without its folders,
    then without its extension, where that is unambiguous; warns of names that no picture has, and of ambiguous ones.
    Pictures without a label become faults of the source.
    Raises ValueError when no picture has a label.
    """
    names, loosely = exactly or source.names, exactly is None
    if not given:
        raise ValueError(f"{file} holds no names; give the path and the label of each picture")
    found, used = _matched(names, given, loosely)
    if not used:
        known, other = (printable(next(iter(each), "none")) for each in (names, given))
        none = "does not label the only file" if len(names) == 1 else f"labels none of the {plural(len(names), 'file')}"
        raise ValueError(
            f"{file} {none}: its first name is {other}, theirs {known}; name each by its path in the source"
        )
    numbers = numbered([found.get(name) for name in names], file)
    if loosely and len(used) < len(given):
        _warn_of_unused(names, found, [name for name in given if name not in used], file)
    faults = numbers.faults(PurePosixPath(file).name if loosely else file)
    return replace(source, labels=numbers.labels, classes=numbers.classes, faults=faults)


def _warn_of_unused(names: Sequence[str], found: Collection[str], unused: Sequence[str], file: str) -> None:
    """Warn of the given names that no picture has, and of those that several pictures could have."""
    forms = {_stem(name) for name in names if name not in found}
    unclear = [name for name in unused if _stem(name) in forms]
    absent = [name for name in unused if _stem(name) not in forms]
    if absent:
        warnings.warn(
            f"{plural(len(absent), 'name')} in {file} {are(len(absent))} not in the source, such as {printable(absent[0])}; "
            f"{'its label is' if len(absent) == 1 else 'their labels are'} ignored",
            stacklevel=6,
        )
    if unclear:
        do, they = ("does", "it is") if len(unclear) == 1 else ("do", "they are")
        warnings.warn(
            f"{plural(len(unclear), 'name')} in {file} {do} not say which picture {they} of, such as {printable(unclear[0])}; "
            "name each by its path in the source",
            stacklevel=6,
        )


def _matched(names: Sequence[str], given: Mapping[str, Label], loosely: bool) -> tuple[dict[str, Label], set[str]]:
    """The label of each name that has one, and the given names that were used."""
    found = {name: given[name] for name in names if name in given}
    used = set(found)
    forms: tuple[Callable[[str], str], ...] = (_composed, _last, _stem) if loosely else ()
    for form in forms:
        open_names, rest = [name for name in names if name not in found], [key for key in given if key not in used]
        if not open_names or not rest:
            break
        count_of = Counter(map(form, names))
        of_form: dict[str, list[str]] = {}
        for key in rest:
            of_form.setdefault(form(key), []).append(key)
        for name in open_names:
            keys = of_form.get(form(name), [])
            if len(keys) == 1 and count_of[form(name)] == 1:
                found[name] = given[keys[0]]
                used.add(keys[0])
    return found, used


def _composed(name: str) -> str:
    """The name with composed characters (NFC): some systems store letters and accents apart."""
    return unicodedata.normalize("NFC", name)


def _last(name: str) -> str:
    return _composed(name.rsplit("/", 1)[-1])


def _stem(name: str) -> str:
    last = _last(name)
    suffix = PurePosixPath(last).suffix
    return last.removesuffix(suffix) if suffix.isascii() and 2 <= len(suffix) <= 5 else last
