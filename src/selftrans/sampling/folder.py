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
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from selftrans.checkpoints.load import Weights
from selftrans.data.buckets import is_prepared
from selftrans.data.resolution import parse_resolution
from selftrans.device import world_size
from selftrans.messages import escaped, plural, printable
from selftrans.plain_json import recorded
from selftrans.progress import progress_bar
from selftrans.sampling.chosen_labels import in_words, per_class
from selftrans.sampling.images import Sampler
from selftrans.sampling.sample_file import NPY, PNG, SampleFile, file_kind
from selftrans.storage import FREE_SPACE, atomic_write, remove_stale_temporaries

Samples = Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]  #: indices (n,), labels (n,), samples; as `SampledBatch`

RECORD = "samples.json"
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
    rank, world = int(os.environ.get("RANK", 0)), world_size()
    kind, num = file_kind(sampler.autoencoder), sampler.settings.num
    classes = sampler.classes if sampler.model.conditions.kind == "labels" else None
    options: dict[str, Any] = {"kind": kind, "rank": rank, "world": world, "classes": classes}
    return write_samples(sampler.sample, Path(out), sampler.described, num, **options)


def summary_line(out: str | Path, count: int) -> str:
    """The message of `selftrans sample` after it has written `count` samples to the folder `out`, which may hold others.

    Other processes may still write theirs.
    """
    kind = NPY if any(Path(out).glob(f"[0-9]*{NPY.suffix}")) else PNG
    views = "".join(f"{suffix}, " for suffix in (".wav", ".gif") if any(Path(out).glob(f"[0-9]*{suffix}")))
    held = max(count, sum(1 for _ in Path(out).glob(f"[0-9]*{kind.suffix}")))
    new = f", {count} of them new" if held > count else ""
    held_in = f"{plural(held, 'sample')}{new} -> {escaped(out)} ({views}{kind.suffix} files"
    if recorded(Path(out, RECORD), lambda record: bool(record["complete"]), False):
        return f"{held_in}, samples.npz, {RECORD})"
    return f"{held_in}); the process that writes the last sample, or the same command again, writes samples.npz"


def class_line(out: str | Path) -> str:
    """How many samples of each class the complete folder `out` holds, to print; empty where that is not recorded."""
    counts = recorded(Path(out, RECORD), lambda record: {n: int(k) for n, k in record[PER_CLASS].items()}, None)
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
    folder = _SampleFolder(out, num, kind, rank, progress)
    complete = folder.begin(settings)
    todo = folder.missing()
    mine = todo[todo % world == rank]
    if complete and not len(todo) and _npz_count(out / "samples.npz") == num:
        if rank == 0:
            print(
                f"{escaped(out)} already holds {'this sample' if num == 1 else f'these {num:,} samples'}; nothing to do"
            )
        return 0
    if len(mine):
        folder.write_samples(sample(mine), len(mine))
    if not len(folder.missing()):  # every process has written its samples
        shape, labels = folder.write_npz()
        counts = {} if classes is None else {PER_CLASS: per_class(labels, classes)}
        folder.write_json({"num": num, "complete": True, "shape": shape} | counts | {"settings": settings})
        # of killed processes, whose number may have been another; all samples are written, so no process has one in use
        remove_stale_temporaries(out, f"[0-9]*{kind.suffix}", *([f"[0-9]*{kind.view_suffix}"] if kind.view else []))
        if not len(mine) and rank == 0:
            print(f"{escaped(out)} holds all {plural(num, 'sample')} already; samples.npz is written")
    return len(mine)


