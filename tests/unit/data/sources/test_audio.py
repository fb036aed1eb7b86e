"""Sounds: rates, lengths and channels are made one; damaged files are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from selftrans.cli.main import main
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import decoded_images
from selftrans.data.prepare import prepare
from selftrans.data.sources.audio import read_sound
from selftrans.data.sources.clips import MediaOptions, open_clips
from selftrans.train.batches import Stream, to_batch
from tests.support.clips import save_sound, sine, sounds
from tests.support.pictures import contents, encoded, noise, stopped_after, write


def test_stored_waveforms_are_normalised_and_decode_to_the_files(tmp_path: Path) -> None:
    root = sounds(tmp_path / "x", 6, 0.02)
    manifest = prepare(root, tmp_path / "out", progress=False)
    assert manifest.shape == (1, 160) and manifest.classes == ("high", "low") and manifest.dtype == "float32"
    assert manifest.autoencoder.startswith("waveform(rate=8000,shift=") and manifest.unit == "samples"
    dataset = Dataset.open(tmp_path / "out", verify=True)
    images = np.concatenate(list(decoded_images(dataset, device="cpu")))
    names = ["high/0", "high/2", "high/4", "low/1", "low/3", "low/5"]
    expected = [sine(500 + 20 * int(n[-1]) if "low" in n else 2000 + 20 * int(n[-1]), 0.02) for n in names]
    np.testing.assert_allclose(images[:, 0], expected, atol=2**-14)
    batch = to_batch(
        next(Stream(dataset, batch_size=6, accumulate=1, seed=0).from_step(0)), dataset, torch.device("cpu")
    )
    assert batch.z0.mean().abs() < 1e-3 and abs(batch.z0.std(correction=0) - 1) < 1e-3


def test_rates_lengths_and_channels_become_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_sound(tmp_path / "x" / "a.wav", np.stack([sine(300, 0.5, 16000), -sine(300, 0.5, 16000)], axis=1), 16000)
    save_sound(tmp_path / "x" / "b.flac", sine(300, 0.1, 8000))
    save_sound(tmp_path / "x" / "c.wav", sine(300, 0.5, 11025), 11025, "FLOAT")
    for option, text in (("rate", "8000 to 16000 samples per second"), ("length", "0.1 to 0.5 seconds")):
        with pytest.raises(ValueError, match=f"^the sounds have {text}; choose one value with --{option}$"):
            open_clips(tmp_path / "x", MediaOptions(rate=None if option == "rate" else 8000))
    clips = open_clips(tmp_path / "x", MediaOptions(rate=8000, length=0.25))
    assert clips is not None and clips.shape == (1, 2000)
    assert np.abs(clips.read(0)).max() < 2**-14, "channels are averaged"
    np.testing.assert_allclose(clips.read(1)[0], np.pad(sine(300, 0.1), (0, 1200)), atol=2**-14)
    inner = slice(50, 1950)
    np.testing.assert_allclose(clips.read(2)[0, inner], sine(300, 0.25)[inner], atol=0.01)  # resampled from 11,025
    prepare(tmp_path / "x", tmp_path / "out", media=MediaOptions(rate=8000, length=0.25))
    error = capsys.readouterr().err
    assert "2 of 3 sounds are cut at the end: --length 0.25" in error
    assert "1 of 3 sounds is padded with zeros at the end: --length 0.25" in error


def test_spectrograms_show_the_pitch(tmp_path: Path) -> None:
    root = sounds(tmp_path / "x", 4)
    options = MediaOptions(audio="mel", bins=32, hop=100)
    manifest = prepare(root, tmp_path / "out", media=options, progress=False)
    assert manifest.shape == (1, 32, 20) and manifest.autoencoder.startswith("mel(rate=8000,bins=32,hop=100,")
    images = np.concatenate(list(decoded_images(Dataset.open(tmp_path / "out"), device="cpu")))
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 34) / 2595) - 1)
    for image, hertz in zip(images, (2000, 2040, 520, 560), strict=True):
        band = int(image[0, :, 10].argmax())
        assert edges[band] < hertz < edges[band + 2]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("half", lambda good: good[: len(good) // 2], "truncated: 2022 of 4044 bytes"),
        ("none", lambda good: b"", "the file is empty"),
        ("text", lambda good: b"not a sound" * 9, "Format not recognised"),
    ],
)
def test_damaged_files_stop_or_are_skipped(tmp_path: Path, name: str, data, reason: str) -> None:
    root = sounds(tmp_path / "x", 4)
    good = (root / "low" / "1.wav").read_bytes()
    (root / "low" / f"{name}.wav").write_bytes(data(good))
    with pytest.raises(ValueError, match=rf"^low/{name}.wav: cannot be read as a sound \(.*{reason}.*--skip-bad$"):
        prepare(root, tmp_path / "out", progress=False)
    manifest = prepare(root, tmp_path / "out", skip_bad=True, progress=False)
    ((skipped, why),) = manifest.skipped
    assert manifest.count == 4 and skipped == f"low/{name}.wav"
    assert "0x" not in why and "<" not in why  # no address in memory: the manifest would differ from run to run


def test_sounds_without_samples_and_with_nan_are_named(tmp_path: Path) -> None:
    root = sounds(tmp_path / "x", 2, 0.02)
    save_sound(root / "low" / "empty.wav", np.zeros(0, np.float32))
    save_sound(root / "low" / "nan.wav", np.full(160, np.nan, np.float32), subtype="FLOAT")
    manifest = prepare(root, tmp_path / "out", skip_bad=True, progress=False)
    assert dict(manifest.skipped) == {
        "low/empty.wav": "it holds no sound",
        "low/nan.wav": "NaN, infinite, or beyond float32",
    }


def test_truncated_flac_is_named(tmp_path: Path) -> None:
    rough = np.random.default_rng(0).normal(size=8000).astype(np.float32) / 9
    path = save_sound(tmp_path / "a.flac", rough)
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises((ValueError, RuntimeError)):
        read_sound(path.open("rb"), 8000, 8000)


def test_interrupted_and_continued_equals_uninterrupted(tmp_path: Path) -> None:
    root = sounds(tmp_path / "x", 9, 0.02)
    options = {"batch_size": 2, "shard_size": 4, "progress": False, "media": MediaOptions(audio="mel", bins=4, hop=16)}
    prepare(root, tmp_path / "complete", **options)  # type: ignore[arg-type]
    with stopped_after(5):
        prepare(root, tmp_path / "out", **options)  # type: ignore[arg-type]
    prepare(root, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert contents(tmp_path / "out") == contents(tmp_path / "complete")
    with pytest.raises(ValueError, match=r"was prepared with bins 4, not 5; repeat the command as it was"):
        prepare(root, tmp_path / "out", **options | {"media": MediaOptions(audio="mel", bins=5, hop=16)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--flip"], "--flip is for pictures"),
        (["--autoencoder", "owner/vae"], "--autoencoder is for pictures"),
        (["--resolution", "8"], "--resolution does not apply to sounds"),
        (["--frames", "8"], "--frames does not apply to sounds"),
        (["--bins", "8"], "--bins does not apply to waveforms"),
        (["--rate", "0"], "give 0 samples"),
        (["--length", "nan"], "--length nan give 0 samples"),
        (["--length", "1e30"], "samples; 1 to"),
        (["--audio", "mel", "--hop", "1000000"], "--hop 1000000 should be"),
        (["--audio", "mel", "--hop", "0"], "--bins 64 and --hop 0 should be"),
        (["--audio", "mel", "--bins", "0"], "--bins 0 and --hop 128 should be"),
        (["--features", "owner/vit"], "--features is for pictures"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    root = sounds(tmp_path / "x", 2)
    assert main(["prepare", str(root), "--out", str(tmp_path / "out"), *flags]) == 1
    error = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert message in error and not (tmp_path / "out").exists()


def test_a_folder_of_several_kinds_is_refused(tmp_path: Path) -> None:
    root = sounds(tmp_path / "x", 2)
    write(root, {"low/cover.png": encoded(noise())})
    for _ in range(2):
        with pytest.raises(ValueError, match=r"holds .*; keep one kind"):
            prepare(root, tmp_path / "out", progress=False)
        write(
            root, {"aaa/first.png": encoded(noise())}
        )  # found first: then it is a folder of pictures with sounds in it


def test_a_missing_library_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = sounds(tmp_path / "x", 2)
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(ValueError, match=r"sounds are read by soundfile.* pip install 'selftrans\[media\]'$"):
        prepare(root, tmp_path / "out", progress=False)
