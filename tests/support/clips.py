"""Small sounds and videos for tests: sines, and squares that move, in class folders."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image


def sine(hertz: float, seconds: float = 0.25, rate: int = 8000, amplitude: float = 0.5) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def save_sound(path: Path, sound: np.ndarray, rate: int = 8000, subtype: str = "PCM_16") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound, rate, subtype=subtype)
    return path


def sounds(root: Path, count: int = 6, seconds: float = 0.25) -> Path:
    """`high/0.wav`, `low/1.wav`, ...: sines around 2,000 and 500 Hz at 8,000 samples per second."""
    for i in range(count):
        name, base = ("low", 500) if i % 2 else ("high", 2000)
        save_sound(root / name / f"{i}.wav", sine(base + 20 * i, seconds))
    return root


def moving(seed: int, frames: int = 6, height: int = 16, width: int = 16) -> np.ndarray:
    """A square that moves to the right on black, uint8 (frames, height, width)."""
    top = np.random.default_rng(seed).integers(0, height - 4)
    video = np.zeros((frames, height, width), np.uint8)
    for k in range(frames):
        video[k, top : top + 4, k : k + 4] = 200
    return video


def save_gif(path: Path, video: np.ndarray, duration: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = [Image.fromarray(frame) for frame in video]
    first.save(path, save_all=True, append_images=rest, duration=duration, loop=0)
    return path


def save_mp4(path: Path, video: np.ndarray, rate: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as out:
        stream = out.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = video.shape[1:]
        stream.bit_rate = 4_000_000
        for frame in video:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.repeat(frame[..., None], 3, axis=-1))))
        out.mux(stream.encode())
    return path
