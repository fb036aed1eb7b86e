"""Sounds or videos of a source (see `clip_files`) ⇒ samples of one shape.

Shape legend: (C, *S) sample: (1, L) sound, (1, B, T) spectrogram of it, (C, F, H, W) video.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from selftrans.data.sources.clip_files import kind_of, open_files
from selftrans.data.sources.decode import STANDARD, BadSample, Reading, unreadable
from selftrans.data.sources.source import Samples, Source
from selftrans.encoders.media import Media, rounded
from selftrans.messages import first_line
from selftrans.plain_json import Option

MEASURED = 1000  #: clips from which mean and deviation are computed, spread evenly over the source


@dataclass(frozen=True)
class MediaOptions:
    """How sounds and videos are read; None: the default that `selftrans prepare --help` names."""

    audio: Literal["waveform", "mel"] | None = None
    rate: int | None = None  #: samples per second
    length: float | None = None  #: seconds
    bins: int | None = None  #: mel bands
    hop: int | None = None  #: samples between two frames of a spectrogram
    frames: int | None = None  #: of a video
    grey: bool = False  #: one channel

    def given(self) -> dict[str, Option]:
        """The options that were set, by name."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None and value is not False}

    def refuse(self, names: str, what: str) -> None:
        """Raise ValueError when one of these options was set."""
        for name in names.split():
            if name in self.given():
                raise ValueError(f"--{name} does not apply to {what}; leave it out")


@dataclass(frozen=True, eq=False)
class Clips(Samples):
    """Sounds or videos of one shape; made by `Clips.of`."""

    source: Source = field(repr=False)  #: the files
    shape: tuple[int, ...]  #: (C, *S) of a sample
    media: Media  #: what the samples are; not yet normalised
    load: Callable[[str, BinaryIO], np.ndarray] = field(repr=False)  #: name and content of a file ⇒ (C, *S) float32
    remarks: tuple[str, ...] = ()  #: sentences on what is cut or padded

    @classmethod
    def of(cls, source: Source, *given: Any) -> Clips:
        """The clips of these files, with their labels; `given`: the other fields in their order."""
        return cls(source, *given, **{each.name: getattr(source, each.name) for each in fields(Samples)})

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def name(self, i: int) -> str:
        return self.source.name(i)

    def read(self, i: int) -> np.ndarray:
        """Sample i: (C, *S) float32. Raises BadSample for a file that cannot be decoded, is too short or not finite."""
        name = self.name(i)
        if i in self.faults:
            raise BadSample(name, self.faults[i])
        try:
            with self.source.open(i) as stream:
                values = self.load(name, stream)
            if not np.isfinite(values).all():
                raise ValueError("NaN or infinite")
        except Exception as error:  # decoders raise any type on a damaged file
            raise unreadable(name, error, "sound" if self.media.suffix == ".wav" else "video") from error
        assert values.shape == self.shape, "every sample must have the shape of the source"
        return values

    def normalised(self) -> Media:
        """The kind of data, with the shift and scale that give zero mean and unit variance."""
        total, squares, count = 0.0, 0.0, 0
        for i in np.unique(np.linspace(0, len(self) - 1, min(len(self), MEASURED)).astype(int)):
            try:
                values = self.read(int(i)).astype(np.float64)
            except BadSample:  # reported when it is prepared
                continue
            total, squares, count = total + values.sum(), squares + (values**2).sum(), count + values.size
        mean = total / max(1, count)
        deviation = math.sqrt(max(0.0, squares / max(1, count) - mean**2))
        numbers: Any = {"shift": rounded(mean), "scale": rounded(1 / deviation) if deviation > 1e-6 else 1.0}
        return replace(self.media, **numbers)


def missing(what: str, module: str, error: Exception) -> ValueError:
    """The error for a module of the extra `media` that cannot be imported; `what`: the data that it reads."""
    reason = first_line(error, 100)
    return ValueError(
        f"{what} are read by {module}, which cannot be imported ({reason}): pip install 'selftrans[media]'"
    )


def open_clips(
    source: str | Path,
    options: MediaOptions,
    resolution: Any = None,
    progress: bool = False,
    *,
    archives: bool = True,
    split: str | None = None,
    reading: Reading = STANDARD,
) -> Clips | None:
    """Open a folder, zip or tar of sounds or videos (see `kind_of`, also for `archives`); None for any other source.

    `split` names a part of it. `reading` is used for empty class folders, the file of labels and the limit of pixels.
    Raises ValueError for a source with several kinds, options of another kind, and clips that need an option.
    """
    from selftrans.data.sources import audio, video

    root = Path(source)
    kind = kind_of(root, options.frames, archives=archives)
    if kind not in ("sounds", "videos"):
        options.refuse("audio rate length bins hop frames grey", f"{source}, which holds no sounds or videos")
        return None
    files = open_files(root, kind, options.frames, split, reading)
    if kind == "sounds":
        options.refuse("frames grey", "sounds")
        if resolution is not None:
            raise ValueError("--resolution does not apply to sounds; leave it out")
        return audio.open_sounds(files, root, options, progress)
    options.refuse("audio rate length bins hop", "videos")
    return video.open_videos(files, root, options, resolution, reading.max_pixels)
