"""`--set SECTION.FIELD=JSON ...`: settings of a run on the command line of a benchmark."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_set(parser: argparse.ArgumentParser, of: str) -> None:
    """Add the option `--set` for the settings of `of`; the parsed `options.set` is a list of (dotted name, value)."""
    parser.add_argument(
        "--set", nargs="+", type=setting, default=[], metavar="SECTION.FIELD=JSON", help=f"settings of {of}"
    )


def setting(word: str) -> tuple[str, Any]:
    """Dotted name and value of `name=json`. ArgumentTypeError for anything else."""
    name, _, value = word.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{word!r} should be SECTION.FIELD=JSON, such as train.lr=1e-3 or train.times='\"uniform\"'"
        ) from None
