"""The manifest of prepared data, and its parser, which checks every field.

On disk: `manifest.json`, and one safetensors file per shard (see `shard_file`). If features of an external encoder are
stored, there is one more file per shard, which the manifest lists in `features`.
Shape legend: (C, *S) latent with one to three spatial dimensions S, M moments channels: 2C (mean, std) when stochastic,
else C; T = grid² tokens row by row and D width of the features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Annotated, TypeAlias

from selftrans.data.manifest_text import NULL, Text
from selftrans.data.resolution import size_text
from selftrans.data.shard_file import Layout, row_bytes
from selftrans.encoders.identity import identity, identity_kind
from selftrans.encoders.latent_space import UNSCALED, LatentSpace
from selftrans.messages import listed, plural, printable, shape_text
from selftrans.plain_json import Count, Name, Option, Sha256, from_plain, one_of, parse_object, read_text, within
from selftrans.types import Conditions

VERSION = 2
FILE = "manifest.json"
BUCKETS = "buckets.json"  #: takes the place of FILE in a folder of buckets, see `buckets.py`
DTYPES = ("float16", "float32")  #: of stored moments
MOST_NAMED = 4  #: channels whose shift and scale the summary lists
REMEDY = "prepare the data again"
Side: TypeAlias = Annotated[int, within(1, 1 << 16)]  #: of a picture


@dataclass(frozen=True)
class Shard:
    """One finished shard: samples [index * shard_size, (index + 1) * shard_size) of the source."""

    index: Count
    count: Count  #: samples in it, without the skipped ones
    sha256: Sha256
    skipped: tuple[tuple[Name, Name], ...]  #: name and reason of each skipped sample

    @property
    def file(self) -> str:
        return f"shard-{self.index:05d}.safetensors"

    @property
    def asked(self) -> int:
        """How many samples of the source the shard covers, skipped ones included."""
        return self.count + len(self.skipped)


@dataclass(frozen=True)
class FeatureFile:
    """The features of one shard."""

    index: Count  #: of the shard
    sha256: Sha256

    @property
    def name(self) -> str:
        return f"features-{self.index:05d}.safetensors"


@dataclass(frozen=True)
class Features:
    """The contents of a folder's feature files, and how they were made."""

    encoder: Name  #: hub id or folder
    sha256: Sha256  #: of the encoder's weights
    precision: Name  #: of the encoder's network
    grid: Annotated[int, within(1, 1 << 12)]  #: T = grid²
    width: Annotated[int, within(1, 1 << 20)]  #: D
    fingerprint: Sha256  #: of the pictures, as in the manifest's options
    files: tuple[FeatureFile, ...]

    def layout(self, manifest: Manifest) -> Layout:
        """What one feature file holds."""
        return {"features": ("float16", (manifest.copies, self.grid**2, self.width))}

    def summary(self, manifest: Manifest) -> str:
        """A line to print."""
        finished = {file.index for file in self.files}
        count = sum(shard.count for shard in manifest.shards if shard.index in finished)
        size = count * row_bytes(self.layout(manifest)) / 1e6
        return f"features by {self.encoder}: {self.grid}x{self.grid} of {self.width}, float16, {size:,.1f} MB"


