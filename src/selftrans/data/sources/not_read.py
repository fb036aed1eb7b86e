"""Files and folders that are no source of samples: what they are, and what to do with them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

from selftrans.data.sources.decode import EXTENSIONS, SOUNDS, VIDEOS
from selftrans.data.sources.passed_over import UNREAD, UNREAD_SOUNDS, UNREAD_VIDEOS
from selftrans.storage import printable

ARCHIVES = frozenset((".7z", ".bz2", ".gz", ".lz4", ".rar", ".tgz", ".xz", ".zip", ".zst"))
ARRAYS = frozenset((".npy", ".npz"))
TABLES = frozenset((".csv", ".json", ".jsonl", ".tsv", ".txt", ".xls", ".xlsx", ".xml"))
FORMS = "a folder, a zip, a tar or a parquet file (docs/data.md)"
SAVE_ARRAYS = "pictures are read from their files, floats (N, C, ...) from an npz with `data` by --autoencoder values"


def check_file(path: Path) -> None:
    """Raise ValueError for a file that is no source, by its extension and first bytes; none for what may be a zip."""
    suffix = path.suffix.lower()
    with open(path, "rb") as file:
        head = file.read(4)
    if suffix in EXTENSIONS | SOUNDS | VIDEOS | UNREAD | UNREAD_SOUNDS | UNREAD_VIDEOS:
        why = "a single file; give the folder that holds it"
    elif suffix in TABLES:
        why = "no source; give the folder or zip of the pictures, and a file that describes them by --labels or --captions"
    elif suffix in ARRAYS:
        why = f"a file of arrays; {SAVE_ARRAYS}"
    elif not head:
        why = "empty; download or make it again"
    elif (
        head.startswith(b"PK") or suffix == ".zip" or zipfile.is_zipfile(path)
    ):  # one that extracts itself has a prefix
        return
    elif suffix in ARCHIVES:
        why = f"an archive of a kind that is not read ({suffix}); unpack it, and give the folder"
    else:
        why = f"a file of another kind; store the pictures as files in {FORMS}"
    raise ValueError(f"{printable(path)} is {why}")


def remedy_for(ignored: Mapping[str, int]) -> str:
    """What to do about files of a source without samples that were passed over, by their kinds; empty where that is unclear."""
    kinds = {reason.removeprefix("*") for reason in ignored if reason.startswith("*")}
    remedies = (
        (ARCHIVES, "unpack the archives, or give one zip as the source"),
        ({".parquet"}, "give the folder that the parquet files are in"),
        ({".arrow"}, "store the table as parquet"),
        (UNREAD_SOUNDS, "convert the sounds to wav or flac"),
        (UNREAD_VIDEOS, "convert the videos, for example to mp4"),
        (UNREAD, "convert the pictures, for example to png"),
        (ARRAYS, SAVE_ARRAYS),
    )
    return next((remedy for known, remedy in remedies if kinds & known), "")
