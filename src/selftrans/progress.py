"""Progress bars: live on a terminal, plain lines where stderr is a file or a pipe."""

from __future__ import annotations

import sys
from typing import Any

from selftrans.messages import redirect_closed_output


class _Lines:
    """A file for tqdm where stderr is not a terminal: each state of a bar becomes a line of stderr."""

    def write(self, text: str) -> None:
        if text.strip():
            redirect_closed_output()
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()

    def isatty(self) -> bool:
        return False  # bars with disable=None are for terminals only


def progress_bar(iterable: Any = None, **options: Any) -> Any:
    """A tqdm bar: live on a terminal, one line every 15 seconds elsewhere."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, **{"mininterval": 0.2} | options)
    return tqdm(iterable, file=_Lines(), ncols=0, **options | {"mininterval": 15})
