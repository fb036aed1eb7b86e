"""`selftrans train --dry-run`: its numbers against the run itself, and that nothing is written."""

import json
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import numpy as np
import pytest

from selftrans.checkpoints import format as checkpoint
from selftrans.cli.main import main
from selftrans.data.buckets import open_data
from selftrans.data.streaming.shard_cache import CacheOptions
from selftrans.train.capture_rules import ENDED, NotCaptured
from selftrans.train.dry_run import _extrapolated, dry_run
from selftrans.train.dry_run_report import text
from selftrans.train.run_data import Transfer
from selftrans.train.trainer import Trainer
from tests.support import toy
from tests.support.served import ROWS, folder_of, serving
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
    """Slow steps, as here after 0 s, are two for each stage; on a terminal a bar shows them while they last."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("selftrans.train.dry_run.LIMIT", 0.0)
    assert main(["train", "digits", "--out=run", "--dry-run", f"--data={toy.digits()}", *toy.flags()]) == 0
    shown, bars = capsys.readouterr()
    assert "stage1: 4 steps" in bars and " 2/4 " in bars and " 3/4 " not in bars
    assert "nothing was written; the run will write to run:" in shown and "stage2/checkpoints/" in shown
    assert "steps/s" in shown and "GB free" in shown and os.listdir(tmp_path) == []
    assert main(["train", "digits", "--out=run", "--dry-run", *toy.flags(), "--model.heads=7"]) == 1
    assert os.listdir(tmp_path) == []


def test_slow_steps_on_a_cpu_have_fewer_samples(tmp_path, monkeypatch, capsys):
    """Steps of 2 and 4 samples in place of 8; the numbers of the whole batch are extrapolated, and the text says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("selftrans.train.dry_run.CPU_FLOPS", 1.0)
    seen = []
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, batches: step(self, _counted(batches, seen)))
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


def test_dry_run_describes_steps_on_a_gpu_as_the_run_does(tmp_path, monkeypatch):
    """Also where CUDA has ended a recording of the run before. On a CPU there is no such line."""
    small = toy.toy({"train.steps": 2, "stage1.steps": 2})
    assert "steps  " not in text(dry_run(small, tmp_path, steps=1))
    (tmp_path / ENDED).touch()
    monkeypatch.setattr("selftrans.train.dry_run.description", lambda one: str((one.directory.parent / ENDED).exists()))
    found = dry_run(small, tmp_path, steps=1)
    assert [stage.capture for stage in found.stages] == ["True", "True"] and text(found).count(
        "  steps       True\n"
    ) == 2


def test_dry_run_continues_in_a_new_process_where_graphs_end_this_one(tmp_path, monkeypatch):
    """Its steps are launched one by one, and the text says so; without a new process the first error is raised."""

    def ended(trainer, batches):
        raise NotCaptured("the step cannot be recorded; use --train.capture off", reason)

    reason = "CUDA ended the recording"
    monkeypatch.setattr("selftrans.train.dry_run.guarded_step", ended)  # in this process
    small = toy.toy({"train.steps": 2, "stage1.steps": 2, "train.capture": "auto"})
    found = dry_run(small, tmp_path / "run", steps=1)
    assert [stage.name for stage in found.stages] == ["stage1", "stage2"] and not (tmp_path / "run").exists()
    assert all(stage.seconds_per_step > 0 for stage in found.stages)
    assert (
        f"  steps       launched one by one: {reason}; the run ends once at this point, and uses no graphs when"
        in text(found)
    )
    broken = SimpleNamespace(get_context=lambda _: raising(BrokenProcessPool()))
    monkeypatch.setattr("selftrans.train.dry_run.multiprocessing", broken)
    with pytest.raises(NotCaptured, match=r"^the step cannot be recorded; use --train[^\n]*off$"):
        dry_run(small, tmp_path / "run", steps=1)


def raising(error):
    raise error


def test_extrapolation_is_linear_in_the_samples():
    """A step takes 3 s and 0.5 s a sample; the first of 4 and 8 samples in turn is a warm-up."""
    assert _extrapolated([99.0, 7.0, 5.0, 7.0, 5.0], 4, 256) == pytest.approx(3 + 0.5 * 256)
    assert _extrapolated([99.0, 7.0], 4, 256) == pytest.approx(7 * 32)  # two steps: in proportion
    assert _extrapolated([99.0, 4.0, 5.0], 4, 256) == pytest.approx(4 * 32)  # noise
    assert _extrapolated([6.0], 4, 256) == pytest.approx(6 * 64)  # a stage of one step


