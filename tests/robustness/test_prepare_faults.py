"""Faults during `prepare`: unreadable pictures, full disks, bad options, damaged folders. Finished work is kept."""

from __future__ import annotations

import errno
import io
import os
import resource
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from selftrans.data.dataset import Dataset
from selftrans.data.prepare import prepare
from selftrans.data.sources.open_source import open_source
from selftrans.encoders.autoencoder import to_uint8
from tests.support.pictures import class_folders, contents, encoded, noise, save_vae, stopped_after, write


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "my pictures")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vae(tmp_path_factory.mktemp("vae"))


def spoil(pictures: Path) -> None:
    torn = encoded(noise(64), "JPEG")[:500]
    write(pictures, {"cat/04 torn.jpg": torn, "wild dog/empty ü.png": b""})


def test_unreadable_picture_is_named(pictures: Path, tmp_path: Path) -> None:
    spoil(pictures)
    with pytest.raises(ValueError, match=r"^cat/04 torn.jpg: cannot be read .*--skip-bad$"):
        prepare(pictures, tmp_path / "out", shard_size=3, progress=False)
    # finished shards are kept, and the same command with --skip-bad continues
    manifest = prepare(pictures, tmp_path / "out", shard_size=3, skip_bad=True, progress=False)
    assert manifest.count == 23 and [name for name, _ in manifest.skipped] == [
        "cat/04 torn.jpg",
        "wild dog/empty ü.png",
    ]
    assert (
        "2 unreadable pictures left out" in manifest.summary()
        and "wild dog/empty ü.png: the file is empty" in manifest.summary()
    )
    tensors = Dataset.open(tmp_path / "out", verify=True).read(np.arange(23))
    moments, labels = tensors["moments"], tensors["labels"]
    source = open_source(pictures)
    good = [i for i in range(25) if source.name(i) not in dict(manifest.skipped)]
    assert torch.equal(to_uint8(moments[:, 0]), torch.from_numpy(np.stack([source.read(i) for i in good])))
    assert labels.tolist() == source.labels[good].tolist()


def test_skipping_continues_to_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    spoil(pictures)
    options = {"shard_size": 1, "skip_bad": True, "progress": False}  # the shard of a bad picture is empty
    prepare(pictures, tmp_path / "complete", **options)  # type: ignore[arg-type]
    with stopped_after(9):
        prepare(pictures, tmp_path / "out", **options)  # type: ignore[arg-type]
    prepare(pictures, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert contents(tmp_path / "out") == contents(tmp_path / "complete")
    assert len(Dataset.open(tmp_path / "out", verify=True).read(np.arange(23))["moments"]) == 23


def test_source_without_readable_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"the only picture is not readable: a.png \(the file is empty"):
        prepare(tmp_path / "x", tmp_path / "out", resolution=8, skip_bad=True, progress=False)
    assert not (tmp_path / "out").exists()  # nothing that would refuse the next command


@pytest.mark.parametrize("parts", [["1/1"], ["1/2", "2/2"]])
def test_refused_preparation_does_not_refuse_the_next(tmp_path: Path, parts: list[str]) -> None:
    source, out = write(tmp_path / "x", {"a.png": b"", "b.png": b"no"}), tmp_path / "out"
    for skip_bad in (False, True):
        for part in parts if skip_bad else parts[:1]:
            last = not skip_bad or part == parts[-1]
            with pytest.raises(ValueError, match=r"a\.png") if last else nullcontext():
                prepare(source, out, resolution=8, skip_bad=skip_bad, part=part, shard_size=1, progress=False)
    assert not out.exists() or all(path.name.startswith(".lock") for path in out.iterdir())
    write(source, {"a.png": encoded(noise(8)), "b.png": encoded(noise(8, 1))})
    assert prepare(source, out, flip=True, progress=False).count == 2


def test_folder_that_was_there_stays(tmp_path: Path) -> None:
    source, out = write(tmp_path / "x", {"a.png": b""}), tmp_path / "out"
    out.mkdir()
    with pytest.raises(ValueError, match="the file is empty"):
        prepare(source, out, resolution=8, progress=False)
    assert list(out.iterdir()) == []


