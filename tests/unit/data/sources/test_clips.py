"""Sounds and videos in zips and tars: the same data as from a folder, labels, and archives that are refused."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from selftrans.data.dataset import Dataset
from selftrans.data.prepare import prepare
from selftrans.data.sources.clips import MediaOptions, kind_of
from selftrans.data.sources.decode import Reading
from tests.support.clips import moving, save_gif, save_mp4, sounds
from tests.support.pictures import encoded, noise, write


def zipped(root: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, prefix + file.relative_to(root).as_posix())
    return path


def tarred(root: Path, path: Path, suffix: str = "*.*") -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for file in sorted(root.rglob(suffix)):
            archive.add(file, file.relative_to(root).as_posix())
    return path


def videos(root: Path) -> Path:
    """Two gifs and two mp4 of moving squares, in two classes."""
    for k in range(2):
        save_gif(root / "gifs" / f"{k}.gif", moving(k))
        save_mp4(root / "mp4s" / f"{k}.mp4", moving(k))
    return root


def content(data: Path) -> tuple[np.ndarray, list[int], tuple[str, ...], str]:
    dataset = Dataset.open(data)
    tensors = dataset.read(np.arange(len(dataset)))
    return (
        tensors["moments"].numpy(),
        tensors["labels"].tolist(),
        dataset.manifest.classes,
        dataset.manifest.autoencoder,
    )


def prepared(source: Path, out: Path, **options: object) -> tuple[np.ndarray, list[int], tuple[str, ...], str]:
    prepare(source, out, media=MediaOptions(**options), progress=False)  # type: ignore[arg-type]
    return content(out)


@pytest.mark.parametrize("kind", ["sounds", "mel", "videos"])
def test_archives_give_what_the_folder_gives(tmp_path: Path, kind: str) -> None:
    root = videos(tmp_path / "x") if kind == "videos" else sounds(tmp_path / "x")
    options: dict[str, object] = {"sounds": {}, "mel": {"audio": "mel"}, "videos": {"frames": 3}}[kind]  # type: ignore
    expected = prepared(root, tmp_path / "folder", **options)
    assert len(expected[2]) == 2
    sources = {
        "zip": zipped(root, tmp_path / "x.zip"),
        "enclosed": zipped(root, tmp_path / "y.zip", "all/"),
        "tar": tarred(root, tmp_path / "x.tar"),
        "tars": tarred(root, tmp_path / "shards" / "0.tar").parent,
    }
    for name, source in sources.items():
        found = prepared(source, tmp_path / name, **options)
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[1:] == expected[1:], name


def test_files_of_several_tars_are_one_source(tmp_path: Path) -> None:
    root = sounds(tmp_path / "x")
    tarred(root, tmp_path / "s" / "b.tar", "high/*.wav")
    tarred(root, tmp_path / "s" / "a.tar", "low/*.wav")
    found = prepared(tmp_path / "s", tmp_path / "tars")
    expected = prepared(root, tmp_path / "folder")
    np.testing.assert_array_equal(found[0][[3, 4, 5, 0, 1, 2]], expected[0])  # low in a.tar comes first
    assert found[1] == [1, 1, 1, 0, 0, 0] and found[2] == ("high", "low")


@pytest.mark.parametrize("prefix", ["", "all/"])
def test_split_of_an_archive_gives_what_its_folder_gives(tmp_path: Path, prefix: str) -> None:
    root = tmp_path / "x"
    sounds(root / "train")
    sounds(root / "val", 1)
    expected = prepared(root / "train", tmp_path / "folder")
    assert expected[2] == ("high", "low")
    sources = [root, zipped(root, tmp_path / "x.zip", prefix), tarred(root, tmp_path / "x.tar")]
    for kind in ("train", "val"):
        tarred(root / kind, tmp_path / "tars" / f"{kind}-0.tar")
    for k, source in enumerate([*sources, tmp_path / "tars"]):
        prepare(source, tmp_path / f"{k}", split="train", progress=False)
        found = content(tmp_path / f"{k}")
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[1:] == expected[1:]
        with pytest.raises(ValueError, match=r"has no split 'test'; it has train, val"):
            prepare(source, tmp_path / "none", split="test", progress=False)
    with pytest.warns(UserWarning, match=r"the classes of .*x\.zip are train, val, which look like splits"):
        prepare(zipped(root, tmp_path / "x.zip"), tmp_path / "all", progress=False)


def test_class_folders_of_a_zip_without_files_are_classes_on_request(tmp_path: Path) -> None:
    path = zipped(sounds(tmp_path / "x"), tmp_path / "x.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.mkdir("none")
    assert prepared(path, tmp_path / "a")[2] == ("high", "low")
    with pytest.warns(UserWarning, match="1 of 3 classes has no samples: none"):
        prepare(path, tmp_path / "b", reading=Reading(allow_empty=True), progress=False)
    assert content(tmp_path / "b")[2] == ("high", "low", "none")


def test_limit_of_pixels_in_an_archive(tmp_path: Path) -> None:
    path = zipped(videos(tmp_path / "x"), tmp_path / "x.zip")
    for k, suffix in ((0, "gifs/0.gif"), (1, "mp4s/0.mp4")):
        with zipfile.ZipFile(tmp_path / f"{k}.zip", "w") as archive:
            archive.writestr(suffix, zipfile.ZipFile(path).read(suffix))
        with pytest.raises(ValueError, match="is more than the limit of 9 pixels; raise it with --max-pixels"):
            prepare(
                tmp_path / f"{k}.zip",
                tmp_path / "out",
                media=MediaOptions(frames=2),
                reading=Reading(9),
                progress=False,
            )


def test_what_an_archive_holds(tmp_path: Path) -> None:
    picture = encoded(noise())
    write(tmp_path / "x", {"a.png": picture, "b.wav": b"", "c.gif": b"", "d.mp4": b"", "e.txt": b"", ".f.wav": b""})

    def of(frames: int | None, *names: str, **options: bool) -> list[str | None]:
        for path in (tmp_path / "a.zip", tmp_path / "a.tar"):
            path.unlink(missing_ok=True)
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as one, tarfile.open(tmp_path / "a.tar", "w") as other:
            for name in names:
                one.write(tmp_path / "x" / name, name)
                other.add(tmp_path / "x" / name, name)
        return [kind_of(tmp_path / f"a.{suffix}", frames, **options) for suffix in ("zip", "tar")]

    assert of(None, "e.txt", "b.wav") == ["sounds", "sounds"]
    assert of(None, "c.gif") == ["pictures", "pictures"] and of(4, "c.gif") == ["videos", "videos"]
    assert of(None, "b.wav", "a.png") == ["pictures", "sounds"]  # a zip with pictures is one of pictures
    assert of(None, "e.txt", ".f.wav") == [None, None]
    assert of(None, "d.mp4", archives=False) == [None, None]
    assert kind_of(tmp_path / "none.zip", None) is None


def test_a_damaged_entry_is_named_or_skipped(tmp_path: Path) -> None:
    root = sounds(tmp_path / "x")
    (root / "low" / "5.wav").write_bytes((root / "low" / "5.wav").read_bytes()[:100])
    for source in (zipped(root, tmp_path / "x.zip"), tarred(root, tmp_path / "x.tar")):
        with pytest.raises(ValueError, match=r"low/5\.wav: cannot be read as a sound \(truncated"):
            prepare(source, tmp_path / f"out{source.suffix}", progress=False)
        assert not (tmp_path / f"out{source.suffix}" / "manifest.json").exists()
        done = prepare(source, tmp_path / source.suffix[1:], skip_bad=True, progress=False)
        assert done.count == 5 and [name.removeprefix("x.tar/") for name, _ in done.skipped] == ["low/5.wav"]


def test_several_kinds_and_unsafe_names_are_refused(tmp_path: Path) -> None:
    root = sounds(tmp_path / "x")
    save_mp4(root / "low" / "z.mp4", moving(0))
    for source in (zipped(root, tmp_path / "x.zip"), tarred(root, tmp_path / "x.tar")):
        with pytest.raises(ValueError, match=r"holds sounds and videos, such as .*low/z\.mp4; keep one kind"):
            prepare(source, tmp_path / "out", progress=False)
    with zipfile.ZipFile(tmp_path / "up.zip", "w") as archive:
        archive.write(root / "low" / "1.wav", "../1.wav")
    with pytest.raises(ValueError, match="leads out of it"):
        prepare(tmp_path / "up.zip", tmp_path / "out", progress=False)
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tmp_path / "x.tar").read_bytes()[:9000])
    with pytest.raises(ValueError, match=r"cut\.tar is not a complete tar file"):
        prepare(cut, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "3/2"}, "3/2"),
        ({"dtype": "int8"}, "int8"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"flip": True}, "--flip"),
    ],
)
def test_options_are_checked_before_the_files_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, message: str
) -> None:
    monkeypatch.setattr(Path, "open", None)
    monkeypatch.setattr("selftrans.data.sources.clips.open_files", None)
    with pytest.raises(ValueError, match=message):
        prepare(sounds(tmp_path / "x", 1), tmp_path / "out", progress=False, **options)
