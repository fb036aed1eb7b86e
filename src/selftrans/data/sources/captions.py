"""Pictures with captions: caption files next to the pictures, or the annotations of COCO.

A sample that lacks its picture or its captions stays in the source, with the reason in `Source.faults`: it is refused, or
skipped and listed, as an unreadable picture is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from selftrans.data.sources import folder
from selftrans.data.sources.decode import open_picture
from selftrans.data.sources.file_kinds import PICTURES
from selftrans.data.sources.source import Source
from selftrans.storage import decoded_text, first_line, printable

if TYPE_CHECKING:
    from PIL import Image

#: files with the captions of the picture of the same name, the first that exists is read
CAPTION_FILES = (".txt", ".caption", ".json")
KEYS = ("caption", "captions", "text")  #: of a .json file
MAX_FILE_BYTES = 1 << 20  #: of one caption file
MAX_ANNOTATION_BYTES = 1 << 30  #: of an annotation file
EMPTY = "empty captions, left out"  #: in `Source.ignored`
JOINERS = "\u200c\u200d"  #: invisible, but parts of words in some scripts, and of emoji
NO_PICTURE, NO_CAPTION = "a caption without its picture", "a picture without a caption"


@dataclass(frozen=True)
class CaptionSource:
    """Where the captions of a source are, if they are not in files next to the pictures."""

    file: str | Path | None = None  #: annotations as COCO has them
    column: str | None = None  #: of a table; None: found by its name


def clean(text: str) -> str:
    """A caption on one line that can be encoded in UTF-8, without control characters and double spaces."""
    encodable = text.encode("utf-8", "replace").decode("utf-8")
    return " ".join("".join(c if c.isprintable() or c in JOINERS else " " for c in encodable).split())


def parse_captions(suffix: str, data: bytes) -> list[str]:
    """The captions in a file of CAPTION_FILES: one on each line, or in json under one of KEYS a text or a list of texts.

    Raises ValueError, with a short reason, for anything else.
    """
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"its captions take more than {MAX_FILE_BYTES} bytes")
    try:
        text = decoded_text(data)
        if suffix != ".json":
            return [line for line in text.splitlines() if line.strip()] or [""]
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its captions cannot be read ({first_line(error)})") from error
    found = [parsed[key] for key in KEYS if key in parsed] if isinstance(parsed, dict) else []
    captions = found[0] if found and isinstance(found[0], list) else found[:1]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"its .json has no text under {', '.join(KEYS)}")
    return captions


def with_captions(source: Source, captions: Iterable[Iterable[str] | str]) -> Source:
    """The source with these captions, one entry a sample: captions, or the reason why there are none.

    Captions are cleaned; empty ones are left out and counted in `ignored`. Labels are dropped: text is the condition.
    """
    kept, faults, empty = list[tuple[str, ...]](), dict[int, str](), 0
    for i, entry in enumerate(captions):
        given = [] if isinstance(entry, str) else [clean(caption) for caption in entry]
        kept.append(tuple(filter(None, given)))
        empty += len(given) - len(kept[-1])
        if not kept[-1]:
            faults[i] = entry if isinstance(entry, str) else "its captions are empty" if given else NO_CAPTION
    assert len(kept) == len(source), "one entry a sample"
    ignored = source.ignored | ({EMPTY: empty} if empty else {})
    labels = np.zeros(len(source), dtype=np.int64)
    return replace(source, labels=labels, classes=(), captions=kept, faults=faults, ignored=ignored)


def combine(pictures: dict[str, Any], files: dict[str, Any], read: Callable[[Any], bytes]) -> Iterator[tuple[str, Any]]:
    """(name, captions or fault) of each picture and of each caption file without one, by name in code point order.

    `files` are caption files; `read` returns the content of one.
    """
    stems = {name.removesuffix(PurePosixPath(name).suffix) for name in pictures}
    texts: dict[str, dict[str, str]] = {}  #: stem -> extension in lower case -> name
    for name in sorted(files):  # of .TXT and .txt the latter
        suffix = PurePosixPath(name).suffix
        texts.setdefault(name.removesuffix(suffix), {})[suffix.lower()] = name
    orphans = {name for name in files if name.removesuffix(PurePosixPath(name).suffix) not in stems}
    for name in sorted({*pictures, *orphans}):
        if name in orphans:
            yield name, NO_PICTURE
            continue
        stem = name.removesuffix(PurePosixPath(name).suffix)
        found = texts.get(stem, {})
        own = next((found[suffix] for suffix in CAPTION_FILES if suffix in found), None)
        if own is None:
            yield name, NO_CAPTION
            continue
        try:
            yield name, parse_captions(PurePosixPath(own).suffix.lower(), read(files[own]))
        except (OSError, ValueError) as error:
            yield name, first_line(error)


def captioned_folder(root: Path) -> Source:
    """Pictures at any depth of a folder, each with a caption file of the same name in the same folder.

    Raises ValueError for a link that leads out of the folder.
    """
    ignored: Counter[str] = Counter()
    found = dict(folder.walk(root, PICTURES | {*CAPTION_FILES}, ignored))
    files = {name: name for name in found if PurePosixPath(name).suffix.lower() in CAPTION_FILES}
    pictures = {name: size for name, size in found.items() if name not in files}

    def read(name: str) -> bytes:
        with open(root / name, "rb") as file:
            return file.read(MAX_FILE_BYTES + 1)

    pairs = list(combine(pictures, files, read))
    names = [name for name, _ in pairs]
    sizes = [found[name] for name in names]
    none = np.zeros(len(names), dtype=np.int64)
    source = Source(names, none, (), lambda i: open_picture(root / names[i]), sizes, dict(ignored))
    return with_captions(source, (captions for _, captions in pairs))


def loose_folder(root: Path) -> Source:
    """Every picture at any depth of a folder, without labels."""
    ignored: Counter[str] = Counter()
    pictures = sorted(folder.walk(root, PICTURES, ignored))
    names = [name for name, _ in pictures]
    none = np.zeros(len(names), dtype=np.int64)
    return Source(names, none, (), lambda i: open_picture(root / names[i]), [s for _, s in pictures], dict(ignored))


def annotated(pictures: Source, file: Path) -> Source:
    """The pictures with the captions of a COCO annotation file; its `file_name` is a path in the source, or the last part
    of one.

    Raises ValueError when the file is not of this kind, or names a picture outside the source.
    """
    images, captions = _annotations(file)
    by_last: dict[str, list[str]] = {}
    for name in pictures.names:
        by_last.setdefault(PurePosixPath(name).name, []).append(name)
    known = set(pictures.names)
    entries: dict[str, Any] = dict.fromkeys(pictures.names, f"{NO_CAPTION} in {file.name}")
    for key, name in images.items():
        _check_inside(name, file)
        last = by_last.get(PurePosixPath(name).name, [])
        path = name if name in known or len(last) != 1 else last[0]
        of_image = captions.pop(key, [])
        if path in known:
            entries[path] = (entries[path] if isinstance(entries[path], list) else []) + of_image
        else:
            entries[path] = NO_PICTURE
    entries |= dict.fromkeys((f"image_id {printable(key)} in {file.name}" for key in captions), NO_PICTURE)
    at = {name: i for i, name in enumerate(pictures.names)}
    names = sorted(entries)
    sizes = [pictures.sizes[at[name]] if name in at and len(pictures.sizes) else 0 for name in names]

    def opened(i: int) -> Image.Image:
        if names[i] not in at:
            raise ValueError(NO_PICTURE)
        return pictures.open(at[names[i]])

    none = np.zeros(len(names), dtype=np.int64)
    source = replace(pictures, names=names, labels=none, open=opened, sizes=sizes)
    return with_captions(source, (entries[name] or NO_CAPTION for name in names))


def _annotations(file: Path) -> tuple[dict[Any, str], dict[Any, list[str]]]:
    """The file names and the captions by image id. Raises ValueError unless the file is as COCO's captions are."""
    images: dict[Any, str] = {}
    captions: dict[Any, list[str]] = {}
    try:
        if file.stat().st_size > MAX_ANNOTATION_BYTES:
            raise ValueError(f"larger than {MAX_ANNOTATION_BYTES} bytes")
        data = json.loads(file.read_bytes())
        for image in data["images"]:
            if not isinstance(image["file_name"], str) or image["id"] in images:
                raise ValueError(f"image {printable(image['id'])} is there twice, or its file_name is not text")
            images[image["id"]] = image["file_name"]
        for annotation in data["annotations"]:
            if not isinstance(annotation["caption"], str):
                raise ValueError(f"the caption of image {printable(annotation['image_id'])} is not text")
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(
            f"{file} does not hold captions as COCO's annotations do ({reason}): images with id and file_name, annotations "
            "with image_id and caption"
        ) from error
    return images, captions


def _check_inside(name: str, file: Path) -> None:
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or not parts[0] or ":" in parts[0]:
        raise ValueError(
            f"{file} holds the name {name!r:.200}, which leads out of the pictures; do not trust this file"
        )
