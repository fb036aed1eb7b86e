"""The folder of samples: contents, interruption, continuation, refusals, full disks; pictures and arrays."""

import io
import json
import os
import resource
import struct
import threading
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from selftrans.sampling import folder as samples_io
from selftrans.sampling.folder import write_samples
from selftrans.sampling.sample_file import NPY, PNG, PNG_END, PNG_START, read_png
from tests.support.memory import traced_peak

SETTINGS = {"steps": 4, "guidance": {"scale": 1.5, "interval": (0.0, 0.65)}}


def image(k, channels=3, side=6):
    return np.random.default_rng(k).integers(256, size=(side, side, channels), dtype=np.uint8)


class Source:
    """A sampler of `image(k)` with label k % 10; records the requested indices; fails after `limit` images."""

    def __init__(self, batch=3, channels=3, limit=None):
        self.batch, self.channels, self.limit, self.asked = batch, channels, limit, []

    def __call__(self, indices):
        self.asked = indices.tolist()
        for start in range(0, len(indices), self.batch):
            if self.limit is not None and start >= self.limit:
                raise KeyboardInterrupt
            chunk = indices[start : start + self.batch]
            yield chunk, chunk % 10, np.stack([image(k, self.channels) for k in chunk])


def write(out, num, source=None, settings=SETTINGS, **options):
    source = source or Source()
    sampled = write_samples(source, out, settings, num, progress=False, **options)
    assert sampled == len(source.asked)
    return source


