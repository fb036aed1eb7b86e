"""The output folder of `prepare`: what is finished in it, who may write, and files that appear whole or not at all.

unfinished: `plan.json` (a manifest without shards) and a record `shard-00000.json` per finished shard
finished:   `manifest.json`, written last, which takes the place of both

One process writes alone, or several write different shards: each makes the shards k with k % N == I - 1, and whichever
finds all of them whole writes the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

from selftrans.data.manifest import FILE, Manifest, Option, Shard, parse_json, read_text, shard_from
from selftrans.storage import no_symlink as no_link
from selftrans.storage import sync

PLAN, LOCK, TEMP = "plan.json", ".lock", ".tmp-"
#: part I of N, counted from 1; the whole is part 1 of 1
Part: TypeAlias = tuple[int, int]
WHOLE: Part = (1, 1)


def parse_part(text: str) -> Part:
    """The part that "I/N" means. Raises ValueError where it means none."""
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise ValueError(f"part {text!r} should be I/N with I from 1 to N, as 1/2 and 2/2 for two processes")
    return int(number), int(parts)


class Earlier(NamedTuple):
    """What an earlier `prepare` left in the folder."""

    plan: Manifest  #: without shards
    shards: tuple[Shard, ...]  #: those that are whole
    complete: bool


def earlier(out: Path) -> Earlier | None:
    """What the folder holds; None when there is no folder, or an empty one.

    Raises ValueError when it is no folder, holds other things, or a plan or manifest that is damaged.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a folder; choose another --out")
    try:
        visible = [path.name for path in out.iterdir() if not path.name.startswith(".")] if out.is_dir() else []
    except OSError as error:
        raise ValueError(f"{out} cannot be listed ({error.strerror}); choose another --out") from error
    name = FILE if FILE in visible else PLAN
    if name not in visible:
        if visible:
            raise ValueError(f"{out} is not empty and holds no earlier preparation; choose a new folder for --out")
        return None
    try:
        found = Manifest.from_json(read_text(out / name))
    except ValueError as error:
        raise ValueError(f"{out} holds a damaged preparation ({error}); delete it, or choose another --out") from error
    recorded = found.shards if name == FILE else tuple(_records(out))
    whole = tuple(shard for shard in recorded if _is_whole(out, shard, found.row_bytes))
    complete = name == FILE and PLAN not in visible and 0 < len(whole) == len(found.shards)
    return Earlier(replace(found, count=0, shards=()), whole, complete)


def is_finished(out: Path) -> bool:
    """Whether the folder is in its finished state (its shards may be damaged all the same)."""
    return (out / FILE).is_file() and not (out / PLAN).exists()


def _records(out: Path) -> Iterator[Shard]:
    for path in sorted(out.glob("shard-*.json")):
        with suppress(ValueError):  # a damaged record is no record: its shard is made again
            yield shard_from(parse_json(read_text(path), path.name), path.name)


def _is_whole(out: Path, shard: Shard, row_bytes: int) -> bool:
    wanted = {shard.file: shard.count * row_bytes, shard.labels_file: shard.count * 8}
    return all((out / name).is_file() and (out / name).stat().st_size == size for name, size in wanted.items())


def check_options(before: Manifest, options: dict[str, Option], out: Path) -> None:
    """Raise ValueError naming the first option that is not what the folder was begun with."""
    for name in sorted(before.options.keys() | options.keys()):
        old, new = before.options.get(name), options.get(name)
        if old == new:
            continue
        said = f"with {name} {old}, not {new}" if name != "pictures" else "from other pictures"
        raise ValueError(f"{out} was prepared {said}; repeat the command as it was, or choose another --out")


def check_plan(before: Manifest, plan: Manifest, out: Path) -> None:
    """Raise ValueError naming the first field that the same options would fill differently today."""
    for name in (field.name for field in fields(Manifest) if field.name not in ("source", "shards", "count")):
        old, new = getattr(before, name), getattr(plan, name)
        if old != new:
            raise ValueError(f"{out} was begun with {name} {old}, now it is {new}; choose another --out")


