"""Images ⇒ a folder of samples: `000000.png …`, `samples.npz` (ADM style) and `samples.json` with every setting.

The PNGs are the state: a repeated command samples those that are missing, and the npz is put together from them, so
that memory is bounded by a few batches. Each PNG carries its label. Every file is written beside and renamed.
Shape legend: n images, (R, R, C) image with C of 1 (grey), 3 or 4.
"""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from selftrans.storage import MAKE_ROOM, atomic_write, first_line, printable

Samples = Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]  #: indices (n,), labels (n,), images uint8 (n, R, R, C)

BACKLOG = 4  #: batches that may wait for the disk before sampling waits too
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"


def write_samples(
    sample: Callable[[np.ndarray], Samples],
    out: Path,
    settings: dict[str, Any],
    num: int,
    *,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
) -> int:
    """Fill `out` with images 0 .. num - 1 and return how many this call sampled; 0 when all were there.

    Args:
        sample: called once, with the sorted indices of the images still missing; yields them in batches.
        settings: all that the images depend on (json-able); not their number, which may grow from call to call.
        rank, world: this process takes indices k with k % world == rank; whichever finds the folder full ends it.
    Raises ValueError when the folder holds images of other settings or of none, when fewer are asked for than an
    unfinished folder was begun with, or when a file cannot be written (what was written until then is whole).
    """
    complete = _begin(out, settings, num, rank)
    todo = _missing(out, num)
    mine = todo[todo % world == rank]
    if complete and not len(todo) and _npz_count(out / "samples.npz") == num:
        if rank == 0:
            print(f"{out} already holds these {num} images; nothing to do")
        return 0
    if len(mine):
        _write_images(sample(mine), out, len(mine), num, rank, progress)
    _finish(out, settings, num, rank, progress)
    return len(mine)


def _begin(out: Path, settings: dict[str, Any], num: int, rank: int) -> bool:
    """Compare `out` with what is asked, and leave a samples.json that says so; true when it says it is complete."""
    record = out / "samples.json"
    if record.exists():
        there = _read_json(record)
        differing = _differences(there["settings"], settings)
        if differing:
            raise ValueError(f"{out} holds samples of other settings ({'; '.join(differing)}); choose another folder")
        if num < there["num"]:
            raise ValueError(
                f"{out} was begun for {there['num']} images; ask for at least as many, or choose another folder"
            )
        if num == there["num"]:
            return there["complete"]
    elif out.is_dir() and any(out.glob("[0-9]*.png")):
        raise ValueError(f"{out} holds pictures but no samples.json; choose an empty folder")
    _write_json(out, {"num": num, "complete": False, "settings": settings}, rank)
    return False


def _finish(out: Path, settings: dict[str, Any], num: int, rank: int, progress: bool) -> None:
    """Put the npz together, if by now every process has written its images."""
    if len(_missing(out, num)):
        return
    shape = _write_npz(out, num, rank, progress)
    _write_json(out, {"num": num, "complete": True, "shape": shape, "settings": settings}, rank)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        found = {key: kind(content[key]) for key, kind in (("num", int), ("complete", bool), ("settings", dict))}
        _flat(found["settings"])  # what is nested beyond reason is found here
        return found
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); choose another folder, or delete this one") from error


def _write_json(out: Path, content: dict[str, Any], rank: int) -> None:
    with _write(out / "samples.json", rank) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {prefix: settings}
    return {k: v for key, value in settings.items() for k, v in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}


