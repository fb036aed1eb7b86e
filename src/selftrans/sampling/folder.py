"""Images ⇒ a folder of samples: `000000.png …`, `samples.npz` (ADM's names) and `samples.json` with every setting.

Samples that are no pictures are `000000.npy …`. The files of the samples are the state: a repeated command samples the
missing ones, and the npz is made from them, so that memory is bounded by a few batches. Every file is written under
another name and renamed. Shape legend: n images, (H, W, C) picture with C of 1 (grey), 3 or 4, (C, *S) array.
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

from selftrans.checkpoints.load import Weights
from selftrans.sampling.images import Sampler
from selftrans.sampling.sample_file import NPY, PNG, SampleFile
from selftrans.storage import MAKE_ROOM, atomic_write, printable

Samples = Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]  #: indices (n,), labels (n,), images; as `SampledBatch`

BACKLOG = 4  #: batches that may wait for the disk before sampling waits too


def sample_to_folder(
    origin: str | Path, out: str | Path, settings: dict[str, Any], *, weights: Weights = "ema", stage: str | None = None
) -> int:
    """Sample from a run, checkpoint or weights file into the folder `out`; returns how many images this call made.

    `settings` override fields of the run's own `SampleConfig`. Several processes share the work (RANK, WORLD_SIZE,
    LOCAL_RANK as accelerate sets them). ValueError for settings that cannot work and for a folder with other samples.
    """
    sampler = Sampler.load(origin, settings, weights=weights, stage=stage)
    if (Path(out) / "manifest.json").exists():
        raise ValueError(f"{out} holds prepared data; choose another folder for samples")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind, num = PNG if sampler.autoencoder.pictures else NPY, sampler.settings.num
    return write_samples(sampler.sample, Path(out), sampler.described, num, kind=kind, rank=rank, world=world)


def write_samples(
    sample: Callable[[np.ndarray], Samples],
    out: Path,
    settings: dict[str, Any],
    num: int,
    *,
    kind: SampleFile = PNG,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
) -> int:
    """Write images 0 .. num - 1 to `out` and return how many this call sampled; 0 when all were there.

    Args:
        sample: called once, with the sorted indices of the images still missing; yields them in batches.
        settings: all that the images depend on (json-able); not their number, which may grow from call to call.
        kind: how one sample is stored.
        rank, world: this process takes indices k with k % world == rank; the one that finds no image missing
            writes the npz.
    Raises ValueError when the folder holds images of other or unknown settings, when fewer are asked for than the
    folder was begun with, or when a file cannot be written (those written before are complete).
    """
    complete = _begin(out, settings, num, rank, kind)
    todo = _missing(out, num, kind)
    mine = todo[todo % world == rank]
    if complete and not len(todo) and _npz_count(out / "samples.npz") == num:
        if rank == 0:
            print(f"{out} already holds these {num} images; nothing to do")
        return 0
    if len(mine):
        _write_images(sample(mine), out, len(mine), num, rank, progress, kind)
    if not len(_missing(out, num, kind)):  # every process has written its images
        shape = _write_npz(out, num, rank, progress, kind)
        _write_json(out, {"num": num, "complete": True, "shape": shape, "settings": settings}, rank)
    return len(mine)


def _begin(out: Path, settings: dict[str, Any], num: int, rank: int, kind: SampleFile = PNG) -> bool:
    """Compare `out` with what is asked, and write samples.json; true when that says that the folder is complete."""
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
    elif out.is_dir() and any(out.glob(f"[0-9]*{kind.suffix}")):
        raise ValueError(f"{out} holds pictures but no samples.json; choose an empty folder")
    _write_json(out, {"num": num, "complete": False, "settings": settings}, rank)
    return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        found = {key: kind(content[key]) for key, kind in (("num", int), ("complete", bool), ("settings", dict))}
        _flat(found["settings"])  # RecursionError where it is nested too deep
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
    shown = {name: printable(name, 60) for name in names}  # the folder may be untrusted
    return [f"{shown[k]}: {old.get(k, 'absent')!s:.60} there, {new.get(k, 'absent')!s:.60} now" for k in names[:5]]


def _missing(out: Path, num: int, kind: SampleFile) -> np.ndarray:
    """(m,) sorted indices below `num` without a complete file."""
    return np.array([k for k in range(num) if not kind.is_complete(_path(out, k, kind))], dtype=np.int64)


def _path(out: Path, index: int, kind: SampleFile) -> Path:
    return out / f"{index:06d}{kind.suffix}"


def _write(path: Path, rank: int) -> AbstractContextManager[BinaryIO]:
    """`atomic_write` without waiting for the disk, which is slow for 50,000 files: `SampleFile.is_complete` checks them."""
    return atomic_write(path, writer=rank, durable=False, remedy=f"{MAKE_ROOM}; the same command then continues")


def _write_images(
    batches: Samples, out: Path, count: int, num: int, rank: int, progress: bool, kind: SampleFile
) -> None:
    """Write batches in another thread, while the next ones are sampled."""
    from tqdm import tqdm

    pending: deque[Future[int]] = deque()
    every = 0.2 if sys.stderr.isatty() else 15  # seconds; a log file needs no line per batch
    hidden = not progress or rank > 0
    bar = tqdm(total=count, desc=f"samples of {num}", unit="img", mininterval=every, disable=hidden)
    with ThreadPoolExecutor(max_workers=1) as pool, bar:
        for indices, labels, images in batches:
            pending.append(pool.submit(_write_batch, out, indices, labels, images, rank, kind))
            while pending and (len(pending) > BACKLOG or pending[0].done()):
                bar.update(pending.popleft().result())
        while pending:
            bar.update(pending.popleft().result())


def _write_batch(
    out: Path, indices: np.ndarray, labels: np.ndarray, images: np.ndarray, rank: int, kind: SampleFile = PNG
) -> int:
    kind.check(images)
    for index, label, image in zip(indices, labels, images, strict=True):
        with _write(_path(out, int(index), kind), rank) as file:
            kind.write(file, image, int(label))
    return len(indices)


def _npz_count(path: Path) -> int:
    """Images in an npz, from its header alone; -1 when there is none."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            npy.read_magic(file)
            return int(npy.read_array_header_1_0(file)[0][0])
    except Exception:  # a damaged zip raises almost anything
        return -1


