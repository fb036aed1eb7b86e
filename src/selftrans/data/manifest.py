"""The manifest of prepared shards, and its strict parser: nothing in it is believed before it is checked.

On disk: `manifest.json`, and per shard two raw little-endian files without headers,
    moments-00000.bin  (count, copies, M, H, W) in `dtype`        labels-00000.bin  (count,) int64
Shape legend: (C, H, W) latent, M moments channels: 2C (mean, std) when stochastic, else C.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

from selftrans.data.sources.decode import shown
from selftrans.types import Conditions

Option: TypeAlias = str | int | float | bool | None

VERSION = 1
FILE = "manifest.json"
DTYPES = {"float16": 2, "float32": 4}  #: name -> bytes of a number
MAX_BYTES = 1 << 28  #: of a manifest
REMEDY = "prepare the data again"


@dataclass(frozen=True)
class Shard:
    """One finished unit of work: pictures [index * shard_size, (index + 1) * shard_size) of the source."""

    index: int
    file: str  #: moments
    count: int  #: pictures in it, the skipped left out
    sha256: str
    labels_file: str
    labels_sha256: str
    skipped: tuple[tuple[str, str], ...] = ()  #: name and reason of each picture left out


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds and how it was made."""

    version: int
    count: int  #: pictures in all shards
    copies: int  #: moments per picture: 1, or 2 when the mirrored picture is stored too
    shape: tuple[int, int, int]  #: (C, H, W) of a latent
    stochastic: bool  #: whether moments have a standard deviation
    dtype: str  #: of the stored moments, a key of DTYPES
    scale: float  #: latents = (sample - shift) * scale
    shift: float
    autoencoder: str
    resolution: int  #: of the pictures
    image_channels: int
    classes: tuple[str, ...]  #: empty: unconditional, every label 0
    source: str
    options: dict[str, Option]
    shards: tuple[Shard, ...]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def conditions(self) -> Conditions:
        """What a sample is conditioned on."""
        return Conditions("labels" if self.classes else "none", self.num_classes)

    @property
    def moments_shape(self) -> tuple[int, int, int, int]:
        """(copies, M, H, W) of one picture."""
        channels, height, width = self.shape
        return self.copies, channels * (2 if self.stochastic else 1), height, width

    @property
    def row_bytes(self) -> int:
        """Bytes of one picture in a moments file."""
        return math.prod(self.moments_shape) * DTYPES[self.dtype]

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """Name and reason of every picture that was left out."""
        return tuple(pair for shard in self.shards for pair in shard.skipped)

    def summary(self) -> str:
        """A few lines to print."""
        kind = {0: "unconditional", 1: "1 class"}.get(self.num_classes, f"{self.num_classes} classes")
        if self.classes:  # shown, as train/ and val/ may be taken for classes unseen
            kind += f": {', '.join(map(shown, self.classes[:6]))}{', …' if self.num_classes > 6 else ''}"
        latent = "x".join(str(side) for side in self.shape)
        lines = [
            f"{self.count:,} pictures of {self.resolution}x{self.resolution}, {kind}",
            f"{latent} latents by {shown(self.autoencoder)}, {'mean and std' if self.stochastic else 'no std'}, {self.dtype}"
            + (", with mirrored copies" if self.copies == 2 else ""),
            f"{len(self.shards)} shards, {self.count * self.row_bytes / 1e6:,.1f} MB",
        ]
        if self.skipped:
            lines.append(f"{len(self.skipped)} unreadable pictures left out:")
            lines += [f"  {shown(name)}: {shown(reason)}" for name, reason in self.skipped[:10]]
            lines += [f"  and {len(self.skipped) - 10} more, listed in {FILE}"] if len(self.skipped) > 10 else []
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check every field. Raises ValueError naming the field that is wrong."""
        record = Record(parse_json(text, FILE), FILE)
        version = record.integer("version", 0)
        if version != VERSION:
            raise ValueError(f"{FILE} is of version {version}, this package reads {VERSION}; {REMEDY}")
        record.only(field.name for field in fields(cls))
        shape = record.items("shape", lambda x: _integer(x, 1, 1 << 16), 3)
        manifest = cls(
            version=version,
            count=record.integer("count", 0),
            copies=record.integer("copies", 1, 2),
            shape=(shape[0], shape[1], shape[2]),
            stochastic=record.boolean("stochastic"),
            dtype=record.one_of("dtype", tuple(DTYPES)),
            scale=record.number("scale"),
            shift=record.number("shift"),
            autoencoder=record.text("autoencoder"),
            resolution=record.integer("resolution", 1, 1 << 16),
            image_channels=record.integer("image_channels", 1, 3),
            classes=record.items("classes", _text),
            source=record.text("source"),
            options=record.options("options"),
            shards=tuple(
                shard_from(item, f"{FILE}: shards[{i}]") for i, item in enumerate(record.items("shards", lambda x: x))
            ),
        )
        _agree(manifest)
        return manifest

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read a folder's manifest. Raises ValueError when there is none, or it is wrong."""
        path = Path(folder, FILE)
        if not path.is_file():
            raise ValueError(f"no {FILE} in {folder}: not prepared or not finished; run `selftrans prepare` to make it")
        try:
            manifest = cls.from_json(read_text(path))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        if not manifest.count:
            raise ValueError(f"{folder}: {FILE}: field 'count' is 0; {REMEDY}")
        return manifest


