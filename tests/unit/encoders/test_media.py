"""Sound and video as arrays: names, mel spectrograms against scipy, and files that people can open."""

from __future__ import annotations

import io
import math
import wave

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.signal import stft

from selftrans.encoders.autoencoder import load_autoencoder
from selftrans.encoders.media import FLOOR, Media, Mel, Video, Waveform, is_media, mel_bands, parse_media
from tests.support.clips import sine

EXAMPLES = [Waveform(8000), Mel(16000, 40, 200, -9.125, 0.25), Video(12.5, shift=0.1, scale=-2.0)]


@pytest.mark.parametrize("media", EXAMPLES, ids=lambda media: media.kind)
def test_media_are_restored_from_their_name(media: Media) -> None:
    assert is_media(media.name) and parse_media(media.name) == media
    loaded = load_autoencoder(media.name)
    assert loaded == media and not loaded.pictures
    values = torch.randn(2, 1, 5) * 3 + 7
    latents = media.latent_space.mean(loaded.encode(values).mean)
    torch.testing.assert_close(latents, (values - media.latent_space.shift) * media.latent_space.scale)  # type: ignore[operator]
    torch.testing.assert_close(loaded.decode(latents), values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("waveform(rate=8000)", "it needs rate, shift, scale"),
        ("waveform(rate=8000,shift=0.0,scale=1.0,more=1)", "it needs rate, shift, scale"),
        ("waveform(rate=0,shift=0.0,scale=1.0)", "rate is 0"),
        ("waveform(rate=9999999999,shift=0.0,scale=1.0)", "rate is 9999999999"),
        ("video(fps=nan,shift=0.0,scale=1.0)", "fps is nan"),
        ("video(fps=8.0,shift=0.0,scale=0.0)", "scale is 0.0"),
        ("mel(rate=8000,bins=2.5,hop=128,shift=0.0,scale=1.0)", "invalid literal for int"),
        ("video(", "no autoencoder"),
        ("video()", "it is not kind"),
    ],
)
def test_other_names_are_refused_in_one_line(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        load_autoencoder(name)
    assert "\n" not in str(caught.value)


def test_spectrogram_equals_scipy() -> None:
    mel, sound = Mel(8000, 20, 64), np.random.default_rng(0).normal(size=1024).astype(np.float32)
    _, _, spectrum = stft(sound, 8000, "hann", 256, 192, boundary="zeros", padded=False)  # scaled by the window's sum
    expected = np.log(np.maximum(mel_bands(8000, 20, 256).numpy() @ np.abs(spectrum[:, :16]) ** 2, FLOOR))
    assert mel.forward(sound).shape == (1, 20, 16) and mel.frames(1024) == 16
    np.testing.assert_allclose(mel.forward(sound)[0], expected, atol=2e-4)


def test_bands_are_triangles_on_the_mel_scale() -> None:
    bands = mel_bands(16000, 30, 1024).numpy()
    centres = bands.argmax(axis=1) * 16000 / 1024
    mels = 2595 * np.log10(1 + centres / 700)
    assert np.ptp(np.diff(mels)[5:]) < 0.2 * np.diff(mels)[5:].mean(), "evenly spaced up to the spacing of the spectrum"
    inner = bands.sum(axis=0)[
        (np.arange(513) * 16000 / 1024 > centres[0]) & (np.arange(513) * 16000 / 1024 < centres[-1])
    ]
    np.testing.assert_allclose(inner, 1, atol=1e-6)  # neighbours add up to one
    with pytest.raises(ValueError, match=r"^200 mel bands are too many .* larger --hop$"):
        mel_bands(8000, 200, 256)


@pytest.mark.parametrize("hertz", [440.0, 1500.0])
def test_inverse_has_the_pitch_and_level_of_the_sound(hertz: float) -> None:
    mel, sound = Mel(8000, 64, 80), sine(hertz, 0.5)
    back = mel.inverse(mel.forward(sound))
    assert back.shape == (4000,)
    spectrum = np.abs(np.fft.rfft(back * np.hanning(4000)))
    assert abs(spectrum.argmax() * 2 - hertz) < 20  # rfft of half a second: 2 Hz between two frequencies
    assert math.sqrt((back**2).mean()) == pytest.approx(0.5 / math.sqrt(2), rel=0.25)


def test_views_are_files_of_other_programs() -> None:
    buffer = io.BytesIO()
    Waveform(8000).write_view(buffer, np.array([[0, 0.5, -1, 2]], np.float32))
    with wave.open(io.BytesIO(buffer.getvalue())) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 8000)
        assert np.frombuffer(file.readframes(9), "<i2").tolist() == [0, 16384, -32767, 32767]
    buffer = io.BytesIO()
    frames = np.linspace(-1.5, 1.5, 5 * 4 * 6, dtype=np.float32).reshape(1, 5, 4, 6)
    Video(8.0).write_view(buffer, frames)
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        assert (image.n_frames, image.size, image.info["duration"]) == (5, (6, 4), 120)  # type: ignore[attr-defined]
        image.seek(4)
        assert np.asarray(image.convert("L")).min() >= 190
    buffer = io.BytesIO()
    Mel(8000, 20, 64).write_view(buffer, np.full((1, 20, 30), 50.0, np.float32))  # a wild sample stays a valid sound
    with wave.open(io.BytesIO(buffer.getvalue())) as file:
        assert file.getnframes() == 30 * 64
