"""Records (methods, models) that other packages add: by an entry point, or as `module:function` that the user has named.

Entry points belong to packages that are installed, so they are trusted. `module:function` can name any module: it is imported
only where the user has given it on the command line, never because a checkpoint or a configuration file names it.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any, Generic, TypeVar

from selftrans.messages import page
from selftrans.suggest import nearest

Record = TypeVar("Record")
_trusted: dict[str, Any] = {}  #: `module:function` that the user has given in this process -> what it names


def installed_version(package: str) -> str | None:
    """The version of an installed package; None for one that is not installed, also where it is run from its sources."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def trust(name: str) -> None:
    """Import `module:function`, so that a run may name it (a second time does nothing).

    ValueError for a name of another form, a module that cannot be imported and a function that it does not have.
    """
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise ValueError(f"--trust {name} names no code; write MODULE:FUNCTION")
    try:
        _trusted[name] = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ValueError(f"{name} cannot be imported: {error}") from error
    except AttributeError as error:
        raise ValueError(f"{name} cannot be imported: {module} has no {attribute}") from error


def trust_named(*names: str) -> None:
    """`trust` those of these names that are of the form `module:function`, because the caller names them."""
    for name in names:
        if ":" in name:
            trust(name)


class NotFound(ValueError):
    """No record has this name. `in_file`: the message for a name that was read from a file, not given by the user."""

    def __init__(self, message: str, in_file: str | None = None) -> None:
        super().__init__(message)
        self.in_file = in_file or message


class Registry(Generic[Record]):
    """Records by name.

    Args:
        what: "method" or "model", for messages. builtin: the records of this package, by name.
        kind: the class of a record. group: entry points whose name is a record's, and whose object is one or returns one.
        names: further names by which a record is found, such as those of published sizes.
    """

    def __init__(
        self,
        what: str,
        builtin: dict[str, Record],
        kind: type[Record],
        group: str,
        names: Callable[[Record], tuple[str, ...]] = lambda record: (),
    ) -> None:
        self.what, self.builtin, self.kind, self.group, self.names = what, builtin, kind, group, names
        self._outside: dict[str, Record] = {}  #: loaded so far, by the name they were found under

    def find(self, name: str) -> Record:
        """The record `name`. ValueError suggests the nearest name, or says what is wrong with code outside the package."""
        for record_name, record in {**self.builtin, **self._outside}.items():
            if name == record_name or name in self.names(record):
                return record
        if ":" in name:
            return self._by_module(name)
        for record_name, record in self.installed():
            if name == record_name or name in self.names(record):
                return record
        for point in entry_points(group=self.group, name=name):
            return self._load(point)  # `installed` skipped it, because it is broken: loading it again raises the reason
        hint = nearest(name, self.known())
        raise NotFound(
            f"{self.what} '{name:.80}' is unknown{hint}{'' if hint.endswith('?') else ', or module:function'}",
            f"{self.what} '{name:.80}' is not known here; install the package that adds it",
        )

    def loaded(self, name: str) -> Record | None:
        """The record of this name that is built in or was found before; nothing is imported."""
        return self.builtin.get(name) or self._outside.get(name)

    def known(self) -> list[str]:
        """Every name, also those of entry points, which are not imported for this."""
        records: dict[str, Record | None] = dict(self.builtin)
        records |= {point.name: self._outside.get(point.name) for point in entry_points(group=self.group)}
        return [name for key, record in records.items() for name in (self.names(record) if record else ()) or (key,)]

    def every(self) -> list[Record]:
        """The built-in records, those of entry points, and those that were named as module:function in this process."""
        outside = dict(self.installed())
        return [*self.builtin.values(), *{**outside, **self._outside}.values()]

    def installed(self) -> Iterator[tuple[str, Record]]:
        """Records of entry points, each loaded once. A package that is broken is left out, with a warning."""
        for point in entry_points(group=self.group):
            try:
                yield point.name, self._load(point)
            except ValueError as error:
                warnings.warn(f"{error}; it is left out", stacklevel=2)

    def _load(self, point: EntryPoint) -> Record:
        if point.name in self.builtin:
            raise ValueError(f"{point.value} calls its {self.what} '{point.name}', which is built in; rename it")
        if point.name not in self._outside:
            self._outside[point.name] = self._checked(point.name, point.value, point.load)
        return self._outside[point.name]

    def _by_module(self, name: str) -> Record:
        if name not in _trusted:
            raise NotFound(
                f"{self.what} '{name:.80}' is code outside selftrans, and is not imported because a file names it; "
                f"--trust {name:.80} allows it"
            )
        self._outside[name] = self._checked(name, name, lambda: _trusted[name])
        return self._outside[name]

    def _checked(self, name: str, origin: str, load: Callable[[], Any]) -> Record:
        try:
            found = load()
            record = found() if callable(found) and not isinstance(found, self.kind) else found
        except Exception as error:  # code outside selftrans fails in its own ways
            raise ValueError(
                f"{self.what} '{name}' cannot be imported from {origin} ({type(error).__name__}: {error})"
            ) from error
        if not isinstance(record, self.kind):
            raise ValueError(f"{origin} is no {self.kind.__name__}; see {page('extending.md')}")
        return record
