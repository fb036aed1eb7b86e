"""The output folder of `prepare`: which shards are finished, and which process may write.

unfinished: `plan.json` (a manifest without shards) and a record `shard-00000.json` per finished shard
finished:   `manifest.json`, written last, which replaces both

Either one process writes all shards, or N processes write different ones: part I makes the shards k with k % N == I - 1,
and the process that finds all shards finished writes the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

from selftrans.data.manifest import FILE, Features, Manifest, Shard
from selftrans.data.manifest_text import NULL
from selftrans.data.shard_file import WRITE_REMEDY, is_valid
from selftrans.plain_json import Option, from_plain, parse_object, read_text
from selftrans.storage import InUse, lock_file, remove_stale_temporaries, sha256_file, write_text

PLAN, LOCK = "plan.json", ".lock"
Item = TypeVar("Item")
#: part I of N, counted from 1
Part: TypeAlias = tuple[int, int]
ALONE: Part = (1, 1)


def parse_part(text: str) -> Part:
    """Parse "I/N". Raises ValueError for any other text, or I outside 1 .. N."""
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise ValueError(f"part {text!r} should be I/N with I from 1 to N, as 1/2 and 2/2 for two processes")
    return int(number), int(parts)


class Earlier(NamedTuple):
    """The state in which an earlier `prepare` left the folder."""

    plan: Manifest  #: without shards
    shards: tuple[Shard, ...]  #: the finished ones whose files are valid
    complete: bool


def earlier(out: Path) -> Earlier | None:
    """The state of the folder; None when it does not exist or is empty.

    Raises ValueError when it is not a folder, holds other files, or its plan or manifest is damaged.
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
        manifest = Manifest.from_json(read_text(out / name))
    except ValueError as error:
        raise ValueError(f"{out} holds a damaged preparation ({error}); delete it, or choose another --out") from error
    recorded = manifest.shards if name == FILE else tuple(records(out, "shard", Shard))
    valid = tuple(shard for shard in recorded if is_valid(out / shard.file, manifest.layout, shard.count))
    complete = (
        name == FILE and PLAN not in visible and 0 < len(valid) == len(manifest.shards) and has_null(out, manifest)
    )
    return Earlier(manifest.without_shards(), valid, complete)


def has_null(out: Path, manifest: Manifest) -> bool:
    """Whether the empty caption is stored as the manifest says; also true for data without captions."""
    text = manifest.text
    if text is None:
        return True
    stored = is_valid(out / NULL, text.null_layout(manifest.conditions), 1)
    return stored and bool(text.null) and sha256_file(out / NULL) == text.null


def is_finished(out: Path) -> bool:
    """Whether the folder is in its finished state (its shards may still be damaged)."""
    return (out / FILE).is_file() and not (out / PLAN).exists()


def records(out: Path, name: str, kind: type[Item]) -> Iterator[Item]:
    """What `record` wrote under this name, by the index of the shard."""
    for path in sorted(out.glob(f"{name}-*.json")):
        with suppress(ValueError):  # a damaged record is ignored: what it describes is made again
            yield from_plain(kind, parse_object(read_text(path), path.name), path.name)


def check_options(before: Manifest, options: dict[str, Option], out: Path) -> None:
    """Raise ValueError naming the first option that differs from those with which the folder was begun.

    The text encoder is compared first: without one, the other options of captions are absent.
    """
    for name in sorted(before.options.keys() | options.keys(), key=lambda name: (name != "text", name)):
        old, new = before.options.get(name), options.get(name)
        if old == new:
            continue
        was = f"without {name}" if old is None else f"with {name} {old}"
        now = f"with {new}" if old is None else "without" if new is None else new
        difference = f"{was}, not {now}" if name != "fingerprint" else f"from other {before.unit}"
        raise ValueError(f"{out} was prepared {difference}; repeat the command as it was, or choose another --out")


