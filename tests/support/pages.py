"""Commands and Python blocks of README.md and of the pages in docs/, with the reasons for those that are not run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(?:^<!-- not run: ([^\n]*?) -->\n)?^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
#: how the reason of `<!-- not run: REASON -->`, the line above a block, may begin
REASONS = (
    "needs a GPU",
    "needs the hub",
    "needs a network",
    "needs published weights",
    "needs real data",
    "takes minutes",
    "takes hours",
    "run by tests/",  # then the file
)
PROGRAMS = (
    "selftrans",
    "make",
    "pip",
    "python",
    "accelerate",
    "torchrun",
    "bash",
    "sbatch",
    "hf",
    "aws",
    "ssh",
    "export",
)


class Block(NamedTuple):
    page: str
    language: str  #: "" of a block that shows output or files
    text: str
    skipped: str  #: why it is not run; empty: it is

    @property
    def commands(self) -> list[str]:
        """The commands of a bash block, those on several lines joined, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        stripped = [re.sub(r"\s#\s.*", "", line).strip() for line in lines if not line.startswith("#")]
        return [" ".join(line.split()) for line in stripped if line]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, named from the root of the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(page, language, body, skipped) for skipped, language, body in BLOCK.findall(text)]


def inline_commands(page: str) -> list[str]:
    """Complete commands in the text of a page, such as `selftrans train digits --help`."""
    text = BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    found = [" ".join(each.split()) for each in re.findall(r"`(selftrans [a-z][^`]*)`", text)]
    return [each for each in found if "..." not in each]


def words_of(command: str) -> list[str]:
    """Arguments of `selftrans` in a command that starts it in one way or another; empty if it does not."""
    words = shlex.split(command)
    while words and "=" in words[0] and not words[0].startswith("-"):  # environment variables
        words = words[1:]
    if words[:2] == ["accelerate", "launch"]:
        words = words[words.index("-m") + 1 :]
    return words[1:] if words[:1] == ["selftrans"] else []


def smaller(words: Sequence[str], options: str) -> list[str]:
    """The words of a command with other values of these options, whether it has them or not."""
    extra = shlex.split(options)
    replaced = {word.partition("=")[0] for word in extra if word.startswith("--")}
    kept: list[str] = []
    dropping = False
    for word in words:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in replaced
        if not dropping:
            kept.append(word)
    return [*kept, *extra]
