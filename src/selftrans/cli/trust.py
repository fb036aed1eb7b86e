"""`--trust MODULE:FUNCTION`: the one place where a command imports code from outside selftrans."""

from __future__ import annotations

import importlib
from collections.abc import Iterable


def trust(names: Iterable[str]) -> None:
    """Import the module of each `MODULE:FUNCTION` (importing it twice does nothing).

    Raises ValueError for a name of another form, a module that cannot be imported and a function that it does not have.
    """
    for name in names:
        module, _, function = name.partition(":")
        if not (module and function):
            raise ValueError(f"--trust {name} names no code; write MODULE:FUNCTION")
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"--trust {name} cannot be imported: {error}") from error
        if not hasattr(found, function):
            raise ValueError(f"--trust {name} cannot be imported: {module} has no {function}")
