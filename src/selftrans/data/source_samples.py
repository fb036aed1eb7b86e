"""The samples that `prepare` encodes: pictures, sounds, videos or arrays. Options that do not apply to them are refused."""

from __future__ import annotations

import warnings
from pathlib import Path

from selftrans.data import resumable
from selftrans.data.prepare_options import PrepareOptions
from selftrans.data.resolution import check_square
from selftrans.data.sources.clips import kind_of, open_clips
from selftrans.data.sources.npy import npy_values
from selftrans.data.sources.npz import npz_values
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.source import Samples
from selftrans.encoders.identity import identity_kind


def holds_pictures(source: str | Path, given: PrepareOptions) -> bool:
    """Whether a source is read as pictures with these options, not as values, sounds or videos."""
    if identity_kind(given.autoencoder) == "values":
        return False
    return kind_of(Path(source), given.media.frames, archives=not given.text) not in ("sounds", "videos")


def source_samples(source: str | Path, earlier: resumable.Earlier | None, given: PrepareOptions) -> Samples:
    """The samples of a source, with the options of `prepare`; `earlier` is the state of the output folder.

    Pictures are opened at `resolution`; if that is None, at the resolution with which the folder was begun.
    ValueError for a source that cannot be opened, and for an option that does not apply to it.
    """
    media, reading, text, resolution = given.media, given.reading, given.text, given.resolution
    if identity_kind(given.autoencoder) == "values":
        media.refuse("--autoencoder values")
        if wrong := _of_pictures(given, resolution=resolution, grey=reading.grey):
            raise ValueError(f"--{wrong} is for pictures; leave it out with --autoencoder values")
        if given.label_column not in (None, reading.label_column):
            warnings.warn(f"label_column is ignored: {source} is not a table", stacklevel=2)
        if Path(source).is_dir() or Path(source).suffix.lower() in (".zip", ".tar"):
            return npy_values(Path(source), given.split, reading)
        if reading.labels is not None:
            raise ValueError("--labels does not apply to an npz; store the labels in it, as `labels`")
        return npz_values(Path(source))
    archives = text is None
    wrong = _of_pictures(given, autoencoder=given.autoencoder != "pixel")
    if wrong and kind_of(Path(source), media.frames, archives=archives) in ("sounds", "videos"):
        raise ValueError(f"--{wrong} is for pictures; leave it out for sounds and videos")
    clips = open_clips(source, media, resolution, given.progress, archives=archives, split=given.split, reading=reading)
    if clips is not None:
        return clips
    native = earlier.plan.resolution if earlier and earlier.plan.options.get("resolution") is None else None
    opened = open_source(
        source,
        resolution=resolution or native,
        split=given.split,
        label_column=given.label_column,
        captions=text.source if text else None,
        reading=reading,
        progress=given.progress,
    )
    if given.square:
        check_square(opened.resolution)
    return opened


def _of_pictures(given: PrepareOptions, **others: object) -> str | None:
    """The first option that was given and is for pictures alone, these `others` included."""
    options = {**others, "flip": given.flip, "text": given.text, "range": given.reading.range}
    return next((name for name, value in options.items() if value), None)
