"""Folders may be untrusted: the targets of symbolic links in them are never written, emptied or removed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from selftrans import storage
from selftrans.data import resumable
from selftrans.data.dataset import Dataset
from selftrans.data.prepare import prepare
from selftrans.sampling.folder import write_samples
from selftrans.storage import lock_file
from selftrans.train.log import JsonlLog, read_log
from selftrans.train.run import train
from tests.support import toy
from tests.support.pictures import class_folders, contents, stopped_after
from tests.support.toy import quick  # noqa: F401 - a fixture

MINE = b"mine\n"
TEMPORARY = f".log.jsonl.{storage.MACHINE}-{os.getpid()}-00000000.tmp"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine").write_bytes(MINE)
    return tmp_path / "mine"


def linked(folder: Path, to: Path) -> Path:
    """`to`: the tree of `folder` with a symlink for each file except the lock; directories are real."""
    for path in folder.rglob("*"):
        if path.is_file() and path.name != ".lock":
            (to / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (to / path.relative_to(folder)).symlink_to(path)
    return to


def test_lock_that_is_a_symlink_is_refused(tmp_path, mine):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(mine)
    with pytest.raises(ValueError, match=r"run/.lock cannot be opened \(.*symbolic links\); remove it, or"):
        train(toy.toy(), tmp_path / "run", quiet=True)
    assert mine.read_bytes() == MINE
    (tmp_path / "run" / ".lock").unlink()
    with lock_file(tmp_path / "run" / ".lock"):
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())


def test_prepare_locks_do_not_follow_symlinks(tmp_path):
    for name, part in ((".lock", (1, 1)), (".lock-1-of-2", (1, 2))):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).symlink_to(tmp_path / "absent")
        with pytest.raises(ValueError, match="symbolic links"), resumable.locked(tmp_path / "out", part):
            pass
        (tmp_path / "out" / name).unlink()
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("name", ["log.jsonl", TEMPORARY], ids=["target", "temporary"])
@pytest.mark.parametrize("exists", [True, False])
def test_log_is_not_written_through_a_symlink(tmp_path, mine, name, exists, monkeypatch):
    monkeypatch.setattr(storage.secrets, "token_hex", lambda _: "0" * 8)
    out = tmp_path / "out"
    out.mkdir()
    if name == TEMPORARY:
        (out / "log.jsonl").write_text('{"step": 1}\n')
    if not exists:
        mine.unlink()
    (out / name).symlink_to(mine)
    log = JsonlLog(out / "log.jsonl", resume_step=1)
    log.write({"step": 2})
    log.close()
    assert [line["step"] for line in read_log(out / "log.jsonl")] == ([1, 2] if name == TEMPORARY else [2])
    assert sorted(contents(out)) == ["log.jsonl"] and not (out / "log.jsonl").is_symlink()
    assert mine.read_bytes() == MINE if exists else not mine.exists()


def test_run_of_symlinks_continues_without_changing_their_targets(tmp_path):
    first = toy.copy(toy.finished(), tmp_path / "first")
    before = toy.tree(first)
    run = linked(first, tmp_path / "run")
    steps = toy.toy().train.steps
    train(toy.toy({"train.steps": steps + 2, "train.preview_every": 1}), run, quiet=True)
    assert toy.tree(first) == before
    train(toy.toy({"train.steps": steps + 2, "train.preview_every": 1}), first, quiet=True)
    toy.assert_same_run(run, first)


def test_only_own_temporaries_are_removed(tmp_path):
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".profile").write_bytes(MINE)
    run = toy.copy(toy.finished(), tmp_path / "run")
    (run / "stage2" / "previews").mkdir(exist_ok=True)
    left = [run / "stage2" / "previews" / name for name in (".step-00000002.png.123.tmp", ".prompts.txt.123.tmp")]
    left += [run / ".init.safetensors.123.tmp"]
    for path in left:
        path.write_text("of a killed process")
    (run / "guest").mkdir()
    (run / "guest" / "previews").symlink_to(home)
    train(toy.toy(), run, quiet=True)
    assert (home / ".profile").read_bytes() == MINE and (home / ".ssh").is_dir()
    assert not any(path.exists() for path in left)


def test_samples_are_not_written_through_symlinks(tmp_path, mine):
    def sample(indices):
        yield indices, indices, np.zeros((len(indices), 4, 4, 3), np.uint8)

    out = tmp_path / "out"
    out.mkdir()
    names = ["000000.png", "samples.npz", "samples.json"]
    for name in [f".{name}.0.tmp" for name in names] + names[1:2]:
        (out / name).symlink_to(mine)
    assert write_samples(sample, out, {"steps": 2}, 2, progress=False) == 2
    assert mine.read_bytes() == MINE
    assert sorted(contents(out)) == ["000000.png", "000001.png", "samples.json", "samples.npz"]
    assert not any(path.is_symlink() for path in out.iterdir())


def test_unfinished_preparation_of_symlinks_leaves_their_targets_alone(tmp_path):
    pictures = class_folders(tmp_path / "pictures")
    with stopped_after(9):
        prepare(pictures, tmp_path / "first", shard_size=5, batch_size=5, progress=False)
    before = contents(tmp_path / "first")
    (tmp_path / "out").mkdir()
    out = linked(tmp_path / "first", tmp_path / "out")
    assert len(list(out.glob("shard-*.json"))) == 1
    assert prepare(pictures, out, shard_size=5, batch_size=5, progress=False).count == 23
    assert contents(tmp_path / "first") == before
    Dataset.open(out, verify=True)