def check_folder(out, num, channels=3):
    """Check all files, with Pillow, numpy and json only, and that the folder holds no others."""
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*(f"{k:06d}.png" for k in range(num)), "samples.json", "samples.npz"]
    )
    for k in range(num):
        with Image.open(out / f"{k:06d}.png") as picture:
            assert picture.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
            assert np.array_equal(np.asarray(picture).reshape(6, 6, channels), image(k, channels))
    with np.load(out / "samples.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"arr_0", "arr_1"}
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_0"].shape == (num, 6, 6, channels)
        assert np.array_equal(arrays["arr_0"], np.stack([image(k, channels) for k in range(num)]))
        assert arrays["arr_1"].tolist() == [k % 10 for k in range(num)] and arrays["arr_1"].dtype == np.int64
    record = json.loads((out / "samples.json").read_text())
    assert record["num"] == num and record["complete"] and record["shape"] == [num, 6, 6, channels]
    assert record["settings"]["guidance"] == {"scale": 1.5, "interval": [0.0, 0.65]}


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_folder_and_npz_hold_the_images(tmp_path, channels):
    out = tmp_path / "with spaces, ünicode" / "samples"
    write(out, 11, Source(channels=channels))
    check_folder(out, 11, channels)


def test_repeating_a_complete_command_does_nothing_and_reports_it(tmp_path, capsys):
    write(tmp_path, 4)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert write(tmp_path, 4).asked == []
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
    assert "already holds these 4 samples; nothing to do" in capsys.readouterr().out


def test_interrupted_command_continues(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 10, Source(limit=6))
    assert (
        not (tmp_path / "samples.npz").exists() and not json.loads((tmp_path / "samples.json").read_text())["complete"]
    )
    assert write(tmp_path, 10).asked == [6, 7, 8, 9]
    check_folder(tmp_path, 10)


def test_more_images_of_the_same_settings_continue(tmp_path):
    write(tmp_path, 4)
    assert write(tmp_path, 9).asked == [4, 5, 6, 7, 8]
    check_folder(tmp_path, 9)


@pytest.mark.parametrize(
    "damage", [lambda p: p.write_bytes(p.read_bytes()[:-7]), lambda p: p.write_bytes(b""), lambda p: p.unlink()]
)
def test_damaged_pictures_are_sampled_again(tmp_path, damage):
    write(tmp_path, 5)
    damage(tmp_path / "000002.png")
    assert write(tmp_path, 5).asked == [2]
    check_folder(tmp_path, 5)


def test_lost_npz_is_written_again_without_sampling(tmp_path, capsys):
    write(tmp_path, 5)
    (tmp_path / "samples.npz").write_bytes(b"no zip")
    (tmp_path / ".000003.png.1.tmp").write_bytes(b"of a killed process, of several")
    capsys.readouterr()
    assert write(tmp_path, 5).asked == []
    assert capsys.readouterr().out == f"{tmp_path} holds all 5 samples already; samples.npz is written\n"
    check_folder(tmp_path, 5)


def test_file_that_another_process_has_just_written_is_seen(tmp_path, monkeypatch):
    """NFS shows it only once the folder is opened again: of two processes that end together, each missed the other's."""
    known, plain = set(), PNG.is_complete

    def opened(folder):
        known.update(each.name for each in os.scandir(folder))
        return sorted(known)

    monkeypatch.setattr(os, "listdir", opened)
    remembering = PNG._replace(is_complete=lambda path: path.name in known and plain(path))
    for rank in (0, 1):
        write(tmp_path, 4, rank=rank, world=2, kind=remembering)
    check_folder(tmp_path, 4)


def test_other_settings_in_the_same_folder_are_named(tmp_path):
    write(tmp_path, 2)
    other = {"steps": 4, "guidance": {"scale": 2.0, "interval": (0.0, 0.65)}, "seed": 1}
    with pytest.raises(ValueError, match=r"guidance.scale: 1.5 there, 2.0 now; seed: absent there, 1 now") as caught:
        write(tmp_path, 2, settings=other)
    assert "steps" not in str(caught.value) and "interval" not in str(caught.value) and "\n" not in str(caught.value)
    check_folder(tmp_path, 2)


def test_long_setting_is_shown_with_an_ellipsis(tmp_path):
    write(tmp_path, 2, settings={"autoencoder": "scale=" + 60 * "1"})
    with pytest.raises(ValueError, match=rf"autoencoder: scale={51 * '1'}\.\.\. there, short now\)"):
        write(tmp_path, 2, settings={"autoencoder": "short"})


def test_moved_run_of_the_same_weights_continues(tmp_path):
    source = {"path": "/old/run", "sha256": "a"}
    write(tmp_path, 2, settings={"source": source, "autoguidance": {"source": source}})
    moved = {"path": "/new/run", "sha256": "a"}
    assert write(tmp_path, 3, settings={"source": moved, "autoguidance": {"source": moved}}).asked == [2]
    other = {"source": moved | {"sha256": "b"}, "autoguidance": {"source": moved}}
    with pytest.raises(ValueError, match=r"other settings \(source.sha256: a there, b now\)"):
        write(tmp_path, 3, settings=other)


def test_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "samples").touch()
    with pytest.raises(ValueError, match="samples is not a folder; choose another --out"):
        write(tmp_path / "samples", 2)


def test_fewer_images_than_begun_are_refused(tmp_path):
    write(tmp_path, 3)
    with pytest.raises(ValueError, match="begun for 3 samples"):
        write(tmp_path, 2)


def test_folder_of_other_pictures_is_refused(tmp_path):
    (tmp_path / "000000.png").write_bytes(b"another picture")
    with pytest.raises(ValueError, match=r"no samples\.json"):
        write(tmp_path, 2)
    assert (tmp_path / "000000.png").read_bytes() == b"another picture"


@pytest.mark.parametrize("content", ["{", "[]", '{"num": 3}', '{"num": "x", "settings": {}, "complete": true}'])
def test_unreadable_samples_json_is_refused(tmp_path, content):
    (tmp_path / "samples.json").write_text(content)
    with pytest.raises(ValueError, match=r"samples\.json cannot be read"):
        write(tmp_path, 2)


def test_processes_share_the_images_and_the_last_one_writes_the_npz(tmp_path, capsys):
    first = write(tmp_path, 7, rank=1, world=2)
    assert first.asked == [1, 3, 5] and not (tmp_path / "samples.npz").exists()
    assert write(tmp_path, 7, rank=0, world=2).asked == [0, 2, 4, 6]
    check_folder(tmp_path, 7)
    assert write(tmp_path, 7, rank=1, world=2).asked == [] and capsys.readouterr().out == ""
    assert write(tmp_path, 9, rank=0, world=1).asked == [7, 8]  # the number of processes may change


