"""Videos: the first frames at one size, from gif and mp4; short and damaged files are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from selftrans.cli.main import main
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import decoded_images
from selftrans.data.prepare import prepare
from selftrans.data.sources.clips import MediaOptions, kind_of
from selftrans.data.sources.decode import Reading
from selftrans.data.sources.video import iter_frames
from tests.support.clips import moving, save_gif, save_mp4

FRAMES: dict[str, Any] = {"media": MediaOptions(frames=4), "reading": Reading(grey=True), "progress": False}


def test_frames_of_a_gif_are_stored_exactly(tmp_path: Path) -> None:
    for i in range(4):
        save_gif(tmp_path / "x" / "ab"[i % 2] / f"{i}.gif", moving(i))
    manifest = prepare(tmp_path / "x", tmp_path / "out", **FRAMES)
    assert manifest.shape == (1, 4, 16, 16) and manifest.classes == ("a", "b") and manifest.dtype == "float16"
    assert manifest.autoencoder.startswith("video(fps=10.0,")
    dataset = Dataset.open(tmp_path / "out")
    videos = np.concatenate(list(decoded_images(dataset, device="cpu")))
    assert videos.shape == (4, 1, 4, 16, 16) and videos.dtype == np.float32
    expected = np.stack([moving(i)[:4] for i in (0, 2, 1, 3)])[:, None]
    np.testing.assert_allclose(videos * 127.5 + 127.5, expected, atol=0.1)
    moments = dataset.read(np.arange(4))["moments"][:, 0]
    latents = manifest.latent_space.mean(moments)
    assert abs(float(latents.mean())) < 0.01 and abs(float(latents.std()) - 1) < 0.01


def test_mp4_is_read_by_its_frames(tmp_path: Path) -> None:
    save_mp4(tmp_path / "x" / "0.mp4", moving(1, frames=8, height=32, width=48))
    manifest = prepare(tmp_path / "x", tmp_path / "out", media=MediaOptions(frames=8), progress=False)
    assert manifest.shape == (3, 8, 32, 48) and manifest.autoencoder.startswith("video(fps=12.0,")
    video = next(decoded_images(Dataset.open(tmp_path / "out"), device="cpu"))[0]
    assert np.abs(video * 127.5 + 127.5 - moving(1, frames=8, height=32, width=48)).mean() < 4  # it is compressed
    prepare(tmp_path / "x", tmp_path / "small", media=MediaOptions(frames=2), resolution=(8, 12), progress=False)
    assert Dataset.open(tmp_path / "small").manifest.shape == (3, 2, 8, 12)


#: quarter turns clockwise by which a video is shown -> the matrix (a, b, c, d) of its mp4, x' = a x + c y, y' = b x + d y
TURNED = {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}


@pytest.mark.parametrize("turns", TURNED)
def test_video_of_a_turned_camera_is_read_upright(turns: int, tmp_path: Path) -> None:
    """Phones store frames as the sensor gives them, with the rotation in the header, as EXIF has it of pictures."""
    path = save_mp4(tmp_path / "x" / "0.mp4", moving(1, frames=4, height=32, width=48))
    stored = [np.asarray(frame) for frame in iter_frames(path.name, path.open("rb"))]
    content, (a, b, c, d) = path.read_bytes(), TURNED[turns]
    old, new = (
        b"".join(int(value).to_bytes(4, "big", signed=True) for value in matrix)
        for matrix in (
            (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30),
            (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30),
        )
    )
    at = content.index(old, content.index(b"tkhd"))
    path.write_bytes(content[:at] + new + content[at + len(old) :])
    shown = [np.asarray(frame) for frame in iter_frames(path.name, path.open("rb"))]
    np.testing.assert_array_equal(shown, [np.rot90(frame, -turns) for frame in stored])
    manifest = prepare(tmp_path / "x", tmp_path / "out", media=MediaOptions(frames=4), progress=False)
    assert manifest.shape == ((3, 4, 32, 48) if turns == 2 else (3, 4, 48, 32))


def test_frames_that_a_gif_shows_longer_are_repeated(tmp_path: Path) -> None:
    video = moving(0)[[0, 1, 1, 1, 2, 3]]  # Pillow writes four frames, the second of 300 ms
    path = save_gif(tmp_path / "x" / "0.gif", video)
    with Image.open(path) as image:
        assert image.n_frames == 4  # type: ignore[attr-defined]
    frames = [np.asarray(frame)[..., 0] for frame in iter_frames(path.name, path.open("rb"))]
    np.testing.assert_array_equal(frames, video)
    manifest = prepare(tmp_path / "x", tmp_path / "out", media=MediaOptions(frames=6), progress=False)
    assert manifest.autoencoder.startswith("video(fps=10.0,")


def test_gifs_are_pictures_without_frames(tmp_path: Path) -> None:
    save_gif(tmp_path / "x" / "0.gif", moving(0))
    assert (kind_of(tmp_path / "x", None), kind_of(tmp_path / "x", 4)) == ("pictures", "videos")
    assert kind_of(tmp_path / "x", 0) == "videos", "so that --frames 0 is refused for its value"
    with pytest.warns(UserWarning, match="1 picture is animated"):
        assert prepare(tmp_path / "x", tmp_path / "out", progress=False).shape == (3, 16, 16)


def test_gifs_among_videos_without_frames_are_told_of_the_option(tmp_path: Path) -> None:
    save_gif(tmp_path / "x" / "1.gif", moving(0))
    save_mp4(tmp_path / "x" / "0.mp4", moving(0))
    with pytest.raises(
        ValueError, match=r"such as 1.gif; keep one kind in a source \(gifs are videos with --frames\)$"
    ):
        prepare(tmp_path / "x", tmp_path / "out", progress=False)


def test_short_damaged_and_other_sizes_are_skipped_by_name(tmp_path: Path) -> None:
    root = tmp_path / "x"
    good = save_mp4(root / "a.mp4", moving(0)).read_bytes()
    save_gif(root / "one.gif", moving(0, frames=1))
    save_gif(root / "short.gif", moving(0, frames=3))
    save_gif(root / "wide.gif", moving(0, width=20))
    (root / "cut.mp4").write_bytes(good[: len(good) // 2])
    (root / "cut.gif").write_bytes((root / "wide.gif").read_bytes()[:40])
    (root / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n")  # a playlist is not followed
    with pytest.raises(ValueError, match=r"^cut.gif: cannot be read as a video \(.*--skip-bad$"):
        prepare(root, tmp_path / "out", **FRAMES)
    manifest = prepare(root, tmp_path / "out", skip_bad=True, **FRAMES)
    reasons = dict(manifest.skipped)
    assert manifest.count == 1 and set(reasons) == {
        "cut.gif",
        "cut.mp4",
        "list.mp4",
        "one.gif",
        "short.gif",
        "wide.gif",
    }
    assert reasons["one.gif"] == "its length is 1, less than --frames 4"
    assert reasons["wide.gif"] == "it is 16x20, the first 16x16; give --resolution"
    assert reasons["list.mp4"].startswith("Invalid data"), "without the number of the error"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --frames, how many are read from the start of each"),
        (["--frames", "0"], "give --frames"),
        (["--frames", "4", "--rate", "8000"], "--rate does not apply to videos"),
        (["--frames", "4", "--flip"], "--flip is for pictures"),
        (["--frames", "4", "--resolution", "100000"], "resolution 100000x100000 is not between 1 and 16384"),
        (["--frames", "100", "--resolution", "9000"], "--frames 100 of 9000x9000 are 24,300,000,000 values, more than"),
        (["--frames", "4", "--resolution", "8x"], "resolution '8x' should be a side, as 256, or HEIGHTxWIDTH"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    save_mp4(tmp_path / "x" / "0.mp4", moving(0))
    assert main(["prepare", str(tmp_path / "x"), "--out", str(tmp_path / "out"), *flags]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_options_of_clips_are_refused_for_pictures(tmp_path: Path) -> None:
    save_gif(tmp_path / "x" / "0.gif", moving(0))
    with pytest.raises(ValueError, match=r"^--rate does not apply to .*x, which holds no sounds or videos"):
        prepare(tmp_path / "x", tmp_path / "out", media=MediaOptions(rate=8000), progress=False)
