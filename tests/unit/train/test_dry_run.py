"""`selftrans train --dry-run`: its numbers against the run itself, and that nothing is written."""

import os

import pytest

from selftrans.checkpoints import format as checkpoint
from selftrans.cli.main import main
from selftrans.train.dry_run import dry_run, duration, gigabytes
from tests.support import toy
from tests.support.toy import quick  # noqa: F401 - a fixture


def test_numbers_are_those_of_the_run(tmp_path):
    run = toy.copy(toy.finished(), tmp_path / "run")
    before = toy.tree(run)
    found = dry_run(toy.toy({"train.steps": 10, "train.capture": "on"}), run, steps=2)
    assert toy.tree(run) == before
    log, last = toy.log(run), checkpoint.newest(run / "stage2" / "checkpoints")
    assert last is not None
    first, second = found.stages
    assert (first.steps, first.reached, second.steps, second.reached) == (4, 4, 10, 8)
    assert first.seconds_left == 0 and second.seconds_left == pytest.approx(2 * second.seconds_per_step)
    size = sum(file.stat().st_size for file in last.path.glob("*.safetensors"))
    assert second.checkpoint == pytest.approx(size, rel=0.2)
    assert second.tflops_per_step * 8 >= log[-1]["tflops"] > 0  # guidance ends before the last step
    assert found.disk_needed > 0 and found.memory_total and second.peak < found.memory_total


def test_command_writes_nothing(tmp_path, monkeypatch, capsys):
    """Slow steps, as here after 0 s, are two for each stage; a bar shows them while they last."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("selftrans.train.dry_run.LIMIT", 0.0)
    assert main(["train", "digits", "--out=run", "--dry-run", f"--data={toy.digits()}", *toy.flags()]) == 0
    shown, bars = capsys.readouterr()
    assert "stage1: 4 steps" in bars and " 2/4 " in bars and " 3/4 " not in bars
    assert "nothing was written; the run will write to run:" in shown and "stage2/checkpoints/" in shown
    assert "steps/s" in shown and "GB free" in shown and os.listdir(tmp_path) == []
    assert main(["train", "digits", "--out=run", "--dry-run", *toy.flags(), "--model.heads=7"]) == 1
    assert os.listdir(tmp_path) == []


def test_units():
    assert [duration(s) for s in (0, 40, 7500, 97_500)] == ["0 s", "40 s", "2 h 5 min", "1 d 3 h"]
    assert [gigabytes(size) for size in (5e6, 1.234e9)] == ["5 MB", "1.23 GB"]