def test_pictures_are_written_by_another_thread_in_bounded_number(tmp_path, monkeypatch):
    threads, waiting, most, lock = set(), 0, 0, threading.Lock()
    inner = samples_io._SampleFolder.write_batch

    def spy(*args):
        nonlocal waiting
        threads.add(threading.current_thread())
        result = inner(*args)
        with lock:
            waiting -= 1
        return result

    monkeypatch.setattr(samples_io._SampleFolder, "write_batch", spy)

    def source(indices):
        nonlocal waiting, most
        for batch in Source(batch=1)(indices):
            with lock:
                waiting += 1
                most = max(most, waiting)
            yield batch

    write_samples(source, tmp_path, SETTINGS, 40, progress=False)
    assert threading.main_thread() not in threads and len(threads) == 1
    assert most <= samples_io.BACKLOG + 2
    check_folder(tmp_path, 40)


def test_images_that_cannot_be_png_are_refused(tmp_path):
    for images in (np.zeros((1, 4, 4, 2), np.uint8), np.zeros((1, 4, 4, 3), np.float32), np.zeros((1, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="cannot be PNGs"):
            write_samples(lambda k, images=images: [(k, k, images)], tmp_path, SETTINGS, 1, progress=False)


def test_images_of_two_sizes_are_refused(tmp_path):
    sizes = lambda indices: [(indices[k : k + 1], [0], image(k, side=6 + k)[None]) for k in range(2)]  # noqa: E731
    with pytest.raises(ValueError, match=r"000001.png is \(7, 7, 3\), the first is \(6, 6, 3\)"):
        write_samples(sizes, tmp_path, SETTINGS, 2, progress=False)


def damaged(data: bytes, kind: str) -> bytes:
    """A damaged picture that begins and ends like a complete PNG."""
    if kind == "damaged inside":
        return data[:60] + bytes(len(data) - 80) + data[-20:]
    if kind == "bomb":  # a header that claims 60000 x 60000 pixels
        chunk = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
        return data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    buffer, text = io.BytesIO(), PngImagePlugin.PngInfo()
    text.add_text("label", {"label": "9" * 30, "word": "cat"}.get(kind, "1"))
    picture = Image.new("I;16", (6, 6)) if kind == "16 bit" else Image.new("RGB", (6, 6))
    picture.save(buffer, "JPEG" if kind == "jpeg" else "PNG", pnginfo=text)
    return PNG_START + buffer.getvalue()[8:] + (PNG_END if kind == "jpeg" else b"")


@pytest.mark.parametrize("kind", ["damaged inside", "bomb", "label", "word", "16 bit", "jpeg"])
def test_damaged_pictures_are_named_and_not_written_to_the_npz(tmp_path, kind):
    write(tmp_path, 3)
    before = (tmp_path / "samples.npz").read_bytes()
    path = tmp_path / "000001.png"
    path.write_bytes(damaged(path.read_bytes(), kind))
    with pytest.raises(
        ValueError, match=r"000001.png is not a valid sample \(.+\); delete it and repeat the command$"
    ) as caught:
        write(tmp_path, 4)
    assert "\n" not in str(caught.value) and (tmp_path / "samples.npz").read_bytes() == before
    path.unlink()
    assert write(tmp_path, 4).asked == [1]
    check_folder(tmp_path, 4)


def test_failing_sampler_leaves_only_complete_pictures(tmp_path):
    def source(indices):
        yield from list(Source()(indices))[:1]
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write_samples(source, tmp_path, SETTINGS, 9, progress=False)
    assert write(tmp_path, 9).asked == [3, 4, 5, 6, 7, 8]
    check_folder(tmp_path, 9)


@contextmanager
def no_file_above(size):
    """The operating system refuses to write files above `size` bytes, which simulates a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("side", "limit"), [(6, 1500), (40, 3000)], ids=["npz", "png"])
def test_full_disk_leaves_complete_files_and_one_clear_error(tmp_path, side, limit):
    """Either the pictures fit and the npz does not, or the second picture (noise) does not fit."""

    def source(indices):
        for k in indices:
            flat = np.zeros((1, side, side, 3), np.uint8)
            yield np.array([k]), np.array([k]), flat if k == 0 else image(k, side=side)[None]

    with no_file_above(limit), pytest.raises(ValueError, match=r"cannot be written .*free disk space") as caught:
        write_samples(source, tmp_path, SETTINGS, 20, progress=False)
    assert "\n" not in str(caught.value)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert not [name for name in left if name.endswith(".tmp")] and "samples.npz" not in left
    pictures = [p for p in tmp_path.iterdir() if p.suffix == ".png"]
    assert len(pictures) == (20 if side == 6 else 1)
    assert all(read_png(p)[0].shape == (side, side, 3) for p in pictures)
    write_samples(source, tmp_path, SETTINGS, 20, progress=False)
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (20, side, side, 3)


def test_unwritable_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"file.samples.samples.json cannot be written \(Not a directory\)"):
        write(tmp_path / "file" / "samples", 2)


def test_npz_is_streamed(tmp_path):
    """Memory does not grow with the number of images: 6 MB of images need far less memory."""
    noise = np.random.default_rng(0).integers(256, size=(1, 64, 64, 3), dtype=np.uint8)
    source = lambda indices: ((indices[i : i + 1], [0], noise) for i in range(len(indices)))  # noqa: E731
    assert traced_peak(lambda k: write_samples(source, tmp_path / str(k), SETTINGS, 500, progress=False)) < 3e6
    with np.load(tmp_path / "0" / "samples.npz") as arrays:
        assert np.array_equal(arrays["arr_0"][499], noise[0])


# ---- samples that are not pictures


def array(k, shape=(2, 5)):
    return np.random.default_rng(k).standard_normal(shape, dtype=np.float32)


class Arrays(Source):
    """A sampler of `array(k)` with label k % 10."""

    def __call__(self, indices):
        for chunk, labels, _ in super().__call__(indices):
            yield chunk, labels, np.stack([array(k) for k in chunk])


def write_arrays(out, num, source=None, **options):
    return write(out, num, source or Arrays(), kind=NPY, **options)


def check_arrays(out, num):
    names = [*(f"{k:06d}.npy" for k in range(num)), "samples.json", "samples.npz"]
    assert sorted(p.name for p in out.iterdir()) == sorted(names)
    assert all(np.array_equal(np.load(out / f"{k:06d}.npy", allow_pickle=False), array(k)) for k in range(num))
    with np.load(out / "samples.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].dtype == np.float32 and arrays["arr_0"].shape == (num, 2, 5)
        assert np.array_equal(arrays["arr_0"], np.stack([array(k) for k in range(num)]))
        assert arrays["arr_1"].tolist() == [k % 10 for k in range(num)]
    assert json.loads((out / "samples.json").read_text())["shape"] == [num, 2, 5]


def test_arrays_are_stored_and_continued_after_interruption(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_arrays(tmp_path, 10, Arrays(limit=6))
    assert write_arrays(tmp_path, 10).asked == [6, 7, 8, 9]
    check_arrays(tmp_path, 10)
    (tmp_path / "000004.npy").write_bytes((tmp_path / "000004.npy").read_bytes()[:-3])
    assert write_arrays(tmp_path, 12).asked == [4, 10, 11]
    check_arrays(tmp_path, 12)


def test_arrays_without_a_record_are_not_overwritten(tmp_path):
    np.save(tmp_path / "000000.npy", array(0))
    with pytest.raises(ValueError, match=r"no samples\.json"):
        write_arrays(tmp_path, 2)


def test_arrays_of_another_type_are_refused(tmp_path):
    for arrays in (np.zeros((1, 4, 4)), np.zeros((1, 4), np.float32), np.zeros((1, 4, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="npy files hold float32"):
            write_samples(lambda k, arrays=arrays: [(k, k, arrays)], tmp_path, SETTINGS, 1, kind=NPY, progress=False)
