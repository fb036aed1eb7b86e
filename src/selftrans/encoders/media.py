"""Sound and video as arrays: how they are normalised, turned back into values, and written as files to listen to or watch.

Each kind is an autoencoder without a network. Its name holds all its numbers, such as
`mel(rate=8000,bins=32,hop=128,shift=-9.2,scale=0.4)`, so that a manifest or a weights file records it as any other name.
Shape legend: N batch, L samples of a sound, B mel bands, T frames of a spectrogram, F frames of a video, C 1 (grey) or 3.
"""

from __future__ import annotations

import math
import re
import wave
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import IO, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from selftrans.encoders.latent_space import LatentSpace, Moments
from selftrans.messages import printable

FLOOR = 1e-7  #: least power of a mel band before the logarithm
WINDOW = 4  #: length of the analysis window, in hops
ROUNDS = 32  #: of Griffin and Lim's algorithm
MOST = 1 << 20  #: largest whole number in a name


@dataclass(frozen=True)
class Media:
    """Values (N, C, *S) of any range; latents are (values - shift) * scale, of about zero mean and unit variance."""

    kind: ClassVar[str]
    suffix: ClassVar[str]  #: of the file that `write_view` writes
    pictures: ClassVar[bool] = False
    channels: ClassVar[int] = 0
    downsample: ClassVar[int] = 1

    @property
    def name(self) -> str:
        """As manifests and weights files record it; `parse_media` reads it."""
        values = ",".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))
        return f"{self.kind}({values})"

    @property
    def latent_space(self) -> LatentSpace:
        shift, scale = (float(getattr(self, name)) for name in ("shift", "scale"))
        return LatentSpace(shift, scale, stochastic=False)

    def encode(self, pixels: Tensor) -> Moments:
        """Values as they are: the latent space normalises them when they are read."""
        return Moments(pixels.float(), None)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, C, *S) to values of the original range."""
        return self.latent_space.unscale(latents)

    def write_view(self, file: IO[bytes], sample: np.ndarray) -> None:
        """Write a sample, float32 (C, *S), as a sound or a moving picture."""
        raise NotImplementedError


@dataclass(frozen=True)
class Waveform(Media):
    """Sound as its samples (1, L) in [-1, 1]."""

    kind, suffix = "waveform", ".wav"

    rate: int  #: samples per second
    shift: float = 0.0
    scale: float = 1.0

    def write_view(self, file: IO[bytes], sample: np.ndarray) -> None:
        write_wav(file, sample[0], self.rate)


@dataclass(frozen=True)
class Mel(Media):
    """Sound as the natural logarithm of its power in mel bands (1, B, T), the lowest band first.

    Hann window of four hops, power spectrum scaled so that a sine of amplitude a has a peak of a² / 4, triangular bands of
    equal width on the mel scale 2595 log10(1 + f / 700) from 0 to half the rate.
    """

    kind, suffix = "mel", ".wav"

    rate: int  #: samples per second
    bins: int  #: B, mel bands
    hop: int  #: samples between two frames
    shift: float = 0.0
    scale: float = 1.0

    def frames(self, samples: int) -> int:
        """T of a sound of so many samples."""
        return samples // self.hop

    def forward(self, sound: np.ndarray) -> np.ndarray:
        """Sound (L,) to log-mel (1, B, T) float32, T = L // hop."""
        spectrum = self._stft(torch.from_numpy(np.ascontiguousarray(sound, dtype=np.float32)))
        power = spectrum[:, : self.frames(len(sound))].abs().square()
        return (self.bands() @ power).clamp(min=FLOOR).log()[None].numpy()

    def inverse(self, mel: np.ndarray) -> np.ndarray:
        """Log-mel (1, B, T) to a sound (T hop,) float32 that has about this spectrogram: Griffin and Lim (1984)."""
        frames = mel.shape[-1]
        power = torch.linalg.pinv(self.bands()) @ torch.from_numpy(np.minimum(mel[0], 20.0).astype(np.float32)).exp()
        size = power.clamp(min=0).sqrt()
        size = torch.cat([size, size[:, -1:]], dim=1)  # the frame that `forward` leaves out
        angle = torch.rand(size.shape, generator=torch.Generator().manual_seed(0)) * (2 * math.pi)
        sound = self._istft(torch.polar(size, angle), frames * self.hop)
        for _ in range(ROUNDS):
            sound = self._istft(torch.polar(size, self._stft(sound).angle()), frames * self.hop)
        return sound.numpy()

    def bands(self) -> Tensor:
        """The filters (B, W / 2 + 1) of a window of W samples. Raises ValueError when one of them holds no frequency."""
        return mel_bands(self.rate, self.bins, WINDOW * self.hop)

    def write_view(self, file: IO[bytes], sample: np.ndarray) -> None:
        sound = self.inverse(sample)
        write_wav(file, sound / max(1.0, float(np.abs(sound).max(initial=0))), self.rate)

    def _stft(self, sound: Tensor) -> Tensor:
        window = torch.hann_window(WINDOW * self.hop)
        spectrum = torch.stft(sound, len(window), self.hop, window=window, pad_mode="constant", return_complex=True)
        return spectrum / window.sum()

    def _istft(self, spectrum: Tensor, samples: int) -> Tensor:
        window = torch.hann_window(WINDOW * self.hop)
        return torch.istft(spectrum * window.sum(), len(window), self.hop, window=window, length=samples)