@dataclass(frozen=True)
class _SampleFolder:
    """The samples 0 .. num - 1 in the folder `out`, as one of several processes writes them."""

    out: Path
    num: int
    kind: SampleFile = PNG
    rank: int = 0
    progress: bool = False

    def begin(self, settings: dict[str, Any]) -> bool:
        """Compare the folder with the settings, and write samples.json; True when that marks the folder as complete."""
        record = self.out / RECORD
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is not a folder; choose another --out")
        if record.exists():
            earlier = _read_json(record)
            differing = _differences(earlier["settings"], settings)
            if differing:
                raise ValueError(
                    f"{self.out} holds samples of other settings ({'; '.join(differing)}); choose another folder"
                )
            if self.num < earlier["num"]:
                raise ValueError(
                    f"{self.out} was begun for {plural(earlier['num'], 'sample')}; request at least as many, or choose "
                    "another folder"
                )
            if self.num == earlier["num"]:
                return earlier["complete"]
        elif self.out.is_dir() and any(self.out.glob(f"[0-9]*{self.kind.suffix}")):
            raise ValueError(f"{self.out} holds {self.kind.suffix} files but no samples.json; choose an empty folder")
        self.write_json({"num": self.num, "complete": False, "settings": settings})
        return False

    def missing(self) -> np.ndarray:
        """Sorted indices (m,) that have no complete file."""
        # NFS remembers that a name did not exist, until the folder is opened anew: of two processes that end together, neither
        # would see the last file of the other, and none would write the npz
        os.listdir(self.out)
        return np.array([k for k in range(self.num) if not self.kind.is_complete(self.path(k))], dtype=np.int64)

    def path(self, index: int) -> Path:
        return self.out / f"{index:06d}{self.kind.suffix}"

    def write(self, path: Path) -> AbstractContextManager[BinaryIO]:
        """`atomic_write` without fsync, which is slow for 50,000 files: `SampleFile.is_complete` detects incomplete ones."""
        remedy = f"{FREE_SPACE}; the same command then continues"
        return atomic_write(path, writer=self.rank, durable=False, remedy=remedy)

    def write_json(self, content: dict[str, Any]) -> None:
        with self.write(self.out / RECORD) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())

    def write_samples(self, batches: Samples, count: int) -> None:
        """Write batches of `count` samples in another thread, while the next ones are sampled."""
        pending: deque[Future[int]] = deque()
        hidden = not self.progress or self.rank > 0
        bar = progress_bar(total=count, desc=f"samples of {self.num}", unit="img", disable=hidden)
        with ThreadPoolExecutor(max_workers=1) as pool, bar:
            for batch in batches:
                pending.append(pool.submit(self.write_batch, *batch))
                while pending and (len(pending) > BACKLOG or pending[0].done()):
                    bar.update(pending.popleft().result())
            while pending:
                bar.update(pending.popleft().result())

    def write_batch(self, indices: np.ndarray, labels: np.ndarray, images: np.ndarray) -> int:
        """Write a file of each sample; returns their number."""
        self.kind.check(images)
        for index, label, image in zip(indices, labels, images, strict=True):
            path = self.path(int(index))
            if self.kind.view is not None:  # first: a sample whose own file is complete has both
                with self.write(path.with_suffix(self.kind.view_suffix)) as file:
                    self.kind.view(file, image)
            with self.write(path) as file:
                self.kind.write(file, image, int(label))
        return len(indices)

    def write_npz(self) -> tuple[list[int], np.ndarray]:
        """Sample files ⇒ samples.npz, streamed: arr_0 (num, *shape), labels arr_1 (num,). Returns that shape and arr_1."""
        first, _ = self.kind.read(self.path(0))
        shape, labels = [self.num, *first.shape], np.empty(self.num, dtype=np.int64)
        header = {"descr": npy.dtype_to_descr(first.dtype), "fortran_order": False, "shape": tuple(shape)}
        with self.write(self.out / "samples.npz") as target, zipfile.ZipFile(target, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                npy.write_array_header_1_0(file, header)
                hidden = None if self.progress else True
                bar = progress_bar(self._read_all(), desc="samples.npz", total=self.num, leave=False, disable=hidden)
                for k, (image, label) in enumerate(bar):
                    if list(image.shape) != shape[1:]:
                        raise ValueError(
                            f"{self.path(k)} is {image.shape}, the first is {tuple(shape[1:])}; delete it and repeat"
                        )
                    file.write(image.tobytes())
                    labels[k] = label
            with archive.open("arr_1.npy", "w") as file:
                npy.write_array(file, labels, allow_pickle=False)
        return shape, labels

    def _read_all(self) -> Iterator[tuple[np.ndarray, int]]:
        """Decode in order with four threads, a chunk at a time: `map` over all paths would read all files ahead."""
        with ThreadPoolExecutor(max_workers=4) as pool:
            for start in range(0, self.num, CHUNK):
                yield from pool.map(self.kind.read, map(self.path, range(start, min(start + CHUNK, self.num))))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        record = {key: kind(content[key]) for key, kind in (("num", int), ("complete", bool), ("settings", dict))}
        _flat(record["settings"])  # raises RecursionError when it is nested too deeply
        return record
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); choose another folder, or delete this one") from error


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {prefix: settings}
    return {k: v for key, value in settings.items() for k, v in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}


def _differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`name: OLD there, NEW now` for each setting that differs; not for the place of weights, which their hashes identify."""
    old, new = _flat(earlier), _flat(json.loads(json.dumps(now)))  # through json, so that a tuple equals its list
    names = [name for name in {**old, **new} if old.get(name) != new.get(name) or (name in old) != (name in new)]
    names = [name for name in names if not re.fullmatch(r"(autoguidance\.)?source\.path", name)]
    shown = ([printable(text, 60) for text in (k, old.get(k, "absent"), new.get(k, "absent"))] for k in names[:5])
    return [f"{name}: {was} there, {given} now" for name, was, given in shown]  # the folder may be untrusted


def _npz_count(path: Path) -> int:
    """Number of samples in an npz, from its header; -1 if it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            npy.read_magic(file)
            return int(npy.read_array_header_1_0(file)[0][0])
    except Exception:  # a damaged zip raises many types
        return -1