@dataclass(frozen=True)
class Manifest:
    """The contents of a folder of shards, and how it was made."""

    version: Annotated[int, within(VERSION, VERSION)]
    count: Count  #: samples in all shards
    copies: Annotated[int, within(1, 2)]  #: moments per sample: 2 with those of the mirrored picture
    shape: tuple[Annotated[int, within(1, 1 << 24)], ...]  #: (C, *S) of a latent
    latent_space: LatentSpace  #: moments => latents
    dtype: Annotated[str, one_of(DTYPES)]  #: of the stored moments
    autoencoder: Name
    resolution: Side | tuple[Side, Side] | None  #: of the pictures: side, or (height, width); None: not pictures
    image_channels: Annotated[int, within(1, 3)] | None  #: of the pictures; None: not pictures
    conditions: Conditions  #: of kind none, every label is 0
    classes: tuple[Name, ...]  #: names of the labels; empty unless conditions are of kind labels
    source: Name
    options: dict[str, Option]
    shards: tuple[Shard, ...]
    features: Features | None  #: of an external encoder, for all shards
    text: Text | None = None  #: how captions are stored; conditions are of kind text

    @property
    def num_classes(self) -> int:
        return self.conditions.num_classes

    @property
    def moments_shape(self) -> tuple[int, ...]:
        """(copies, M, *S) of one sample."""
        channels, *spatial = self.shape
        return self.copies, channels * (2 if self.latent_space.stochastic else 1), *spatial

    @property
    def layout(self) -> Layout:
        """What one shard holds."""
        text = self.text.layout(self.conditions) if self.text else {}
        return {"moments": (self.dtype, self.moments_shape), "labels": ("int64", ()), **text}

    @property
    def noun(self) -> str:
        """What a sample is called in messages."""
        return "sample" if self.resolution is None else "picture"

    @property
    def unit(self) -> str:
        """What the samples are called in messages."""
        return f"{self.noun}s"

    def counted(self, count: int) -> str:
        """`1 picture`, `1,200 samples`."""
        return plural(count, self.noun)

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """Name and reason of every skipped sample."""
        return tuple(pair for shard in self.shards for pair in shard.skipped)

    def summary(self) -> str:
        """A few lines to print."""
        kind = plural(self.num_classes, "class") if self.num_classes else "unconditional"
        if self.text:
            kind = "with captions"
        if self.classes:  # shown, since folders such as train/ and val/ could be mistaken for classes
            kind += f": {listed(self.classes, 6)}"
        size = "" if self.resolution is None else f" of {size_text(self.resolution)}"
        lines = [
            f"{self.counted(self.count)}{size}, {kind}",
            f"{shape_text(self.shape)} latents: {self._latents()}, {self.dtype}"
            + (", with mirrored copies" if self.copies == 2 else ""),
            *([self.text.summary(self.conditions)] if self.text else []),
            f"{plural(len(self.shards), 'shard')}, {self.count * row_bytes(self.layout) / 1e6:,.1f} MB",
        ]
        if self.skipped:
            unlabelled = any(reason.startswith("no label") for _, reason in self.skipped)
            fault = "unusable" if self.text or unlabelled else "unreadable"
            lines.append(f"{plural(len(self.skipped), f'{fault} {self.noun}')} left out:")
            lines += [f"  {printable(name)}: {printable(reason)}" for name, reason in self.skipped[:10]]
            lines += [f"  and {len(self.skipped) - 10} more, listed in {FILE}"] if len(self.skipped) > 10 else []
        return "\n".join(lines)

    def _latents(self) -> str:
        """What the latents are, in words; shift and scale of pixels and values are in the name of their autoencoder."""
        kind = identity_kind(self.autoencoder)
        if kind is None:
            return printable(self.autoencoder) + (", mean and std" if self.latent_space.stochastic else "")
        what = "pixels in [-1, 1]" if kind == "pixel" else "values"
        if self.latent_space == UNSCALED:
            return f"{what}, as they are"
        unit = "scaled to zero mean and unit variance" if self.options.get("standardise") else "scaled"
        shift, scale = (each if isinstance(each, tuple) else (each,) for each in astuple(self.latent_space)[:2])
        numbers = self.autoencoder.partition("(")[2].removesuffix(")")
        if len(shift) > MOST_NAMED:
            ranges = (f"{min(each):g} to {max(each):g}" for each in (shift, scale))
            numbers = "{} channels: shift {}, scale {}".format(len(shift), *ranges)
        return f"{what}, {unit} ({printable(numbers)})"

    def shards_sha256(self, separator: str = "\n") -> str:
        """sha256 of the sha256 of all shards, with `separator` between them: the same for the same data in another folder."""
        return hashlib.sha256(separator.join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def without_shards(self) -> Manifest:
        """The plan: the manifest before any shard is written."""
        return replace(self, count=0, shards=())

    def to_json(self) -> str:
        data = asdict(self)
        if self.text is None:
            del data["text"]  # as in manifests from before captions could be stored
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check every field. Raises ValueError naming the field that is wrong."""
        plain = parse_object(text, FILE, REMEDY)
        version = plain.get("version")
        if type(version) is not int or version <= 0:
            version = VERSION  # what it is instead is said with the other fields
        if version < VERSION:
            raise ValueError(
                f"{FILE} has version {version}, whose .bin files this package no longer reads; repeat its "
                "`selftrans prepare` into a new folder"
            )
        if version > VERSION:
            raise ValueError(
                f"{FILE} has version {version}, this package reads version {VERSION}; install a newer version of it"
            )
        try:
            manifest: Manifest = from_plain(cls, plain, "")
        except ValueError as error:
            raise ValueError(f"{FILE}: {error}; {REMEDY}") from error
        for fault in _contradictions(manifest):
            raise ValueError(f"{FILE}: {fault}; {REMEDY}")
        return manifest

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read a folder's manifest. Raises ValueError when it is missing or invalid."""
        path = Path(folder, FILE)
        if Path(folder, BUCKETS).is_file():
            raise ValueError(
                f"{folder} holds buckets of several sizes, which only `selftrans train`, `compare`, `evaluate` and "
                "`autoencoder` take; give one of its folders, such as the one of square pictures"
            )
        if not path.is_file():
            # perhaps recorded in a run that was started in another working directory
            relative = not path.is_absolute() and not path.parent.exists()
            where = f"{folder} (below {Path.cwd()})" if relative else folder
            raise ValueError(f"no {FILE} in {where}: not prepared or not finished; run `selftrans prepare` to make it")
        try:
            manifest = cls.from_json(read_text(path))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        if not manifest.count:
            raise ValueError(f"{folder}: {FILE}: field 'count' is 0; {REMEDY}")
        return manifest


def conditions_of(classes: tuple[str, ...]) -> Conditions:
    """The conditions of data with these class names; no names mean no conditions."""
    return Conditions("labels", len(classes)) if classes else Conditions("none")


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """One sentence for each pair of fields that contradict each other."""
    space, conditions, features = manifest.latent_space, manifest.conditions, manifest.features
    total, indices = sum(shard.count for shard in manifest.shards), [shard.index for shard in manifest.shards]
    if total != manifest.count:
        yield f"field 'count' is {manifest.count}, its shards add up to {total}"
    if indices != list(range(len(indices))):
        yield "field 'shards' is not in order 0, 1, ..."
    if not 2 <= len(manifest.shape) <= 4:
        yield f"field 'shape' should have 2 to 4 entries, not {len(manifest.shape)}"
    for name, each in (("shift", space.shift), ("scale", space.scale)):
        if isinstance(each, tuple) and len(each) != manifest.shape[0]:
            yield f"field 'latent_space': {name!r} should have {manifest.shape[0]} entries, not {len(each)}"
    if space.scale == 0 or (isinstance(space.scale, tuple) and 0 in space.scale):
        yield "field 'latent_space': 'scale' is zero"
    has_statistics = "(" in manifest.autoencoder and identity_kind(manifest.autoencoder)
    if has_statistics and identity(manifest.autoencoder).latent_space != space:
        yield f"field 'latent_space' is not that of {printable(manifest.autoencoder, 200)}"
    if len(set(manifest.classes)) != len(manifest.classes):
        yield "field 'classes' names a class twice"
    if conditions.kind == "text":
        unset = [name for name in ("tokens", "width", "encoder", "sha256") if not getattr(conditions, name)]
        if unset:
            yield f"field 'conditions' has kind 'text', whose {unset[0]!r} is missing"
        elif manifest.classes or conditions.num_classes or manifest.text is None:
            yield "field 'conditions' has kind 'text', which needs a field 'text' and no 'classes' or 'num_classes'"
        elif manifest.shards and not manifest.text.null:
            yield f"field 'text': 'null', the sha256 of {NULL}, is missing"
    elif manifest.text is not None:
        yield f"field 'text' is set, field 'conditions' says {conditions}"
    elif conditions != conditions_of(manifest.classes):
        yield f"field 'conditions' says {conditions}, field 'classes' names {len(manifest.classes)}"
    if (manifest.resolution is None) != (manifest.image_channels is None):
        yield "fields 'resolution' and 'image_channels' should both be null, or neither"
    if features and features.fingerprint != manifest.options.get("fingerprint"):
        yield "field 'features' belongs to other pictures than the shards"
    if features and indices and [file.index for file in features.files] != indices:
        yield "field 'features': 'files' does not agree with the shards"