@dataclass(frozen=True)
class Video(Media):
    """Frames (C, F, H, W) in [-1, 1], grey or RGB."""

    kind, suffix = "video", ".gif"

    fps: float  #: frames per second of the files that are written
    shift: float = 0.0
    scale: float = 1.0

    def write_view(self, file: IO[bytes], sample: np.ndarray) -> None:
        from PIL import Image

        frames = np.rint(np.clip(sample, -1, 1) * 127.5 + 127.5).astype(np.uint8).transpose(1, 2, 3, 0)  # (F, H, W, C)
        first, *rest = [Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in frames]
        duration = max(20, round(1000 / self.fps))  # milliseconds; players slow down what is shorter
        first.save(file, format="GIF", save_all=True, append_images=rest, duration=duration, loop=0)


KINDS: dict[str, type[Media]] = {"waveform": Waveform, "mel": Mel, "video": Video}


def is_media(name: str) -> bool:
    """Whether this is the name of a kind of sound or video with its numbers in brackets."""
    return name.endswith(")") and name.partition("(")[0] in KINDS


def parse_media(name: str) -> Media:
    """The inverse of `Media.name`. Raises ValueError for missing, unknown or impossible numbers."""
    kind, _, text = name.removesuffix(")").partition("(")
    try:
        if not is_media(name):
            raise ValueError(f"it is none of {', '.join(KINDS)}, with numbers in brackets")
        given = dict(_pair(item) for item in text.split(","))
        types = {field.name: field.type for field in fields(KINDS[kind])}
        if given.keys() != types.keys():
            raise ValueError(f"it needs {', '.join(types)}")
        return KINDS[kind](**{key: _number(key, given[key], str(types[key])) for key in types})
    except ValueError as error:
        raise ValueError(f"autoencoder {printable(name, 200)!r} cannot be read ({error})") from None


def _pair(item: str) -> tuple[str, str]:
    match = re.fullmatch(r"(\w{1,20})=([\w.+-]{1,40})", item)
    if match is None:
        raise ValueError("it is not kind(name=number,...)")
    return match[1], match[2]


def _number(key: str, text: str, kind: str) -> Any:
    value = int(text) if kind == "int" else float(text)
    positive = key not in ("shift", "scale")
    if not math.isfinite(value) or abs(value) > MOST or (positive and value <= 0) or (key == "scale" and value == 0):
        raise ValueError(f"{key} is {text}")
    return value


def rounded(value: float) -> float:
    """Six significant digits, so that names stay short."""
    return float(f"{value:.6g}")


@lru_cache(maxsize=8)
def mel_bands(rate: int, bins: int, window: int) -> Tensor:
    """Triangular filters (bins, window / 2 + 1) on the mel scale. Raises ValueError when one of them holds no frequency."""
    mel = np.linspace(0, 2595 * math.log10(1 + rate / 2 / 700), bins + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)  # Hz
    hertz = np.arange(window // 2 + 1) * (rate / window)
    rise = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
    bands = np.maximum(0, np.minimum(rise, fall))
    if not bands.sum(axis=1).all():
        raise ValueError(
            f"{bins} mel bands are too many for windows of {window} samples; give fewer, or a larger --hop"
        )
    return torch.from_numpy(bands.astype(np.float32))


def write_wav(file: IO[bytes], sound: np.ndarray, rate: int) -> None:
    """Write a sound (L,) as a WAV of 16 bits; what is outside [-1, 1] is clipped."""
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(np.rint(np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