def check_plan(before: Manifest, plan: Manifest, out: Path) -> None:
    """Raise ValueError naming the first field of the folder's plan that differs from the new plan."""
    for name in (field.name for field in fields(Manifest)):
        old, new = getattr(before, name), getattr(plan, name)
        if name == "text" and old and new:  # the empty caption may be rounded in another way on another machine
            new = replace(new, null=old.null)
        if name == "conditions" and old != new and str(old) == str(new):
            old, new = (f"{x} with sha256 {x.sha256:.12}" for x in (old, new))
        if old != new and name not in ("source", "shards", "count", "features"):
            raise ValueError(f"{out} was begun with {name} {old}, now it is {new}; choose another --out")


@contextmanager
def locked(out: Path, part: Part = ALONE, shards: Iterable[int] = ()) -> Iterator[None]:
    """Create the folder and lock it for this process; or lock one part (these shards), so that others may lock other parts.

    After an error before the first shard, a process that works alone removes what it made: the next command may then have
    other options.
    Raises ValueError when another process holds the lock, or the folder cannot be written.
    """
    with ExitStack() as locks:
        other = f"writing to {out}; wait for it, or choose another --out"
        try:
            locks.enter_context(lock_file(out / LOCK, shared=part != ALONE))
            if part != ALONE:
                other = f"making part {part[0]}/{part[1]} in {out}; wait for it"
                locks.enter_context(lock_file(out / f"{LOCK}-{part[0]}-of-{part[1]}"))
        except InUse as error:
            raise ValueError(f"another `selftrans prepare` is {other}") from error
        for written in ["*"] if part == ALONE else [f"*-{shard:05d}.*" for shard in shards]:
            remove_stale_temporaries(out, written)
        try:
            yield
        except BaseException:
            if part == ALONE and not is_finished(out) and not any(out.glob("shard-*")):
                discard(out)
                (out / LOCK).unlink(missing_ok=True)
            raise
        if is_finished(out):
            for path in out.glob(f"{LOCK}*"):
                path.unlink(missing_ok=True)


@contextmanager
def changing(out: Path, part: Part) -> Iterator[None]:
    """Lock the state of the folder (plan and manifest) while it is read and changed; other parts wait."""
    if part == ALONE:  # there are no other parts
        yield
        return
    with lock_file(out / f"{LOCK}-state", wait=True):
        remove_stale_temporaries(out, PLAN, FILE, shared=True)
        yield


def begin(out: Path, plan: Manifest, shards: Iterable[Shard]) -> None:
    """Put the folder in its unfinished state, with these shards recorded as finished."""
    write_text(out / PLAN, plan.to_json(), remedy=WRITE_REMEDY)
    for shard in shards:
        record(out, "shard", shard.index, shard)
    (out / FILE).unlink(missing_ok=True)


def discard(out: Path) -> None:
    """Remove the plan, empty caption and shards of an unfinished folder in which no sample is stored."""
    for path in (out / PLAN, out / NULL, *out.glob("shard-*")):
        path.unlink(missing_ok=True)


def record(out: Path, name: str, index: int, value: Shard | Features) -> None:
    """Record that the moments (name `shard`) or the features (`features`) of a shard are finished."""
    write_text(out / f"{name}-{index:05d}.json", json.dumps(asdict(value)), remedy=WRITE_REMEDY)


def finish(out: Path, plan: Manifest, shards: Iterable[Shard]) -> Manifest:
    """Write the manifest, and remove the plan and records that it replaces."""
    ordered = tuple(sorted(shards, key=lambda shard: shard.index))
    manifest = replace(plan, shards=ordered, count=sum(shard.count for shard in ordered))
    write_text(out / FILE, manifest.to_json(), remedy=WRITE_REMEDY)
    for path in [*out.glob("shard-*.json"), out / PLAN]:
        path.unlink(missing_ok=True)
    return manifest


def set_features(out: Path, features: Features | None) -> None:
    """Write `features` into the manifest, or into the plan of an unfinished folder."""
    path = out / (FILE if (out / FILE).is_file() else PLAN)
    manifest = Manifest.from_json(read_text(path))
    write_text(path, replace(manifest, features=features).to_json(), remedy=WRITE_REMEDY)
