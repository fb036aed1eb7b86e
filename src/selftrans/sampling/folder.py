"""Samples ⇒ a folder: `000000.png …`, `samples.npz` (ADM's names) and `samples.json` with every setting.

Samples that are not pictures are `000000.npy …`, with a WAV or GIF of each sound or video. Progress is stored as the sample
files only: a repeated command makes the missing ones, and the npz is written from the files, so that memory is bounded by a
few batches. Every file is written under a temporary name and renamed.
Shape legend: n samples, (H, W, C) picture with C of 1 (grey), 3 or 4, (C, *S) array.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from selftrans.checkpoints.load import Weights
from selftrans.data.buckets import is_prepared
from selftrans.data.resolution import parse_resolution
from selftrans.messages import plural, printable
from selftrans.sampling.chosen_labels import in_words, per_class
from selftrans.sampling.images import Sampler
from selftrans.sampling.sample_file import NPY, PNG, SampleFile, file_kind
from selftrans.storage import FREE_SPACE, atomic_write, recorded

Samples = Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]  #: indices (n,), labels (n,), samples; as `SampledBatch`

PER_CLASS = "per_class"  #: entry of samples.json: name of a class -> how many samples it has
BACKLOG = 4  #: maximum number of batches that wait to be written
CHUNK = 64  #: samples that are read ahead of the npz


def sample_to_folder(
    origin: str | Path,
    out: str | Path,
    settings: dict[str, Any],
    *,
    weights: Weights = "ema",
    stage: str | None = None,
    text_encoder: str | None = None,
    size: str | None = None,
) -> int:
    """Sample from a run, checkpoint or weights file into the folder `out`; returns how many samples this call made.

    `settings` override fields of the run's own `SampleConfig`. Several processes share the work (RANK, WORLD_SIZE,
    LOCAL_RANK as accelerate sets them). `text_encoder`: where the encoder of the prompts lies, if not where it was. `size`:
    HEIGHTxWIDTH of the pictures, if not the model's own.
    ValueError for invalid settings and for a folder with other samples.
    """
    sampler = Sampler.load(origin, settings, weights=weights, stage=stage, text_encoder=text_encoder)
    if size is not None:
        sampler.resize(parse_resolution(size))
    if is_prepared(out):
        raise ValueError(f"{out} holds prepared data; choose another folder for samples")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind, num = file_kind(sampler.autoencoder), sampler.settings.num
    classes = sampler.classes if sampler.model.conditions.kind == "labels" else None
    options: dict[str, Any] = {"kind": kind, "rank": rank, "world": world, "classes": classes}
    return write_samples(sampler.sample, Path(out), sampler.described, num, **options)


def summary_line(out: str | Path, count: int) -> str:
    """The message of `selftrans sample` after it has written `count` samples to the folder `out`, which may hold others."""
    kind = NPY if any(Path(out).glob(f"[0-9]*{NPY.suffix}")) else PNG
    views = "".join(f"{suffix}, " for suffix in (".wav", ".gif") if any(Path(out).glob(f"[0-9]*{suffix}")))
    held = max(count, sum(1 for _ in Path(out).glob(f"[0-9]*{kind.suffix}")))
    new = f", {count} of them new" if held > count else ""
    return f"{plural(held, 'sample')}{new} -> {out} ({views}{kind.suffix} files, samples.npz, samples.json)"


def class_line(out: str | Path) -> str:
    """How many samples of each class the complete folder `out` holds, to print; empty where that is not recorded."""
    counts_in = lambda record: {str(name): int(count) for name, count in record[PER_CLASS].items()}  # noqa: E731
    counts = recorded(Path(out, "samples.json"), counts_in, None)
    return "" if counts is None else f"samples of each class: {in_words(counts)}"


def write_samples(
    sample: Callable[[np.ndarray], Samples],
    out: Path,
    settings: dict[str, Any],
    num: int,
    *,
    kind: SampleFile = PNG,
    rank: int = 0,
    world: int = 1,
    classes: Sequence[str] | None = None,
    progress: bool = True,
) -> int:
    """Write samples 0 .. num - 1 to `out` and return how many this call made; 0 when all existed.

    Args:
        sample: called once, with the sorted indices of the missing samples; yields them in batches.
        settings: everything that the samples depend on, as json types; without `num`, which may grow from call to call.
        kind: the file format of a sample.
        classes: names of the labels, of which samples.json then counts the samples; None: the labels are no classes.
        rank, world: this process makes indices k with k % world == rank; the process that finds no sample missing
            writes the npz.
    Raises ValueError when the folder holds samples of other or unknown settings, when `num` is below the number with
    which the folder was begun, or when a file cannot be written (files written before are complete).
    """
    complete = _begin(out, settings, num, rank, kind)
    todo = _missing(out, num, kind)
    mine = todo[todo % world == rank]
    if complete and not len(todo) and _npz_count(out / "samples.npz") == num:
        if rank == 0:
            print(f"{out} already holds {'this sample' if num == 1 else f'these {num:,} samples'}; nothing to do")
        return 0
    if len(mine):
        _write_files(sample(mine), out, len(mine), num, rank, progress, kind)
    if not len(_missing(out, num, kind)):  # every process has written its samples
        shape, labels = _write_npz(out, num, rank, progress, kind)
        counts = {} if classes is None else {PER_CLASS: per_class(labels, classes)}
        _write_json(out, {"num": num, "complete": True, "shape": shape} | counts | {"settings": settings}, rank)
    return len(mine)


def _begin(out: Path, settings: dict[str, Any], num: int, rank: int, kind: SampleFile = PNG) -> bool:
    """Compare `out` with the settings, and write samples.json; True when samples.json marks the folder as complete."""
    record = out / "samples.json"
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a folder; choose another --out")
    if record.exists():
        earlier = _read_json(record)
        differing = _differences(earlier["settings"], settings)
        if differing:
            raise ValueError(f"{out} holds samples of other settings ({'; '.join(differing)}); choose another folder")
        if num < earlier["num"]:
            raise ValueError(
                f"{out} was begun for {plural(earlier['num'], 'sample')}; request at least as many, or choose another folder"
            )
        if num == earlier["num"]:
            return earlier["complete"]
    elif out.is_dir() and any(out.glob(f"[0-9]*{kind.suffix}")):
        raise ValueError(f"{out} holds {kind.suffix} files but no samples.json; choose an empty folder")
    _write_json(out, {"num": num, "complete": False, "settings": settings}, rank)
    return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        record = {key: kind(content[key]) for key, kind in (("num", int), ("complete", bool), ("settings", dict))}
        _flat(record["settings"])  # raises RecursionError when it is nested too deeply
        return record
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); choose another folder, or delete this one") from error


def _write_json(out: Path, content: dict[str, Any], rank: int) -> None:
    with _write(out / "samples.json", rank) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {prefix: settings}
    return {k: v for key, value in settings.items() for k, v in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}


def _differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`name: OLD there, NEW now` for each setting that differs; not for the place of weights, which their hashes identify."""
    old, new = _flat(earlier), _flat(json.loads(json.dumps(now)))  # through json, so that a tuple equals its list
    names = [name for name in {**old, **new} if old.get(name) != new.get(name) or (name in old) != (name in new)]
    names = [name for name in names if not re.fullmatch(r"(autoguidance\.)?source\.path", name)]
    shown = {name: printable(name, 60) for name in names}  # the folder may be untrusted
    return [f"{shown[k]}: {old.get(k, 'absent')!s:.60} there, {new.get(k, 'absent')!s:.60} now" for k in names[:5]]


