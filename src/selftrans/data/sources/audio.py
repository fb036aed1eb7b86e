"""Sound files (wav, flac) ⇒ mono sounds of one rate and length, as samples or as a log-mel spectrogram.

Decoded by soundfile (extra `selftrans[media]`). Shape legend: (L,) sound, (1, L) samples, (1, B, T) spectrogram.
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from selftrans.data.sources.clips import Clips, MediaOptions, importing
from selftrans.data.sources.source import Source, readable
from selftrans.encoders.media import Mel, Waveform
from selftrans.messages import are, plural
from selftrans.progress import progress_bar

MAX_RATE = 1_000_000  #: samples per second
MAX_BINS, MAX_HOP = 4096, 1 << 16  #: of a spectrogram
MAX_SAMPLES = 1 << 27  #: of one sound after resampling
FORMATS = {"FLAC", "RF64", "WAV", "WAVEX"}
BINS, HOP = 64, 0.016  #: defaults of a spectrogram: mel bands, and seconds between two frames


class Header(NamedTuple):
    """What a sound file says about itself."""

    samples: int
    rate: int  #: per second

    @property
    def seconds(self) -> float:
        return self.samples / self.rate


def soundfile() -> Any:
    """The library. Raises ValueError with the command that installs it."""
    with importing("soundfile", "sounds"):
        import soundfile
    return soundfile


def open_sounds(files: Source, where: Path, options: MediaOptions, progress: bool) -> Clips:
    """Sounds at one rate and length; an option that is not given takes the value that all files share.

    Raises ValueError when the files differ in what is not given, and for a spectrogram that cannot be made.
    """
    soundfile()
    headers = _headers(files, where, progress)
    rate, length = options.rate, options.length
    if rate is None:
        rate = _common(headers, "rate", "samples per second", "--rate")
    if length is None:
        length = _common(headers, "seconds", "seconds", "--length")
    samples = round(min(length, MAX_SAMPLES) * rate) if length > 0 else 0  # 0 for NaN, too
    if not 1 <= rate <= MAX_RATE or not 1 <= samples <= MAX_SAMPLES:
        raise ValueError(
            f"--rate {rate} and --length {length:g} give {samples} samples; 1 to {MAX_SAMPLES} can be read"
        )

    def load(_: str, stream: BinaryIO) -> np.ndarray:
        return fit(read_sound(stream, rate, samples), samples)

    remarks = _remarks(headers, samples / rate)
    if options.audio != "mel":
        options.refuse("waveforms (--audio mel makes spectrograms)", "bins", "hop")
        return Clips.of(files, (1, samples), lambda *file: load(*file)[None], "sound", Waveform(rate), remarks)
    hop = max(1, round(HOP * rate)) if options.hop is None else options.hop
    mel = Mel(rate, BINS if options.bins is None else options.bins, hop)
    if not 1 <= mel.bins <= MAX_BINS or not 1 <= mel.hop <= MAX_HOP:
        raise ValueError(f"--bins {mel.bins} and --hop {mel.hop} should be 1 to {MAX_BINS} and 1 to {MAX_HOP}")
    if not mel.frames(samples):
        raise ValueError(f"sounds of {samples} samples are shorter than --hop {mel.hop}; give a smaller one")
    mel.bands()
    shape = (1, mel.bins, mel.frames(samples))
    return Clips.of(files, shape, lambda *file: mel.forward(load(*file)), "sound", mel, remarks)


def read_sound(stream: BinaryIO, rate: int, most: int) -> np.ndarray:
    """The beginning of a sound, float32 (n,), n about `most` or less: channels averaged, resampled to `rate`.

    Raises ValueError for a file that is empty, truncated or in another format, and what soundfile raises.
    """
    from scipy.signal import resample_poly

    _check_size(stream)
    try:
        opened = soundfile().SoundFile(stream)
    except soundfile().LibsndfileError as error:  # its text names the stream, with its address in memory
        raise ValueError(error.error_string) from error
    with opened as file:
        if file.format not in FORMATS:
            raise ValueError(f"it is {file.format}, not wav or flac")
        if not file.frames:
            raise ValueError("it holds no sound")
        if file.samplerate > MAX_RATE:
            raise ValueError(f"it claims {file.samplerate} samples per second")
        wanted = min(file.frames, math.ceil(most * file.samplerate / rate) + file.samplerate // 100 + 1)
        values = file.read(wanted, dtype="float32", always_2d=True)
        if len(values) < wanted:
            raise ValueError(f"truncated: {len(values)} of {wanted} samples")
        common = math.gcd(rate, file.samplerate)
        up, down = rate // common, file.samplerate // common
    sound = values.mean(axis=1)
    return sound if up == down else resample_poly(sound, up, down).astype(np.float32)


def fit(sound: np.ndarray, samples: int) -> np.ndarray:
    """The sound cut at the end, or padded with zeros there: (samples,)."""
    return np.pad(sound[:samples], (0, max(0, samples - len(sound))))


def _check_size(stream: BinaryIO) -> None:
    """Raise ValueError for a wav that is shorter than its header says: soundfile reads the rest without an error."""
    size = stream.seek(0, os.SEEK_END)
    if not size:
        raise ValueError("the file is empty")
    stream.seek(0)
    start = stream.read(12)
    stream.seek(0)
    if start[:4] == b"RIFF" and len(start) == 12:
        claimed = struct.unpack("<I", start[4:8])[0] + 8
        if claimed not in (8, 0xFFFFFFFF + 8) and claimed > size + 1:  # these two mean that the length is unknown
            raise ValueError(f"truncated: {size} of {claimed} bytes")


def _headers(files: Source, where: Path, progress: bool) -> list[Header]:
    """The headers of the files that can be opened; the others are reported when they are read."""

    def header(i: int) -> Header:
        with files.open(i) as stream:
            _check_size(stream)
            info = soundfile().info(stream)
        if not (info.frames > 0 and 0 < info.samplerate <= MAX_RATE):
            raise ValueError(f"it claims {info.frames} samples, {info.samplerate} per second")
        return Header(info.frames, info.samplerate)

    bar = progress_bar(range(len(files)), desc="lengths", unit=" sounds", disable=not progress, leave=False)
    return [found for _, found in readable(files, header, "sound", where, bar)]


def _common(headers: list[Header], name: str, unit: str, option: str) -> Any:
    """The value that all headers share. Raises ValueError when they differ."""
    values = [getattr(header, name) for header in headers]
    low, high = min(values), max(values)
    if low != high:
        raise ValueError(f"the sounds have {low:.6g} to {high:.6g} {unit}; choose one value with {option}")
    return low


def _remarks(headers: list[Header], seconds: float) -> tuple[str, ...]:
    """How many sounds are cut, padded or resampled."""
    tolerance = 0.5 / min(header.rate for header in headers)
    counts = Counter(
        "cut at the end" if header.seconds > seconds + tolerance else "padded with zeros at the end"
        for header in headers
        if abs(header.seconds - seconds) > tolerance
    )
    every = plural(len(headers), "sound")
    return tuple(f"{count:,} of {every} {are(count)} {what}: --length {seconds:g}" for what, count in counts.items())
