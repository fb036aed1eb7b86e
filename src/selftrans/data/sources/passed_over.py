"""Files of a source that are not read: why, how many, and how a message names them.

`ignored` of a source maps a reason to a count: the name of a known cache or system file, `*.ext` for files of another
kind, or a sentence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath

from selftrans.storage import plural, printable

HIDDEN = "hidden files"
BARE, ODD = "*", "*.…"  #: files without an extension, and with one that is no ordinary word
#: caches, thumbnails and trash that systems and programs leave in folders, in lower case
JUNK = frozenset(
    (
        *("$recycle.bin", "#recycle", "#snapshot", "@eadir", "@recycle", "@recently-snapshot", "@tmp", "__macosx"),
        *("__pycache__", "desktop.ini", "ehthumbs.db", "ehthumbs_vista.db", "icon\r", "lost+found"),
        *("system volume information", "thumbs.db", ".ds_store", ".git", ".ipynb_checkpoints", ".thumbnails"),
        *(".cache", ".spotlight-v100", ".trashes", ".fseventsd", ".directory", ".venv", ".idea", ".vscode"),
    )
)
#: extensions of pictures that Pillow, as it is used here, does not read
UNREAD = frozenset(
    (
        *(".arw", ".cr2", ".cr3", ".dcm", ".dng", ".emf", ".eps", ".exr", ".hdr", ".heic", ".heif", ".ico"),
        *(".jxl", ".jxr", ".nef", ".nii", ".orf", ".pcx", ".pfm", ".psd", ".raf", ".raw", ".rw2", ".svg", ".tga"),
        *(".wmf", ".xcf"),
    )
)
#: extensions of sounds and of videos that are not read
UNREAD_SOUNDS = frozenset((".aac", ".aif", ".aiff", ".m4a", ".mid", ".mp3", ".ogg", ".opus", ".wma"))
UNREAD_VIDEOS = frozenset((".3gp", ".flv", ".mpeg", ".mpg", ".mts", ".wmv"))
#: beginnings of reasons, of several files and of one
NOUNS = (
    ("hidden files", "hidden file"),
    ("symbolic links to folders", "symbolic link to a folder"),
    ("broken links, pipes and devices", "broken link, pipe or device"),
    ("class folders", "class folder"),
    ("empty captions", "empty caption"),
)
MOST = 8  #: kinds of files that a message names


def junk_name(name: str) -> str | None:
    """The name under which a file or folder is ignored and counted: its own if it is known; None: it is not ignored."""
    if name.lower() in JUNK:
        return name.rstrip("\r")
    if name.startswith("__MACOSX"):
        return "__MACOSX"
    return HIDDEN if name.startswith(".") else None


def kind_of_file(name: str) -> str:
    """The name under which a file of another kind is counted: `*.ext`."""
    suffix = PurePosixPath(name).suffix.lower()
    if not suffix:
        return BARE
    return f"*{suffix}" if len(suffix) <= 12 and suffix[1:].isalnum() else ODD


class Archived:
    """Counts what an archive holds besides pictures: a folder that is ignored once, not each file in it."""

    def __init__(self, ignored: Counter[str]) -> None:
        self._ignored, self._seen = ignored, set[tuple[str, ...]]()

    def ignores(self, parts: Sequence[str]) -> bool:
        """Whether an entry is ignored, by one of the parts of its name; then it is counted."""
        for k, part in enumerate(parts):
            if (reason := junk_name(part)) is not None:
                path = tuple(parts[: k + 1])
                self._ignored[reason] += path not in self._seen
                self._seen.add(path)
                return True
        return False


def in_words(ignored: Mapping[str, int]) -> str:
    """What is not read, as one sentence; empty when nothing is."""
    files = {reason.removeprefix("*"): count for reason, count in ignored.items() if reason.startswith("*")}
    others = [
        f"{count:,} {printable(_singular(reason) if count == 1 else reason)}"
        for reason, count in ignored.items()
        if not reason.startswith("*")
    ]
    said = [f"ignored: {', '.join(others)}"] if others else []
    if files:
        total = sum(files.values())
        said.insert(0, f"passed over {plural(total, 'file')}: {_kinds(files)}")
    return "; ".join(said)


def _singular(reason: str) -> str:
    """The reason for ignoring one file: of a sentence that begins with a noun in the plural, that in the singular."""
    for several, one in NOUNS:
        if reason.startswith(several):
            return one + reason.removeprefix(several)
    return reason


def unread(ignored: Mapping[str, int], suffixes: Collection[str] = UNREAD) -> str:
    """The files of other formats (those of `suffixes`: of pictures) among what is not read; empty when there are none."""
    files = {reason.removeprefix("*"): count for reason, count in ignored.items() if reason.startswith("*")}
    return _kinds({suffix: count for suffix, count in files.items() if suffix in suffixes})


def _kinds(files: Mapping[str, int]) -> str:
    """3 .heic, 2 .jxl, 1 .txt: the most frequent first."""
    order = sorted(files, key=lambda kind: (-files[kind], kind))
    named = [f"{files[kind]:,} {'without extension' if kind == '' else kind}" for kind in order[:MOST]]
    rest = sum(files[kind] for kind in order[MOST:])
    return ", ".join(named + ([f"{rest:,} of {len(order) - MOST} other kinds"] if rest else []))
