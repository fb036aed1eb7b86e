"""The runs and comparisons in the folders that the page shows, each with an id that stands for it in addresses."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from selftrans.messages import printable
from selftrans.ui.contained import Contained

DEPTH = 4  #: folders below a given one that are searched
MOST = 20_000  #: folders that are looked at
AGAIN = 2.0  #: seconds between two searches of the folders
#: folders of runs and data that hold no runs
SKIPPED = {"__pycache__", "checkpoints", "node_modules", "previews", "site-packages", "tensorboard"}
#: files of `compare` and `quickstart`; a folder with one of them is a comparison
TABLES = ("compare.json", "table.json")


class Found(NamedTuple):
    """A run, or a comparison."""

    id: str
    name: str  #: path below the given folder, for people; after the folder where several folders have such a path
    place: Contained


class Listing(NamedTuple):
    """What the folders hold."""

    runs: dict[str, Found]
    tables: dict[str, Found]
    notes: tuple[str, ...]  #: what was not searched, one line each


class Folders:
    """The folders that the page shows. ValueError for one that does not exist."""

    def __init__(self, given: Sequence[Path]) -> None:
        for path in given:
            if not path.is_dir():
                raise ValueError(f"{printable(path)} is not a folder; give a run, or a folder with runs in it")
        self.roots = tuple(dict.fromkeys(path.resolve() for path in given))
        self._found, self._next = Listing({}, {}, ()), 0.0

    def listing(self) -> Listing:
        """The runs and comparisons as they were at most AGAIN seconds ago, or 20 times as long as a search takes."""
        began = time.monotonic()
        if began >= self._next:
            self._found = search(self.roots)
            ended = time.monotonic()
            self._next = ended + max(AGAIN, 20 * (ended - began))
        return self._found

    def run(self, key: str) -> Found:
        """The run of this id. LookupError where there is none."""
        found = self.listing().runs.get(key)
        if found is None:
            raise LookupError("there is no such run; it may have been removed")
        return found


def search(roots: Sequence[Path]) -> Listing:
    """Runs and comparisons below these folders, in the order of their names. Symbolic links are not followed."""
    runs: dict[str, Found] = {}
    tables: dict[str, Found] = {}
    notes = []
    for root in roots:
        waiting, looked = [Contained(root)], 0
        while waiting and looked < MOST:
            place = waiting.pop()
            looked += 1
            kinds = {each.name: each.is_dir(follow_symlinks=False) for each in place.entries()}
            files, folders = {n for n, d in kinds.items() if not d}, [n for n, d in kinds.items() if d]
            found = Found(_id(place), _name(place), place)
            if files & {*TABLES}:
                tables[found.id] = found
            if is_run(place, files, folders):
                runs[found.id] = found
            elif len(place.parts) < DEPTH:
                waiting += [place / name for name in reversed(folders) if name not in SKIPPED]
        if waiting:
            notes.append(f"{printable(root)} holds more than {MOST:,} folders; only those were searched")
    return Listing(_distinguished(runs), tables, tuple(notes))


def _distinguished(runs: dict[str, Found]) -> dict[str, Found]:
    """The runs, with the name of their root before names that occur twice, or its path where they still do."""
    for folder in (lambda root: root.name, str):
        known = Counter(found.name for found in runs.values())
        runs = {
            key: found._replace(name=printable("/".join((folder(found.place.root), *found.place.parts))))
            if known[found.name] > 1
            else found
            for key, found in runs.items()
        }
    return runs


def is_run(place: Contained, files: set[str], folders: Sequence[str]) -> bool:
    """Whether a folder is a run, also one that has lost some of its files."""
    if "run.json" in files or {"config.json", "data.json"} <= files:
        return True
    return "config.json" in files and any("checkpoints" in (place / name).folders() for name in folders)


def _name(place: Contained) -> str:
    return printable("/".join(place.parts) or place.root.name)


def _id(place: Contained) -> str:
    return hashlib.sha256(str(place.path).encode("utf-8", "surrogateescape")).hexdigest()[:16]