def _differences(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`name: old there, new now` for each setting that differs."""
    old, new = _flat(there), _flat(json.loads(json.dumps(now)))  # through json, so that a tuple equals its list
    names = [name for name in {**old, **new} if old.get(name) != new.get(name) or (name in old) != (name in new)]
    shown = {name: printable(name, 60) for name in names}  # the file may be untrusted
    return [f"{shown[k]}: {old.get(k, 'absent')!s:.60} there, {new.get(k, 'absent')!s:.60} now" for k in names[:5]]


def _png(out: Path, index: int) -> Path:
    return out / f"{index:06d}.png"


def _whole(path: Path) -> bool:
    """A PNG from its signature to its end mark: a rename can outlive the bytes when a machine goes down."""
    try:
        with path.open("rb") as file:
            start = file.read(len(PNG_START))
            file.seek(-len(PNG_END), os.SEEK_END)
            return start == PNG_START and file.read() == PNG_END
    except OSError:
        return False


def _missing(out: Path, num: int) -> np.ndarray:
    """(m,) sorted indices below `num` without a whole PNG."""
    return np.array([k for k in range(num) if not _whole(_png(out, k))], dtype=np.int64)


def _write(path: Path, rank: int) -> AbstractContextManager[BinaryIO]:
    """`atomic_write` without waiting for the disk, which 50,000 images would wait for long: `_whole` checks them instead."""
    return atomic_write(path, writer=rank, durable=False, remedy=f"{MAKE_ROOM}; the same command then continues")


def _write_images(batches: Samples, out: Path, count: int, num: int, rank: int, progress: bool) -> None:
    """Write batches from a thread of its own, while the next ones are sampled."""
    from tqdm import tqdm

    pending: deque[Future[int]] = deque()
    every = 0.2 if sys.stderr.isatty() else 15  # seconds; a log file needs no line per batch
    hidden = not progress or rank > 0
    bar = tqdm(total=count, desc=f"samples of {num}", unit="img", mininterval=every, disable=hidden)
    with ThreadPoolExecutor(max_workers=1) as pool, bar:
        for indices, labels, images in batches:
            pending.append(pool.submit(_write_batch, out, indices, labels, images, rank))
            while pending and (len(pending) > BACKLOG or pending[0].done()):
                bar.update(pending.popleft().result())
        while pending:
            bar.update(pending.popleft().result())


def _write_batch(out: Path, indices: np.ndarray, labels: np.ndarray, images: np.ndarray, rank: int) -> int:
    from PIL import Image, PngImagePlugin

    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"images of {images.dtype} {images.shape} are no PNGs; give uint8 (n, R, R, C) with C of 1, 3 or 4"
        )
    for index, label, image in zip(indices, labels, images, strict=True):
        text = PngImagePlugin.PngInfo()
        text.add_text("label", str(int(label)))
        with _write(_png(out, int(index)), rank) as file:
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            picture.save(file, format="PNG", compress_level=1, pnginfo=text)  # level 6 costs thrice the time for 3 %
    return len(indices)


def read_png(path: Path) -> tuple[np.ndarray, int]:
    """One sample: uint8 (R, R, C) and its label (-1 when the PNG carries none). ValueError for anything but a sample."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            pixels = np.asarray(picture)
            label = int(picture.info.get("label", -1))
            if picture.mode not in ("L", "RGB", "RGBA") or not -1 <= label < 1 << 31:
                raise ValueError(f"mode {picture.mode}, label {label!s:.20}")
    except Exception as error:  # of PIL, on damage: as many kinds as there are ways to be torn
        reason = first_line(str(error).replace(str(path), "it") or type(error).__name__, 100)
        raise ValueError(f"{path} is no sample ({reason}); delete it and repeat the command") from error
    return (pixels[..., None] if pixels.ndim == 2 else pixels), label


def _npz_count(path: Path) -> int:
    """Images in an npz, from its header alone; -1 when there is none."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            npy.read_magic(file)
            return int(npy.read_array_header_1_0(file)[0][0])
    except Exception:  # a torn zip raises anything
        return -1


def _write_npz(out: Path, num: int, rank: int, progress: bool) -> list[int]:
    """PNGs ⇒ samples.npz with arr_0 (num, R, R, C) uint8 and arr_1 (num,) labels, streamed; returns arr_0's shape."""
    from tqdm import tqdm

    shape = [num, *read_png(_png(out, 0))[0].shape]
    labels = np.empty(num, dtype=np.int64)
    header = {"descr": npy.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": tuple(shape)}
    with _write(out / "samples.npz", rank) as target, zipfile.ZipFile(target, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            npy.write_array_header_1_0(file, header)
            images = _read_all([_png(out, k) for k in range(num)])
            bar = tqdm(images, "samples.npz", num, leave=False, disable=None if progress else True)
            for k, (image, label) in enumerate(bar):
                if list(image.shape) != shape[1:]:
                    raise ValueError(
                        f"{_png(out, k)} is {image.shape}, not {tuple(shape[1:])} as the first; delete it and repeat"
                    )
                file.write(image.tobytes())
                labels[k] = label
        with archive.open("arr_1.npy", "w") as file:
            npy.write_array(file, labels, allow_pickle=False)
    return shape


def _read_all(paths: list[Path], chunk: int = 64) -> Iterator[tuple[np.ndarray, int]]:
    """Decode in order with four threads, a chunk at a time: an executor's map would read all of them ahead."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        for start in range(0, len(paths), chunk):
            yield from pool.map(read_png, paths[start : start + chunk])
