"""`selftrans classifier`: an interrupted training continues to the same bits, a finished classifier stays."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from selftrans.cli.main import main
from selftrans.experiments import train_classifier as module
from selftrans.storage import temporary_for
from selftrans.train.signals import StopSignal
from tests.support import toy
from tests.support.processes import Killed
from tests.support.toy import quick  # noqa: F401 - a fixture

STEPS = 6  #: three epochs of 72 pictures in batches of 64 and 8; 18 are held out


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy.prepared(tmp_path_factory.mktemp("data"), count=45)


def command(data, out, epochs=3):
    return ["classifier", str(data), f"--out={out}", f"--epochs={epochs}"]


def assert_same_files(a, b):
    toy.assert_same(load_file(a), load_file(b))
    assert a.with_suffix(".json").read_bytes() == b.with_suffix(".json").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("classifier") / "c.safetensors"
    assert main(command(data, out)) == 0
    return out


def test_every_step_moves_the_progress_bar_and_no_checkpoint_stays(data, tmp_path, capsys, uninterrupted):
    assert main(command(data, tmp_path / "c.safetensors")) == 0
    assert f"classifier: 100% {STEPS}/{STEPS}" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["c.json", "c.safetensors"]
    assert_same_files(tmp_path / "c.safetensors", uninterrupted)


def test_second_process_is_refused_until_the_classifier_is_written(data, tmp_path, monkeypatch, capsys):
    out, refused = tmp_path / "c.safetensors", []

    def second(*_):
        refused.append((main(command(data, out)), capsys.readouterr().err))

    monkeypatch.setattr(module, "write_json", second)  # after the last step
    assert main(command(data, out)) == 0
    ((status, message),) = refused
    assert status == 1 and f"{tmp_path / 'c.training'} is in use by process {os.getpid()}" in message


@pytest.mark.parametrize("epochs", [3, 4])
def test_classifier_that_another_process_has_finished_stays(data, tmp_path, monkeypatch, uninterrupted, epochs):
    """Between the look for a finished classifier and the lock."""
    out, locked = tmp_path / "c.safetensors", module.lock_file

    def lock(path):
        for suffix in (".safetensors", ".json"):
            out.with_suffix(suffix).write_bytes(uninterrupted.with_suffix(suffix).read_bytes())
        return locked(path)

    monkeypatch.setattr(module, "lock_file", lock)
    monkeypatch.setattr(module, "train_classifier", None)
    temporary_for(out).touch()  # of a third one, killed
    assert main(command(data, out, epochs)) == (0 if epochs == 3 else 1)
    assert not list(tmp_path.glob(".*.tmp"))
    assert_same_files(out, uninterrupted)


def test_stopped_at_every_step(data, tmp_path, monkeypatch, capsys, uninterrupted):
    def stopped(self):
        self.received = signal.SIGTERM
        return self

    monkeypatch.setattr(StopSignal, "__enter__", stopped)
    out = tmp_path / "c.safetensors"
    for step in range(1, STEPS):
        assert main(command(data, out)) == 75
        line = f"at step {step}; checkpoint written in {tmp_path / 'c.training'}; the same command continues"
        assert capsys.readouterr().err.endswith(f"selftrans: stopped by SIGTERM {line}\n")
    assert main(command(data, out, epochs=4)) == 1
    assert "an unfinished training with other data, --epochs or --seed" in capsys.readouterr().err
    assert main(command(data, out)) == 0
    assert_same_files(out, uninterrupted)


def test_killed_training_continues_from_its_last_checkpoint(data, tmp_path, monkeypatch, uninterrupted):
    def killed(*_, **__):
        raise Killed

    monkeypatch.setattr(module, "CHECKPOINT_EVERY", 2)
    out = tmp_path / "c.safetensors"
    for name in ("prune", "newest"):  # after the first checkpoint, and before it is read
        with monkeypatch.context() as patch:
            patch.setattr(module.checkpoint, name, killed)
            with pytest.raises(Killed):
                main(command(data, out))
    assert [path.name for path in (tmp_path / "c.training").glob("step-*")] == ["step-00000002"]
    assert main(command(data, out)) == 0
    assert_same_files(out, uninterrupted)


@pytest.fixture
def finished(tmp_path, uninterrupted):
    """A copy of the finished classifier, and the content of its files."""
    for suffix in (".safetensors", ".json"):
        (tmp_path / f"c{suffix}").write_bytes(uninterrupted.with_suffix(suffix).read_bytes())
    return tmp_path / "c.safetensors", contents(tmp_path)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_finished_classifier_stays(data, finished, tmp_path_factory, capsys):
    out, before = finished
    assert main(command(data, out)) == 0
    assert contents(out.parent) == before and f"{out}: accuracy 0." in capsys.readouterr().out
    for epochs in (1, 4):
        assert main(command(data, out, epochs=epochs)) == 1
        message = f"{out} is a finished classifier of --epochs 3; give those, or another --out"
        assert message in capsys.readouterr().err and contents(out.parent) == before
    other = toy.prepared(tmp_path_factory.mktemp("other"), count=20)
    assert main(command(other, out)) == 1
    assert (
        f"{out} is a finished classifier of other data; give those, or another --out" in capsys.readouterr().err
        and contents(out.parent) == before
    )


@pytest.mark.parametrize("file", ["c.safetensors", "c.json"])
@pytest.mark.parametrize("content", [b"mine", None])
def test_what_is_no_finished_classifier_stays(data, finished, capsys, file, content):
    out, _ = finished
    if content is None:
        (out.parent / file).unlink()
    else:
        (out.parent / file).write_bytes(content)
    before = contents(out.parent)
    again = (file, content) == ("c.safetensors", None)  # its file was removed, which is the way to train it again
    assert main(command(data, out)) == (0 if again else 1)
    if not again:
        assert "c.safetensors and c.json are damaged, or something else" in capsys.readouterr().err
        assert contents(out.parent) == before


def test_json_of_something_else_stays(data, tmp_path, capsys):
    (tmp_path / "c.json").write_text('{"mine": 1}')
    assert main(command(data, tmp_path / "c.safetensors")) == 1
    assert "c.safetensors and c.json are damaged, or something else" in capsys.readouterr().err
    assert contents(tmp_path) == {"c.json": b'{"mine": 1}'}


def test_killed_before_its_checkpoints_are_removed(data, tmp_path, monkeypatch, uninterrupted):
    def killed(*_, **__):
        raise Killed

    monkeypatch.setattr(module, "CHECKPOINT_EVERY", 2)
    out = tmp_path / "c.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(module.SmallClassifier, "save", killed)
        with pytest.raises(Killed):
            main(command(data, out))
    left = [temporary_for(path) for path in (out, out.with_suffix(".json"))]
    for path in left:
        path.write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            main(command(data, out))
    assert (tmp_path / "c.training" / "step-00000006").is_dir()
    assert not any(path.exists() for path in left)
    before = out.stat().st_mtime_ns
    assert main(command(data, out)) == 0
    assert sorted(os.listdir(tmp_path)) == ["c.json", "c.safetensors"] and out.stat().st_mtime_ns == before
    assert_same_files(out, uninterrupted)


def test_checkpoints_of_another_training_stay(data, finished, monkeypatch):
    def stopped(self):
        self.received = signal.SIGTERM
        return self

    out, _ = finished
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "__enter__", stopped)
        assert main(command(data, out.with_name("d.safetensors"), epochs=4)) == 75
    out.with_name("d.training").rename(out.with_name("c.training"))
    assert main(command(data, out)) == 0
    assert (out.with_name("c.training") / "step-00000001").is_dir()


def test_other_folder_is_neither_used_nor_removed(data, tmp_path, capsys):
    (tmp_path / "c.training").mkdir()
    assert main(command(data, tmp_path / "c.safetensors")) == 1
    assert "c.training exists and holds something else" in capsys.readouterr().err
    (tmp_path / "c.training").rmdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".lock").touch()
    (tmp_path / "c.training").symlink_to(tmp_path / "mine")
    assert main(command(data, tmp_path / "c.safetensors")) == 1
    assert os.listdir(tmp_path / "mine") == [".lock"]
