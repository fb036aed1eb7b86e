"""Video files (mp4, webm, mov, mkv, avi, animated gif) ⇒ the first frames, cropped and resized as pictures are.

Gifs are decoded by Pillow, the others by PyAV (extra `selftrans[media]`): the demuxer follows from the extension, never from
the content, so that no file can name other files or addresses to be read. Shape legend: (C, F, H, W) video.
"""

from __future__ import annotations

import io
import math
from collections.abc import Generator
from contextlib import closing
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from selftrans.data.resolution import Resolution, check_range, sides, size_text
from selftrans.data.sources.clips import GIF, Clips, MediaOptions, importing
from selftrans.data.sources.decode import MAX_PIXELS, STANDARD, Reading, check_pixels, open_picture, to_array
from selftrans.data.sources.source import Source, readable
from selftrans.encoders.media import Video, rounded

if TYPE_CHECKING:
    from PIL import Image

#: extension -> demuxer of FFmpeg
DEMUXERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".webm": "webm", ".mkv": "matroska", ".avi": "avi"}
FPS = 10.0  #: frames per second where a file does not give them
MAX_FRAMES = 1 << 14
MAX_VALUES = 1 << 30  #: of one sample, held as float32


def open_videos(
    files: Source, where: Path, options: MediaOptions, resolution: Resolution | None, reading: Reading = STANDARD
) -> Clips:
    """The first `options.frames` frames of each video, at `resolution` (None: the size of the first, which all must have).

    `reading`: the limit of pixels of a frame, and whether frames are grey. Raises ValueError without a number of frames, and
    when no video can be read.
    """
    if any(_suffix(name) != GIF for name in files.names):
        pyav()
    frames = options.frames
    if frames is None or not 1 <= frames <= MAX_FRAMES:
        raise ValueError(
            f"{where} holds videos: give --frames, how many are read from the start of each (1 to {MAX_FRAMES})"
        )
    if resolution is not None:
        check_range(resolution)
    most = reading.max_pixels
    first, fps = _first(files, where, most)
    channels, size = 1 if reading.grey else 3, first if resolution is None else sides(resolution)
    if (values := channels * frames * math.prod(size)) > MAX_VALUES:
        raise ValueError(
            f"--frames {frames} of {size_text(size)} are {values:,} values, more than {MAX_VALUES:,}; give fewer, or a smaller "
            "--resolution"
        )

    def load(name: str, stream: BinaryIO) -> np.ndarray:
        with closing(iter_frames(name, stream, most)) as shown:
            pictures = list(islice(shown, frames))
        if len(pictures) < frames:
            raise ValueError(f"its length is {len(pictures)}, less than --frames {frames}")
        if resolution is None and (pictures[0].height, pictures[0].width) != first:
            raise ValueError(
                f"it is {pictures[0].height}x{pictures[0].width}, the first {size_text(first)}; give --resolution"
            )
        array = np.stack([to_array(picture, size, channels) for picture in pictures])  # (F, H, W, C)
        return array.transpose(3, 0, 1, 2).astype(np.float32) / 127.5 - 1

    return Clips.of(files, (channels, frames, *size), load, "video", Video(fps))


def pyav() -> Any:
    """The library. Raises ValueError with the command that installs it."""
    with importing("av", "videos"):
        import av
    return av


def iter_frames(name: str, stream: BinaryIO, most: int = MAX_PIXELS) -> Generator[Image.Image]:
    """The frames of a video in order. Raises ValueError for one that is too large, and what the decoder raises."""
    return _gif_frames(stream, most) if _suffix(name) == GIF else _av_frames(name, stream, most)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _gif(stream: BinaryIO, most: int) -> Image.Image:
    """The gif in a stream, which stays open when the picture is closed. Raises ValueError for one that is too large."""
    stream.seek(0)
    image = open_picture(io.BytesIO(stream.read()))
    check_pixels(image.size, most)
    return image


def _gif_frames(stream: BinaryIO, most: int) -> Generator[Image.Image]:
    """The frames of a gif, RGB. Where all durations are multiples of the shortest one, longer frames are repeated: programs
    that write gifs merge equal frames."""
    durations = _gif_durations(stream, most)
    shortest = min(durations)
    merged = shortest > 0 and not any(duration % shortest for duration in durations)
    with _gif(stream, most) as image:
        for k, duration in enumerate(durations):
            image.seek(k)
            frame = image.convert("RGB")
            for _ in range(duration // shortest if merged else 1):
                yield frame


def _gif_durations(stream: BinaryIO, most: int) -> list[int]:
    """Milliseconds of each frame, of the first MAX_FRAMES at most; 0 where the file does not give it."""
    with _gif(stream, most) as image:
        durations = []
        for k in range(min(MAX_FRAMES, getattr(image, "n_frames", 1))):
            image.seek(k)
            durations.append(int(image.info.get("duration", 0)))
    return durations


def _av_frames(name: str, stream: BinaryIO, most: int) -> Generator[Image.Image]:
    with pyav().open(stream, format=DEMUXERS[_suffix(name)]) as container:
        if not container.streams.video:
            raise ValueError("it holds no video")
        video = container.streams.video[0]
        check_pixels((video.width, video.height), most)
        for frame in container.decode(video):
            turn = int(frame.rotation) % 360  # degrees counterclockwise, which phones record in the header
            yield frame.to_image().rotate(turn, expand=True) if turn else frame.to_image()


def _first(files: Source, where: Path, most: int) -> tuple[tuple[int, int], float]:
    """(height, width) and frames per second of the first video that can be read. Raises ValueError when none can."""

    def read(i: int) -> tuple[tuple[int, int], float]:
        with files.open(i) as stream:
            with closing(iter_frames(files.names[i], stream, most)) as shown:
                picture = next(shown, None)
            if picture is None:
                raise ValueError("it has no frames")
            return (picture.height, picture.width), rounded(_fps(files.names[i], stream, most))

    return next(readable(files, read, "video", where))[1]


def _fps(name: str, stream: BinaryIO, most: int) -> float:
    """Frames per second as the file says, or a default."""
    if _suffix(name) == GIF:
        duration = min(_gif_durations(stream, most))
        return 1000 / duration if duration else FPS
    stream.seek(0)
    with pyav().open(stream, format=DEMUXERS[_suffix(name)]) as container:
        rate = float(container.streams.video[0].average_rate or 0)
    return rate if 0 < rate <= 1000 else FPS