def test_data_on_the_device_as_in_the_run(tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr("selftrans.train.run_data.OnDevice", lambda shards, device: held.append(device.type) or shards)
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("data") / "a", 8)


SIZE = ROWS * (4 * 64 * 2 + 8) + 4096  #: bytes of a shard


def rehearsed(server, cache, monkeypatch, *, shards=9.0, window=None):
    """The result of a dry run with a cache of so many shards, and the shards from which its two batches come."""
    read = set()

    def step(trainer, batches):
        for _ in range(2):
            loaded = next(batches)
            rows = loaded.tensors["moments"][:, 0, 0, 0, 0]  # folder_of writes their numbers there
            assert (loaded.tensors["labels"] == rows.long() // ROWS).all() and len(rows) == len(loaded.rows)
            read.update((rows.long() // ROWS).tolist())

    monkeypatch.setattr("selftrans.train.dry_run.guarded_step", step)
    small = {"model.width": 16, "model.depth": 2, "stage1.block": 1, "method": "vanilla", "data.builtin": None}
    url = {"data.path": server.url, "data.cache_dir": str(cache), "data.cache_gb": shards * SIZE / 1e9}
    server.asked.clear()
    found = dry_run(toy.toy(small | url | {"data.window": window}), cache / "run", steps=1)
    return found, read, [name for name in server.asked if name.startswith("shard") and "bytes" not in name]


def test_one_shard_at_a_url_is_fetched_and_the_text_names_what_the_run_fetches(folder, tmp_path, monkeypatch, capsys):
    with serving(folder) as server:
        found, read, fetched = rehearsed(server, tmp_path / "a", monkeypatch)
        assert fetched == ["shard-00000.safetensors"] and read == {0}
        assert found.fetched == Transfer(8, 8 * SIZE, SIZE, 9 * SIZE, None) and found.samples == 80
        assert capsys.readouterr().out.startswith("data: 8 shards, 74.4 kB, of http://127.0.0.1")
        said = (
            "data: 8 shards, 74.4 kB, of which the cache holds 9.3 kB; the dry run reads one shard: the run fetches 65"
        )
        assert said in text(found) and len(server.asked) == 1 + 8 + 1, "the manifest, labels and a shard"
        server.sent = 0
        _, _, fetched = rehearsed(server, tmp_path / "a", monkeypatch)
        assert not fetched and server.sent == (folder / "manifest.json").stat().st_size


def test_shards_that_the_cache_holds_are_read(folder, tmp_path, monkeypatch):
    """With one shard in the cache its rows in place of the first shard; with all shards the batches of the run."""
    with serving(folder) as server:
        data = open_data(server.url, cache=CacheOptions(str(tmp_path), 1e-3))
        data.prefetch((5,), ())
        assert (data.read(np.arange(50, 60))["labels"] == 5).all()
        found, read, fetched = rehearsed(server, tmp_path, monkeypatch)
        assert not fetched and read == {5} and found.fetched.cached == SIZE
        data.fetch(progress=False)
        for window in (None, 2):
            found, read, fetched = rehearsed(server, tmp_path, monkeypatch, window=window)
            assert not fetched and len(read) > 1 and found.fetched.cached == found.fetched.bytes
            assert "all of them in the cache: the run fetches none" in text(found)


@pytest.mark.parametrize(("shards", "window", "said"), [(6.5, None, "up to 74.4 kB in every epoch"), (9, 2, "65.1 kB")])
def test_dry_run_of_windows_fetches_one_shard(folder, tmp_path, monkeypatch, shards, window, said):
    with serving(folder) as server:
        found, read, fetched = rehearsed(server, tmp_path, monkeypatch, shards=shards, window=window)
        assert len(fetched) == 1 and read == {0} and found.fetched.window == 2
        assert f"the run fetches {said}" in text(found) and "while it trains" in text(found)


def test_data_on_this_machine_are_read_as_in_the_run(folder, tmp_path, monkeypatch, capsys):
    found, read, _ = rehearsed(SimpleNamespace(url=str(folder), asked=[]), tmp_path, monkeypatch)
    assert len(read) > 1 and found.fetched is None and "data:" not in text(found) + capsys.readouterr().out
