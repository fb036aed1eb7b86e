"""`selftrans ui`: the local page of runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from selftrans.cli.options import Command, Trust


@dataclass
class Ui(Command):
    """A local page in the browser: runs live, next to each other, a playground, features, tables.

    RUNS are runs, or folders that hold runs and comparisons. The page reads them and never writes into them. A run appears
    there while it trains. With the folders of prepared data among RUNS, features of their pictures can be drawn. Needs
    `pip install 'selftrans[ui]'`.
    """

    runs: Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="[RUNS ...]")]] = ()
    """folders to show; none: `runs`, or the current one where there is no such folder"""
    port: int = 8377
    """of the address; 0: a free one"""
    host: str = "127.0.0.1"
    """where to listen. The default is reached from this machine only; any other needs --token"""
    token: str | None = None
    """that a browser must know, at least 12 characters; auto: a new one, which is part of the printed address. Of use on a
    machine with several users, too"""
    device: Literal["cuda", "cpu"] | None = None
    """where the page samples; None: the GPU if there is one. cpu leaves the GPU to the training"""

    trust: Trust = ()

    def run(self) -> None:
        try:
            from selftrans.ui.serve import serve
        except ImportError as error:
            if error.name not in ("starlette", "uvicorn"):
                raise
            raise ImportError(f"the page needs {error.name}; install it: pip install 'selftrans[ui]'") from error
        serve(**self.options())
