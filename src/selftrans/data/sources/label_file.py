"""`dataset.json` next to pictures, as StyleGAN's and EDM's tools write it: the label of each picture, in place of its folder.

{"labels": [["00000/img00000000.png", 6], ...]}    "labels" null or missing: no classes
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from selftrans.data.sources.source import MAX_CLASSES, Source
from selftrans.storage import first_line, printable

NAME = "dataset.json"
MAX_BYTES = 1 << 28  #: of the file


def labelled_folder(source: Source, root: Path) -> Source | None:
    """The pictures of a folder with the labels of its `dataset.json`; None without one. Raises ValueError as `labelled`."""
    path = root / NAME
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return labelled(source, file.read(MAX_BYTES + 1), str(path))


def labelled(source: Source, data: bytes, where: str, top: str = "") -> Source | None:
    """The source with the labels in `data`, whose names begin after `top`; classes are named by their numbers.

    None for a json of another kind, without `labels`. Raises ValueError for labels that are no integers from 0, and for
    pictures without a label.
    """
    if not len(source):
        return None
    if len(data) > MAX_BYTES:
        raise ValueError(f"{where} is larger than {MAX_BYTES} bytes; remove it")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid json ({first_line(error)}); repair it, or remove it") from error
    if not isinstance(content, dict) or "labels" not in content:
        return None
    ignored = dict(Counter(source.ignored) - Counter({"*.json": 1}))
    if content["labels"] is None:
        return replace(source, labels=np.zeros(len(source), np.int64), classes=(), ignored=ignored)
    of = _labels(content["labels"], where)
    names = [name.removeprefix(top) for name in source.names]
    missing = [name for name in names if name not in of]
    if missing:
        raise ValueError(
            f"{where} has no label for {len(missing):,} pictures, such as {printable(missing[0])}; add them, or remove the file"
        )
    labels = np.array([of[name] for name in names], dtype=np.int64)
    return replace(source, labels=labels, classes=tuple(map(str, range(int(labels.max()) + 1))), ignored=ignored)


def _labels(entries: object, where: str) -> dict[str, int]:
    of = dict[str, int]()
    for entry in entries if isinstance(entries, list) else [entries]:
        name, label = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if not isinstance(name, str) or type(label) is not int or not 0 <= label < MAX_CLASSES:
            raise ValueError(
                f"{where}: labels should list a name and an integer from 0 to {MAX_CLASSES - 1} each, not "
                f"{printable(repr(entry), 80)}; repair it, or remove it"
            )
        of[name.replace("\\", "/")] = label
    return of