def _missing(out: Path, num: int, kind: SampleFile) -> np.ndarray:
    """Sorted indices (m,) below `num` that have no complete file."""
    return np.array([k for k in range(num) if not kind.is_complete(_path(out, k, kind))], dtype=np.int64)


def _path(out: Path, index: int, kind: SampleFile) -> Path:
    return out / f"{index:06d}{kind.suffix}"


def _write(path: Path, rank: int) -> AbstractContextManager[BinaryIO]:
    """`atomic_write` without fsync, which is slow for 50,000 files: `SampleFile.is_complete` detects incomplete ones."""
    return atomic_write(path, writer=rank, durable=False, remedy=f"{FREE_SPACE}; the same command then continues")


def _write_files(
    batches: Samples, out: Path, count: int, num: int, rank: int, progress: bool, kind: SampleFile
) -> None:
    """Write batches in another thread, while the next ones are sampled."""
    from tqdm import tqdm

    pending: deque[Future[int]] = deque()
    interval = 0.2 if sys.stderr.isatty() else 15  # seconds; a log file needs no line per batch
    hidden = not progress or rank > 0
    bar = tqdm(total=count, desc=f"samples of {num}", unit="img", mininterval=interval, disable=hidden)
    with ThreadPoolExecutor(max_workers=1) as pool, bar:
        for indices, labels, images in batches:
            pending.append(pool.submit(_write_batch, out, indices, labels, images, rank, kind))
            while pending and (len(pending) > BACKLOG or pending[0].done()):
                bar.update(pending.popleft().result())
        while pending:
            bar.update(pending.popleft().result())


def _write_batch(
    out: Path, indices: np.ndarray, labels: np.ndarray, images: np.ndarray, rank: int, kind: SampleFile
) -> int:
    kind.check(images)
    for index, label, image in zip(indices, labels, images, strict=True):
        path = _path(out, int(index), kind)
        if kind.view is not None:  # first: a sample whose own file is complete has both
            with _write(path.with_suffix(kind.view_suffix), rank) as file:
                kind.view(file, image)
        with _write(path, rank) as file:
            kind.write(file, image, int(label))
    return len(indices)


def _npz_count(path: Path) -> int:
    """Number of samples in an npz, from its header; -1 if it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            npy.read_magic(file)
            return int(npy.read_array_header_1_0(file)[0][0])
    except Exception:  # a damaged zip raises many types
        return -1


def _write_npz(out: Path, num: int, rank: int, progress: bool, kind: SampleFile) -> tuple[list[int], np.ndarray]:
    """Sample files ⇒ samples.npz with arr_0 (num, *shape) and labels arr_1 (num,), streamed; returns that shape and arr_1."""
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
                        f"{_path(out, k, kind)} is {image.shape}, the first is {tuple(shape[1:])}; delete it and repeat"
                    )
                file.write(image.tobytes())
                labels[k] = label
        with archive.open("arr_1.npy", "w") as file:
            npy.write_array(file, labels, allow_pickle=False)
    return shape, labels


def _read_all(paths: list[Path], kind: SampleFile) -> Iterator[tuple[np.ndarray, int]]:
    """Decode in order with four threads, a chunk at a time: `map` over all paths would read all files ahead."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        for start in range(0, len(paths), CHUNK):
            yield from pool.map(kind.read, paths[start : start + CHUNK])
