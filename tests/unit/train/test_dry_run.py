"""`selftrans train --dry-run`: its numbers against the run itself, and that nothing is written."""

import json
import os

import pytest

from selftrans.checkpoints import format as checkpoint
from selftrans.cli.main import main
from selftrans.train.dry_run import _extrapolated, dry_run, duration, gigabytes
from selftrans.train.trainer import Trainer
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


def test_slow_steps_on_a_cpu_have_fewer_samples(tmp_path, monkeypatch, capsys):
    """2 and 4 samples at a time in place of 8, in two parts; what is said of the whole batch is extrapolated, and says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("selftrans.train.dry_run.CPU_FLOPS", 1.0)
    seen = []
    step = Trainer._train_step
    monkeypatch.setattr(Trainer, "_train_step", lambda self, batches: step(self, _counted(batches, seen)))
    argv = [
        "train",
        "digits",
        "--out=run",
        "--dry-run",
        f"--data={toy.digits()}",
        *toy.flags(),
        "--train.batch-size=16",
    ]
    assert main([*argv, "--dry-run-json=plan.json", "--data.on-device", "True"]) == 0
    assert seen[:8] == [2, 2, 4, 4, 2, 2, 4, 4] and set(seen) == {2, 4}
    assert "extrapolated from 2 and 4 samples at a time" in capsys.readouterr().out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["micro_batch"] == 8 and [stage["samples"] for stage in found["stages"]] == [2, 2]
    assert all(stage["seconds_per_step"] > 0 and stage["peak"] > 0 for stage in found["stages"])
    assert os.listdir(tmp_path) == ["plan.json"]
    assert main([word for word in argv if word != "--dry-run"] + ["--dry-run-json=plan.json"]) == 1
    assert "--dry-run-json belongs to --dry-run" in capsys.readouterr().err
    assert main([*argv, "--dry-run-json=plan.json/x"]) == 1


def _counted(batches, seen):
    for loaded in batches:
        assert all(len(tensor) == len(loaded.rows) for tensor in loaded.tensors.values())
        seen.append(len(loaded.rows))
        yield loaded


def test_extrapolation_is_linear_in_the_samples():
    """A step takes 3 s and 0.5 s a sample; the first of 4 and 8 samples in turn is a warm-up."""
    assert _extrapolated([99.0, 7.0, 5.0, 7.0, 5.0], 4, 256) == pytest.approx(3 + 0.5 * 256)
    assert _extrapolated([99.0, 7.0], 4, 256) == pytest.approx(7 * 32)  # two steps: in proportion
    assert _extrapolated([99.0, 4.0, 5.0], 4, 256) == pytest.approx(4 * 32)  # noise


def test_data_on_the_device_as_in_the_run(tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr("selftrans.train.run.OnDevice", lambda shards, device: held.append(device.type) or shards)
    dry_run(toy.toy({"data.on_device": True}), tmp_path / "run", steps=1)
    assert held == ["cpu"]


def test_data_at_a_url_are_fetched_before_the_steps_and_blocks_recomputed_as_in_the_run(tmp_path, monkeypatch):
    held, chosen = [], []

    def step(trainer, batches):
        held.append(len(list((tmp_path / "cache").glob("*.safetensors"))))
        chosen.append(trainer.objective.student.recompute)
        next(batches), next(batches)

    monkeypatch.setattr("selftrans.train.dry_run.guarded_step", step)
    monkeypatch.setattr("selftrans.train.batches.Stream.from_step", lambda *_, **__: iter(range(99)))
    monkeypatch.setattr("selftrans.train.dry_run._first_rows", lambda batches, count: batches)
    url = {"data.path": toy.digits().as_uri(), "data.cache_dir": str(tmp_path / "cache"), "train.recompute": 2}
    dry_run(toy.toy(url), tmp_path / "run", steps=1)
    assert min(held) > 0 and set(chosen) == {frozenset({1, 2})}


def test_units():
    assert [duration(s) for s in (0, 40, 7500, 97_500)] == ["0 s", "40 s", "2 h 5 min", "1 d 3 h"]
    assert [gigabytes(size) for size in (5e6, 1.234e9)] == ["5 MB", "1.23 GB"]
