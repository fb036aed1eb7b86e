"""Kinds of files by extension: which are read, which are ignored, and how messages name those that are not read.

`ignored` of a source maps a reason to a count: the name of a known cache or system file, `*.ext` for files of another
kind, or a sentence.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

from selftrans.messages import are, page, plural, printable

#: extensions of pictures, sounds and videos that are read; a .gif is a picture or a video
PICTURES = frozenset(
    (
        *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx"),
        *(".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tif", ".tiff", ".webp"),
    )
)
SOUNDS = frozenset((".flac", ".wav"))
VIDEOS = frozenset((".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"))
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
UNREAD_PICTURES = frozenset(
    (
        *(".arw", ".cr2", ".cr3", ".dcm", ".dng", ".emf", ".eps", ".exr", ".hdr", ".heic", ".heif", ".ico"),
        *(".jxl", ".jxr", ".nef", ".nii", ".orf", ".pcx", ".pfm", ".psd", ".raf", ".raw", ".rw2", ".svg", ".tga"),
        *(".wmf", ".xcf"),
    )
)
UNREAD_SOUNDS = frozenset((".aac", ".aif", ".aiff", ".m4a", ".mid", ".mp3", ".ogg", ".opus", ".wma"))
UNREAD_VIDEOS = frozenset((".3gp", ".flv", ".mpeg", ".mpg", ".mts", ".wmv"))
ARCHIVES = frozenset((".7z", ".bz2", ".gz", ".lz4", ".rar", ".tgz", ".xz", ".zip", ".zst"))
ARRAYS = frozenset((".npy", ".npz"))
TABLES = frozenset((".csv", ".json", ".jsonl", ".tsv", ".txt", ".xls", ".xlsx", ".xml"))
FORMS = f"a folder, a zip, a tar or a parquet file ({page('data.md')})"
SAVE_ARRAYS = (
    "pictures are read from their files, floats (N, C, ...) from an npz with `data`, or (C, ...) from npy files, by "
    "--autoencoder values"
)
MOST = 8  #: kinds of files that a message names


def junk_name(name: str) -> str | None:
    """The name under which a file or folder is ignored and counted: its own if it is known; None: it is not ignored."""
    if name.lower() in JUNK:
        return name.rstrip("\r")
    if name.startswith("__MACOSX"):
        return "__MACOSX"
    return HIDDEN if name.startswith(".") else None


def file_kind(name: str) -> str:
    """The name under which a file of another kind is counted: `*.ext`."""
    suffix = PurePosixPath(name).suffix.lower()
    if not suffix:
        return BARE
    return f"*{suffix}" if len(suffix) <= 12 and suffix[1:].isalnum() else ODD


class ArchiveJunk:
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


def of_other_kinds(ignored: Mapping[str, int]) -> dict[str, int]:
    """Extension -> number of the files of other kinds among what is ignored."""
    return {reason.removeprefix("*"): count for reason, count in ignored.items() if reason.startswith("*")}


def describe_ignored(ignored: Mapping[str, int]) -> str:
    """What is not read, as one sentence; empty when everything is."""
    files = of_other_kinds(ignored)
    others = [f"{printable(reason)} ({count:,})" for reason, count in ignored.items() if not reason.startswith("*")]
    total = sum(files.values())
    said = [f"{plural(total, 'file')} {are(total)} not read: {_kinds(files)}"] if files else []
    return "; ".join(said + ([f"ignored: {', '.join(others)}"] if others else []))


def describe_unread(ignored: Mapping[str, int], suffixes: Collection[str] = UNREAD_PICTURES) -> str:
    """The files of other formats (those of `suffixes`: of pictures) among what is not read; empty when there are none."""
    files = of_other_kinds(ignored)
    return _kinds({suffix: count for suffix, count in files.items() if suffix in suffixes})


def _kinds(files: Mapping[str, int]) -> str:
    """3 .heic, 2 .jxl, 1 .txt: the most frequent first."""
    order = sorted(files, key=lambda kind: (-files[kind], kind))
    named = [f"{files[kind]:,} {'without extension' if kind == '' else kind}" for kind in order[:MOST]]
    rest = sum(files[kind] for kind in order[MOST:])
    return ", ".join(named + ([f"{rest:,} of {len(order) - MOST} other kinds"] if rest else []))


def check_source_file(path: Path) -> None:
    """Raise ValueError unless a file may be a zip, with what it is by its extension and first bytes."""
    suffix = path.suffix.lower()
    with open(path, "rb") as file:
        head = file.read(4)
    if suffix in PICTURES | SOUNDS | VIDEOS | UNREAD_PICTURES | UNREAD_SOUNDS | UNREAD_VIDEOS:
        why = "a single file; give the folder that holds it"
    elif {".tar", ".tgz"} & {each.lower() for each in path.suffixes}:
        why = "a compressed tar; decompress it, and give the tar"
    elif suffix in TABLES:
        why = "no source; give the folder or zip of the pictures, and a file that describes them by --labels or --captions"
    elif suffix in ARRAYS:
        why = f"a file of arrays; {SAVE_ARRAYS}"
    elif not head:
        why = "empty; download or make it again"
    # a zip that extracts itself has a prefix
    elif head.startswith(b"PK") or suffix == ".zip" or zipfile.is_zipfile(path):
        return
    elif suffix in ARCHIVES:
        why = f"an archive of a kind that is not read ({suffix}); unpack it, and give the folder"
    else:
        why = f"a file of another kind; store the pictures as files in {FORMS}"
    raise ValueError(f"{printable(path)} is {why}")


def remedy_for_ignored(ignored: Mapping[str, int]) -> str:
    """What to do where a source has only files that are not read, by their kinds; empty where that is unclear."""
    kinds = of_other_kinds(ignored).keys()
    remedies = (
        (ARCHIVES, "unpack the archives, or give one zip as the source"),
        ({".parquet"}, "give the folder that the parquet files are in"),
        ({".arrow"}, "store the table as parquet"),
        (UNREAD_SOUNDS, "convert the sounds to wav or flac"),
        (UNREAD_VIDEOS, "convert the videos, for example to mp4"),
        (UNREAD_PICTURES, "convert the pictures, for example to png"),
        (ARRAYS, SAVE_ARRAYS),
    )
    return next((remedy for known, remedy in remedies if kinds & known), "")