def test_system_error_is_not_skipped_as_a_bad_picture(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    source = open_source(pictures)
    monkeypatch.setattr(io, "FileIO", exhausted)
    with pytest.raises(ValueError, match="Too many open files") as caught:
        source.read(0)
    assert type(caught.value) is ValueError  # a BadSample would be skipped by --skip-bad


def test_output_that_is_a_file_or_holds_other_files_is_refused(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is not a folder"):
        prepare(pictures, tmp_path / "file", progress=False)
    with pytest.raises(ValueError, match=r"below cannot be made \(Not a directory\)"):
        prepare(pictures, tmp_path / "file" / "below", progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no earlier preparation"):
        prepare(pictures, tmp_path / "full", progress=False)
    with pytest.raises(ValueError, match="is inside the source folder"):
        prepare(pictures, pictures / "out", progress=False)
    assert (tmp_path / "file").read_text() == "mine" and sorted(contents(tmp_path / "full")) == ["thesis.tex"]
    assert sorted(p.name for p in pictures.iterdir()) == ["cat", "wild dog"]


def test_read_only_output_is_refused(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)  # permissions do not stop the root user of a test machine
    with pytest.raises(ValueError, match=r"out cannot be made \(Permission denied\); choose another --out"):
        prepare(pictures, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_full_disk_keeps_finished_shards(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, left, sync = (
        tmp_path / "out",
        6,
        os.fsync,
    )  # two syncs (file and folder) each for the plan, a shard and its record

    def full(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            ValueError, match=r"shard-00001.safetensors cannot be written \(No space left.*free disk space"
        ):
            prepare(pictures, out, shard_size=5, progress=False)
    assert sorted(contents(out)) == [".lock", "plan.json", "shard-00000.json", "shard-00000.safetensors"]
    prepare(pictures, out, shard_size=5, progress=False)
    prepare(pictures, tmp_path / "complete", shard_size=5, progress=False)
    assert contents(out) == contents(tmp_path / "complete")


def test_file_size_limit_leaves_no_partial_shard(pictures: Path, tmp_path: Path) -> None:
    """A real error of the kernel: the limit on the size of files is reached in the middle of a shard."""
    out = tmp_path / "new" / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
        with pytest.raises(ValueError, match=r"shard-00000.safetensors cannot be written \(File too large\)"):
            prepare(pictures, out, batch_size=2, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "new").exists()
    assert prepare(pictures, out, progress=False).count == 23


def test_second_prepare_in_the_same_folder_is_refused(pictures: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another `selftrans prepare` is writing to"):
            prepare(pictures, tmp_path / "out", progress=False)
    assert prepare(pictures, tmp_path / "out", progress=False).count == 23


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not one of float16, float32"),
        ({"precision": "fp8"}, "precision 'fp8' is not one of"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"autoencoder": "nonsense"}, "no autoencoder 'nonsense'"),
    ],
)
def test_bad_options_create_no_output(pictures: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(pictures, tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


def test_resolution_that_does_not_divide_is_refused(pictures: Path, tmp_path: Path, vae: str) -> None:
    with pytest.raises(ValueError, match=r"resolution 9x9 is not a multiple of 2"):
        prepare(pictures, tmp_path / "out", autoencoder=vae, resolution=9, progress=False)


def test_moments_that_overflow_float16_are_refused(
    pictures: Path, tmp_path: Path, vae: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selftrans.encoders.autoencoder import DiffusersAutoencoder
    from selftrans.encoders.latent_space import Moments

    monkeypatch.setattr(
        DiffusersAutoencoder,
        "encode",
        lambda self, x: Moments(torch.full((len(x), 2, 4, 4), 1e5), torch.ones(len(x), 2, 4, 4)),
    )
    with pytest.raises(ValueError, match=r"^cat/01.png: its moments are too large for float16; try --dtype float32"):
        prepare(pictures, tmp_path / "half", autoencoder=vae, progress=False)
    assert prepare(pictures, tmp_path / "full", autoencoder=vae, dtype="float32", progress=False).count == 23


def test_ignored_option_warns(pictures: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="precision bfloat16 is ignored"):
        prepare(pictures, tmp_path / "a", precision="bfloat16", progress=False)
    with pytest.warns(UserWarning, match="label_column is ignored"):
        prepare(pictures, tmp_path / "b", label_column="x", progress=False)


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_damaged_folder_is_named(pictures: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"version": 1')
    with pytest.raises(ValueError, match=r"out holds a damaged preparation \(.*\); delete it, or choose another --out"):
        prepare(pictures, tmp_path / "out", progress=False)