def shard_from(data: object, where: str) -> Shard:
    """A shard's record, checked."""
    record = Record(data, where)
    record.only(field.name for field in fields(Shard))
    return Shard(
        index=record.integer("index", 0),
        file=record.file_name("file"),
        count=record.integer("count", 0),
        sha256=record.sha256("sha256"),
        labels_file=record.file_name("labels_file"),
        labels_sha256=record.sha256("labels_sha256"),
        skipped=record.items("skipped", _pair),
    )


def _agree(manifest: Manifest) -> None:
    """Raise ValueError where fields contradict each other."""
    total = sum(shard.count for shard in manifest.shards)
    files = [name for shard in manifest.shards for name in (shard.file, shard.labels_file)]
    if total != manifest.count:
        raise ValueError(f"{FILE}: field 'count' is {manifest.count}, its shards add up to {total}; {REMEDY}")
    if [shard.index for shard in manifest.shards] != list(range(len(manifest.shards))):
        raise ValueError(f"{FILE}: field 'shards' is not in order 0, 1, ...; {REMEDY}")
    if len(set(files)) != len(files):
        raise ValueError(f"{FILE}: field 'shards' names a file twice; {REMEDY}")
    if len(set(manifest.classes)) != len(manifest.classes):
        raise ValueError(f"{FILE}: field 'classes' names a class twice; {REMEDY}")
    if manifest.scale == 0:
        raise ValueError(f"{FILE}: field 'scale' is zero; {REMEDY}")


def read_text(path: Path) -> str:
    """A small text file. Raises ValueError when it is absurdly large or no text."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.name} is larger than {MAX_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from error


def parse_json(text: str, where: str) -> object:
    """JSON as data. Raises ValueError when it is none, or nested beyond reason."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}); {REMEDY}") from error


class Record:
    """A JSON object whose fields are taken one by one, each checked; `where` names it in errors."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            raise ValueError(f"{where} should be a JSON object, not {data!r:.40}; {REMEDY}")
        self.data, self.where = data, where

    def only(self, names: Any) -> None:
        unknown = sorted(set(self.data) - set(names))
        if unknown:
            raise ValueError(f"{self.where}: field {unknown[0]!r:.60} is unknown; {REMEDY}")

    def take(self, name: str, check: Callable[[object], Any]) -> Any:
        if name not in self.data:
            raise ValueError(f"{self.where}: field {name!r} is missing; {REMEDY}")
        value = self.data[name]
        try:
            return check(value)
        except ValueError as error:
            raise ValueError(f"{self.where}: field {name!r} should be {error}, not {value!r:.60}; {REMEDY}") from None

    def integer(self, name: str, low: int, high: int = 1 << 48) -> int:
        return self.take(name, lambda x: _integer(x, low, high))

    def text(self, name: str) -> str:
        return self.take(name, _text)

    def boolean(self, name: str) -> bool:
        return self.take(name, lambda x: _is(x, bool, "true or false"))

    def number(self, name: str) -> float:
        return self.take(name, _number)

    def one_of(self, name: str, choices: tuple[str, ...]) -> str:
        return self.take(name, lambda x: _matches(x, "|".join(choices), f"one of {', '.join(choices)}"))

    def file_name(self, name: str) -> str:
        return self.take(name, lambda x: _matches(x, r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}", "a plain file name"))

    def sha256(self, name: str) -> str:
        return self.take(name, lambda x: _matches(x, "[0-9a-f]{64}", "a sha256 in hexadecimal"))

    def items(self, name: str, check: Callable[[object], Any], length: int | None = None) -> tuple[Any, ...]:
        items = self.take(name, lambda x: _is(x, list, "a list"))
        if length is not None and len(items) != length:
            raise ValueError(f"{self.where}: field {name!r} should have {length} entries, not {len(items)}; {REMEDY}")
        entries = Record({f"{name}[{i}]": item for i, item in enumerate(items)}, self.where)
        return tuple(entries.take(key, check) for key in entries.data)

    def options(self, name: str) -> dict[str, Option]:
        options = Record(self.take(name, lambda x: _is(x, dict, "an object")), f"{self.where}: {name}")
        return {key: options.take(key, _option) for key in options.data}


def _is(value: object, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(name)
    return value


def _integer(value: object, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"an integer from {low} to {high}")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise ValueError("a finite number")
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("text")
    return value


def _matches(value: object, pattern: str, name: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise ValueError(name)
    return value


def _pair(value: object) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("a name and a reason")
    return _text(value[0]), _text(value[1])


def _option(value: object) -> Option:
    if value is not None and not isinstance(value, str | int | float | bool):
        raise ValueError("text, a number, true, false or null")
    return value