@contextmanager
def locked(out: Path, part: Part = WHOLE, units: Iterable[int] = ()) -> Iterator[None]:
    """Make the folder and hold it for this process; or hold one part of it, the shards `units`, beside other parts.

    Raises ValueError when another has it, or it cannot be written.
    """
    alone, name = part == WHOLE, f"{LOCK}-{part[0]}-of-{part[1]}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / LOCK, "ab", opener=no_link)  # noqa: SIM115 (held for the whole block below)
        mine = lock if alone else open(out / name, "ab", opener=no_link)  # noqa: SIM115
    except OSError as error:
        raise write_error(out, error) from error
    with lock, mine:
        if not _take(lock, shared=not alone):
            raise ValueError(f"another `selftrans prepare` is writing to {out}; wait for it, or choose another --out")
        if not alone and not _take(mine):
            raise ValueError(f"another `selftrans prepare` is making part {part[0]}/{part[1]} in {out}; wait for it")
        _sweep(out, "" if alone else rf"[a-z]+-({'|'.join(f'{unit:05d}' for unit in units)})\.")
        yield
        if is_finished(out):
            for path in out.glob(f"{LOCK}*"):
                path.unlink(missing_ok=True)


@contextmanager
def changing(out: Path, part: Part) -> Iterator[None]:
    """Hold the state of the folder (plan and manifest) while it is read and changed; other parts wait a moment."""
    if part == WHOLE:  # there are no others
        yield
        return
    try:
        lock = open(out / f"{LOCK}-state", "ab", opener=no_link)  # noqa: SIM115
    except OSError as error:
        raise write_error(out, error) from error
    with lock:
        _take(lock, wait=True)
        _sweep(out, r"(plan|manifest|features)\.")
        yield


def _sweep(out: Path, names: str) -> None:
    """Remove unfinished files whose names begin like this (a pattern): what a killed process has left."""
    for stale in out.glob(f"{TEMP}*"):
        if re.match(names, stale.name.removeprefix(TEMP)):
            with suppress(OSError):
                stale.unlink()


def _take(lock: BinaryIO, *, shared: bool = False, wait: bool = False) -> bool:
    """Whether this process has the lock now; the system releases it however the process ends."""
    try:
        import fcntl

        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True  # no locks on this system: names of unfinished files are unique, so nothing is torn
    return True


def begin(out: Path, plan: Manifest, shards: Iterable[Shard]) -> None:
    """Put the folder in its unfinished state, these shards being whole."""
    write_text(out / PLAN, plan.to_json())
    for shard in shards:
        record(out, shard)
    (out / FILE).unlink(missing_ok=True)


def record(out: Path, shard: Shard) -> None:
    """Note that a shard is whole."""
    write_text(out / f"shard-{shard.index:05d}.json", json.dumps(asdict(shard)))


def finish(out: Path, plan: Manifest, shards: Iterable[Shard]) -> Manifest:
    """Write the manifest, and drop what it replaces."""
    ordered = tuple(sorted(shards, key=lambda shard: shard.index))
    manifest = replace(plan, shards=ordered, count=sum(shard.count for shard in ordered))
    write_text(out / FILE, manifest.to_json())
    for path in [*out.glob("shard-*.json"), out / PLAN]:
        path.unlink(missing_ok=True)
    return manifest


class HashedFile:
    """A file being written, and the sha256 of what went into it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


@contextmanager
def beside(path: Path) -> Iterator[HashedFile]:
    """Write `path` beside itself; at the end it is flushed to the disk and renamed, after an error it is removed.

    Raises ValueError when the disk refuses; what was at `path` before is then still there.
    """
    temp = path.with_name(f"{TEMP}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        with open(temp, "xb") as file:
            yield HashedFile(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
        with suppress(PermissionError):  # not every system lets a folder be opened
            sync(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):
            temp.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text as `beside` does."""
    with beside(path) as file:
        file.write(text.encode())


def write_error(path: Path, error: OSError) -> ValueError:
    """The one line for a disk that refuses."""
    return ValueError(
        f"cannot write {path}: {error.strerror or error}; make room or choose another --out, then repeat: "
        "whole shards are kept"
    )
