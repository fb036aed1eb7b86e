"""What is noticed while pictures are decoded is counted, and said once with an example."""

from __future__ import annotations

import io
import warnings
import wave
from pathlib import Path

import numpy as np
import pytest

from selftrans.data.prepare import prepare
from selftrans.data.sources.clips import MediaOptions
from selftrans.data.sources.open_source import open_source
from tests.support.pictures import encoded, noise, write


@pytest.mark.parametrize(
    ("shape", "enlarged"), [((8, 8), True), ((16, 16), False), ((99, 15), True), ((1, 4000), True), ((99, 16), False)]
)
def test_pictures_with_fewer_pixels_than_asked_for_are_said(
    tmp_path: Path, shape: tuple[int, int], enlarged: bool
) -> None:
    files = {"a.png": encoded(np.zeros((*shape, 3), np.uint8)), "b.png": encoded(noise(32))}
    source = open_source(write(tmp_path / "x", files), resolution=16)
    assert source.read(0).shape == source.read(1).shape == (16, 16, 3)
    size = f"{shape[0]}x{shape[1]} to 16x16"
    assert source.read_warnings.sentences() == (
        [f"1 picture is smaller than the size asked for and is enlarged, such as a.png ({size})"] if enlarged else []
    )


def test_prepare_counts_blank_pictures_and_silent_sounds(tmp_path: Path) -> None:
    plain = np.zeros((8, 8, 3), np.uint8)
    pictures = {"0.png": encoded(noise(8)), "1.png": encoded(plain), "2.png": encoded(plain + np.uint8([200, 0, 9]))}
    said = r"2 pictures are of one value throughout \(blank, or silent\), such as 1.png; leave"
    with pytest.warns(UserWarning, match=said) as caught:
        prepare(write(tmp_path / "x", pictures), tmp_path / "pictures", batch_size=2, progress=False)
    assert len(caught) == 1
    sounds = {f"{k}.wav": sound(level) for k, level in enumerate([0, 900, 0])}
    with pytest.warns(UserWarning, match=r"2 samples are of one value throughout .*, such as 0.wav"):
        prepare(write(tmp_path / "y", sounds), tmp_path / "sounds", media=MediaOptions("waveform"), progress=False)


def sound(level: int) -> bytes:
    """A second of a WAV file with a tone this loud."""
    file = io.BytesIO()
    with wave.open(file, "wb") as opened:
        opened.setparams((1, 2, 800, 0, "NONE", ""))
        opened.writeframes((level * np.sin(np.arange(800))).astype("<i2").tobytes())
    return file.getvalue()


def test_prepare_says_enlarged_pictures_once(tmp_path: Path) -> None:
    source = write(tmp_path / "x", {f"{k}.png": encoded(noise(8, k)) for k in range(3)})
    said = "3 pictures are smaller than the size asked for and are enlarged, such as [012].png"
    with pytest.warns(UserWarning, match=said) as caught:
        prepare(source, tmp_path / "data", resolution=(8, 9), batch_size=3, progress=False)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(source, tmp_path / "same", progress=False)