def _write_npz(out: Path, num: int, rank: int, progress: bool, kind: SampleFile) -> list[int]:
    """Sample files ⇒ samples.npz with arr_0 (num, *shape) and arr_1 (num,) labels, streamed; returns arr_0's shape."""
    from tqdm import tqdm

    first, _ = kind.read(_path(out, 0, kind))
    shape, labels = [num, *first.shape], np.empty(num, dtype=np.int64)
    header = {"descr": npy.dtype_to_descr(first.dtype), "fortran_order": False, "shape": tuple(shape)}
    with _write(out / "samples.npz", rank) as target, zipfile.ZipFile(target, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            npy.write_array_header_1_0(file, header)
            images = _read_all([_path(out, k, kind) for k in range(num)], kind)
            bar = tqdm(images, "samples.npz", num, leave=False, disable=None if progress else True)
            for k, (image, label) in enumerate(bar):
                if list(image.shape) != shape[1:]:
                    raise ValueError(
                        f"{_path(out, k, kind)} is {image.shape}, not {tuple(shape[1:])} as the first; delete it and repeat"
                    )
                file.write(image.tobytes())
                labels[k] = label
        with archive.open("arr_1.npy", "w") as file:
            npy.write_array(file, labels, allow_pickle=False)
    return shape


def _read_all(paths: list[Path], kind: SampleFile, chunk: int = 64) -> Iterator[tuple[np.ndarray, int]]:
    """Decode in order with four threads, a chunk at a time: an executor's map would read all of them ahead."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        for start in range(0, len(paths), chunk):
            yield from pool.map(kind.read, paths[start : start + chunk])
