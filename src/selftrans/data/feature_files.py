"""Features of an external encoder beside the moments: what `features.json` says, strictly parsed.

On disk, beside the manifest: `features.json`, and per shard a raw little-endian file without header,
    features-00000.bin  (count, copies, T, D) float16
A folder without `features.json` holds none. While they are made, a record `features-00000.json` of each finished shard
(the same json, of one file) takes its place. Shape legend: T = grid² tokens row by row, D width.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from selftrans.data.manifest import Manifest, Record, parse_json, read_text

VERSION = 1
FILE = "features.json"


@dataclass(frozen=True)
class FeatureFile:
    """The features of one shard."""

    index: int  #: of the shard
    count: int  #: pictures in it
    sha256: str

    @property
    def name(self) -> str:
        return f"features-{self.index:05d}.bin"

    @property
    def record(self) -> str:
        """Name of its record while others are still to be made."""
        return f"features-{self.index:05d}.json"


@dataclass(frozen=True)
class Features:
    """What the feature files of a folder hold and how they were made."""

    version: int
    encoder: str  #: hub id or folder
    sha256: str  #: of the encoder's weights
    precision: str  #: of the encoder's network
    grid: int  #: T = grid²
    width: int  #: D
    pictures: str  #: fingerprint of the pictures, as in the manifest's options
    files: tuple[FeatureFile, ...]

    def row_bytes(self, manifest: Manifest) -> int:
        """Bytes of one picture in a file."""
        return manifest.copies * self.grid**2 * self.width * 2

    def about(self) -> Features:
        """All but the files: equal where features may lie side by side."""
        return replace(self, files=())

    def summary(self, manifest: Manifest) -> str:
        """A line to print."""
        size = sum(file.count for file in self.files) * self.row_bytes(manifest) / 1e6
        return f"features by {self.encoder}: {self.grid}x{self.grid} of {self.width}, float16, {size:,.1f} MB"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def load(cls, path: Path) -> Features:
        """Parse a file and check every field. Raises ValueError naming the field that is wrong."""
        record = Record(parse_json(read_text(path), path.name), path.name)
        version = record.integer("version", 0)
        if version != VERSION:
            raise ValueError(f"{path.name} is of version {version}, this package reads {VERSION}")
        record.only(field.name for field in fields(cls))
        entries = [Record(item, f"{path.name}: files") for item in record.items("files", lambda x: x)]
        for entry in entries:
            entry.only(field.name for field in fields(FeatureFile))
        return cls(
            version=version,
            encoder=record.text("encoder"),
            sha256=record.sha256("sha256"),
            precision=record.text("precision"),
            grid=record.integer("grid", 1, 1 << 12),
            width=record.integer("width", 1, 1 << 20),
            pictures=record.sha256("pictures"),
            files=tuple(
                FeatureFile(entry.integer("index", 0), entry.integer("count", 0), entry.sha256("sha256"))
                for entry in entries
            ),
        )

    def check(self, manifest: Manifest) -> None:
        """Raise ValueError unless these are the features of the manifest's pictures, all of them."""
        if self.pictures != manifest.options.get("pictures"):
            raise ValueError(f"{FILE} is of other pictures than the shards beside it")
        expected = [(shard.index, shard.count) for shard in manifest.shards]
        if [(file.index, file.count) for file in self.files] != expected:
            raise ValueError(f"{FILE}: field 'files' does not agree with the shards of the manifest")
