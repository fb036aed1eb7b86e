"""Held-out samples in a run: never trained on, from every kind of data; their loss is logged and changes no training."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch._dynamo.utils import counters

from selftrans.cli.main import main
from selftrans.config import RunConfig
from selftrans.data.buckets import open_data
from selftrans.data.dataset import Dataset
from selftrans.data.held_out import held_out_rows
from selftrans.data.on_device import OnDevice
from selftrans.data.prepare import prepare
from selftrans.data.windows import window_order
from selftrans.methods.fixed_draws import PATH, POSTERIOR, fixed_noise, fixed_times
from selftrans.methods.registry import stages
from selftrans.train import held_out_loss, training_step
from selftrans.train.batches import Loaded, Stream
from selftrans.train.captured_step import CapturedStep
from selftrans.train.dry_run import dry_run
from selftrans.train.dry_run_report import text
from selftrans.train.run import train
from selftrans.train.run_report import held_out_line
from selftrans.train.signals import Interrupted, StopSignal
from selftrans.train.trainer import Trainer
from selftrans.types import Batch
from tests.support import captioned, pictures, ratios, served, text_runs, toy
from tests.support.processes import spawn
from tests.support.toy import quick  # noqa: F401 - a fixture
from tests.unit.methods import test_repa

FEW = {"method": "vanilla", "train.steps": 4, "log.every": 1, "log.held_out_every": 2, "data.held_out": 0.25}


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out_loss, "DRAWS", 64)


def trained_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the rows of all batches that are trained on from now on, in this process."""
    rows: list[int] = []

    to_batch, fill = training_step.to_batch, CapturedStep._fill

    def watched(loaded: Loaded, *more: Any) -> Batch:
        rows.extend(loaded.rows.tolist())
        return to_batch(loaded, *more)

    def watched_fill(self: CapturedStep, loaded: Loaded) -> None:
        rows.extend(loaded.rows.tolist())
        fill(self, loaded)

    monkeypatch.setattr(training_step, "to_batch", watched)
    monkeypatch.setattr(CapturedStep, "_fill", watched_fill)
    return rows


def losses(run: Path, stage: str = "vanilla") -> dict[int, tuple[float, float]]:
    """step => the loss of held-out samples, and of others."""
    lines = toy.log(run, stage)
    return {line["step"]: (line["held_out_loss"], line["trained_loss"]) for line in lines if "held_out_loss" in line}


def config_of(kind: str, folder: Path) -> RunConfig:
    if kind == "buckets":
        return toy.toy(FEW | {"data.path": str(ratios.shared())})
    if kind == "captions":
        return text_runs.text_toy(FEW)
    if kind == "ids":
        return text_runs.text_toy(FEW, captioned.prepared(folder / "ids", store="ids"))
    if kind == "features":
        return toy.toy(FEW | {"method": "repa", "repa.head_width": 16, "data.path": str(test_repa.with_features())})
    if kind == "windows":
        return toy.toy(FEW | {"data.path": str(served.folder_of(folder / "data")), "data.window": 2})
    return toy.toy(FEW | {"on device": {"data.on_device": True}, "captured": {"train.capture": "on"}}.get(kind, {}))


@pytest.mark.parametrize(
    "kind", ["mirrored", "on device", "captured", "buckets", "captions", "ids", "windows", "features"]
)
def test_no_sample_that_is_held_out_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    config, rows = config_of(kind, tmp_path), trained_rows(monkeypatch)
    train(config, tmp_path / "run", quiet=True)
    (stage,), dataset = stages(config), open_data(str(config.data.path))
    expected = held_out_rows(dataset, 0.25)
    assert expected is not None and len(rows) == 32 and not set(rows) & set(expected)
    found = losses(tmp_path / "run", stage.name)
    assert list(found) == [2, 4] and np.isfinite([*found.values()]).all()
    report = json.loads((tmp_path / "run" / "run.json").read_text())
    assert report["stages"][0]["held_out"] == {
        "samples": len(expected),
        "held_out_loss": found[4][0],
        "trained_loss": found[4][1],
    }
    line = held_out_line(report)
    assert line is not None and f"{found[4][0]:.4g} on the held-out samples ({len(expected)})" in line


def test_epochs_read_all_other_rows_once(tmp_path: Path) -> None:
    digits, windowed = Dataset.open(toy.digits()), served.folder_of(tmp_path / "data")
    with served.serving(windowed) as server:
        for data, window in (
            (digits, None),
            (OnDevice(digits, "cpu"), None),
            (open_data(ratios.shared()), None),
            (open_data(str(windowed)), 2),
            (open_data(server.url), 2),
        ):
            rows = held_out_rows(data, 0.25)
            assert rows is not None
            stream = Stream(data, batch_size=1, accumulate=1, seed=3, window=window, held_out=rows)
            kept = np.delete(np.arange(len(data)), rows)
            for epoch in range(2):
                at = [int(stream.indices(epoch * len(kept) + k, 0)[0]) for k in range(len(kept))]
                assert sorted(at) == kept.tolist() and at != sorted(at)
        batches = Stream(data, batch_size=9, accumulate=1, seed=3, window=2, held_out=rows).from_step(0)
        read = np.concatenate([next(batches).rows for _ in range(5)])
        assert sorted(read) == kept.tolist(), "an epoch of 45 rows of the URL"


def test_streamed_run_measures_what_a_local_one_does(tmp_path: Path) -> None:
    """Also where the cache holds a part of the data only."""
    folder = served.folder_of(tmp_path / "data", shards=8)
    small = {"data.cache_dir": str(tmp_path / "cache"), "data.cache_gb": 6e-5}  # of 7.4e-5
    for name, dotted in (("streamed", {"data.path": folder.as_uri(), **small}), ("local", {"data.path": str(folder)})):
        train(toy.toy(FEW | {"data.window": 2} | dotted), tmp_path / name, quiet=True)
    assert toy.log(tmp_path / "streamed", "vanilla") == toy.log(tmp_path / "local", "vanilla")
    assert list(losses(tmp_path / "streamed")) == [2, 4]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors")) <= 6e4


def test_windows_without_rows_are_left_out() -> None:
    order = window_order((5, 3, 4), 1, (3, 1), left_out=np.array([5, 6, 7, 0]))
    full = window_order((5, 3, 4), 1, (3, 1))
    assert sorted(order.rows) == [1, 2, 3, 4, 8, 9, 10, 11] and order.shards == full.shards
    assert [row for row in full.rows if row not in (5, 6, 7, 0)] == order.rows.tolist()
    shard_of = [order.shards[order.window_at(at)][0] for at in range(8)]
    assert shard_of == [0 if row < 5 else 2 for row in order.rows]


def test_without_the_setting_nothing_is_measured(tmp_path: Path) -> None:
    train(toy.toy(FEW | {"data.held_out": 0.0}), tmp_path, quiet=True)
    assert losses(tmp_path) == {}
    assert held_out_line(json.loads((tmp_path / "run.json").read_text())) is None


@pytest.mark.parametrize("method", ["vanilla", "self_transcendence", "sra"])
def test_measuring_changes_no_number_of_the_training(tmp_path: Path, method: str) -> None:
    small = FEW | {"method": method, "stage1.steps": 2, "sra.head_width": 16, "log.every": 2}
    for name, every in (("at the end", 100), ("often", 1)):
        train(toy.toy(small | {"log.held_out_every": every}), tmp_path / name, quiet=True)
    for stage in (each.name for each in stages(toy.toy(small))):
        toy.assert_same(toy.tensors(tmp_path / "often", stage), toy.tensors(tmp_path / "at the end", stage))
        lines = [toy.log(tmp_path / name, stage) for name in ("often", "at the end")]
        measured = {"held_out_loss", "trained_loss", "seconds"}
        plain = [[{k: v for k, v in line.items() if k not in measured} for line in each] for each in lines]
        assert plain[0] == plain[1]
        last = max(losses(tmp_path / "often", stage))
        assert losses(tmp_path / "at the end", stage) == {last: losses(tmp_path / "often", stage)[last]}


def trainer_of(config: RunConfig, folder: Path) -> Trainer:
    (stage,) = stages(config)
    accelerator = Accelerator(cpu=True)
    return Trainer(accelerator, config, stage, folder / stage.name, open_data(str(config.data.path)))


def test_loss_is_that_of_the_average_at_the_fixed_draws(tmp_path: Path) -> None:
    """Computed sample by sample, on data with a posterior, of which the first copy is measured."""
    path = served.folder_of(tmp_path / "data")
    trainer = trainer_of(toy.toy(FEW | {"data.path": str(path), "data.held_out": 0.1}), tmp_path)
    with torch.no_grad():
        for parameter in trainer.ema.model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    data, measured = trainer.shards, trainer.held_out
    rows = held_out_rows(data, 0.1)
    assert measured is not None and rows is not None and len(rows) == measured.samples == 6
    state = torch.get_rng_state()
    found = measured.measure()
    assert measured.measure() == found and torch.equal(torch.get_rng_state(), state)
    times, total = fixed_times(trainer.objective, 64), {"held_out_loss": 0.0, "trained_loss": 0.0}
    for name, chosen in zip(total, measured._rows, strict=True):
        assert set(chosen) == (set(rows) if name == "held_out_loss" else set(range(60)) - set(rows))
        for draw, row in enumerate(chosen.tolist()):
            stored = data.read(np.array([row]))
            mean, std = stored["moments"][:, 0].float().chunk(2, dim=1)
            space = data.manifest.latent_space
            z0 = (mean + std * fixed_noise([draw], (2, 8, 8), POSTERIOR) - space.shift) * space.scale
            noise, t = fixed_noise([draw], (2, 8, 8), PATH), times[draw]
            with torch.no_grad():
                v = trainer.ema.model((1 - t) * z0 + t * noise, t.view(1), stored["labels"]).v
            total[name] += float((v - (noise - z0)).square().mean()) / 64
    assert found == pytest.approx(total, rel=1e-5) and found["held_out_loss"] != found["trained_loss"]


def test_compiled_blocks_are_not_compiled_for_it(tmp_path: Path) -> None:
    """The average has blocks of its own, which are not compiled."""
    plain, compiled = (
        trainer_of(toy.toy(FEW | {"train.compile": on}), tmp_path / str(on)).held_out for on in (False, True)
    )
    assert plain is not None and compiled is not None
    before = dict(counters["frames"])
    assert compiled.measure() == plain.measure() and dict(counters["frames"]) == before


def test_continued_run_logs_the_same_numbers_and_keeps_the_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy.toy(FEW | {"log.held_out_every": 1})
    train(config, tmp_path / "whole", quiet=True)
    asked = StopSignal.asked
    for at in (1, 2):
        calls: list[int] = []
        monkeypatch.setattr(StopSignal, "asked", lambda *_, c=calls, at=at: c.append(0) or len(c) == at)
        with contextlib.suppress(Interrupted):
            train(config, tmp_path / "stopped", quiet=True)
    monkeypatch.setattr(StopSignal, "asked", asked)
    train(config, tmp_path / "stopped", quiet=True)
    found, expected = losses(tmp_path / "stopped"), losses(tmp_path / "whole")
    assert list(expected) == [1, 2, 3, 4]
    assert found == {2: expected[2], 4: expected[4]}, (
        "a stop signal, at steps 1 and 3, leaves time for a checkpoint only"
    )
    report = (tmp_path / "stopped" / "run.json").read_text()
    train(config, tmp_path / "stopped", quiet=True)  # no step is left
    again = json.loads((tmp_path / "stopped" / "run.json").read_text())
    assert again["stages"][0]["held_out"] == json.loads(report)["stages"][0]["held_out"]
    with pytest.raises(ValueError, match=r"data.held_out was 0.25, is 0.2; use those, or another --out$"):
        train(toy.toy(FEW | {"data.held_out": 0.2}), tmp_path / "stopped", quiet=True)


def test_line_that_is_due_is_the_first_at_or_after_each_multiple(tmp_path: Path) -> None:
    trainer = trainer_of(toy.toy(FEW | {"log.every": 100, "log.held_out_every": 250}), tmp_path)
    due = []
    for trainer.step in range(100, 1100, 100):
        assert trainer.held_out is not None
        due += [trainer.step] if trainer.held_out.due() else []
    assert due == [300, 500, 800, 1000]


def test_share_that_leaves_nothing_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    prepare(
        pictures.write(tmp_path / "one", {"a.png": pictures.encoded(pictures.noise())}), tmp_path / "p", progress=False
    )
    one = {"data.path": str(tmp_path / "p"), "model.patch": 4}
    with pytest.raises(ValueError, match=r"data.held_out 0.25 leaves nothing to train on: \S+ has no second picture"):
        train(toy.toy(FEW | one), tmp_path / "refused", quiet=True)
    assert not (tmp_path / "refused").exists()
    data = served.folder_of(tmp_path / "data", shards=1)
    with pytest.raises(ValueError, match=r"data.held_out must be a share in \[0, 1\), not 1.0"):
        train(toy.toy(FEW | {"data.held_out": 1.0}), tmp_path / "run", quiet=True)
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["count"] == 10
    train(
        toy.toy(FEW | {"data.path": str(data), "data.held_out": 0.99, "train.steps": 1}), tmp_path / "run", quiet=True
    )
    report = json.loads((tmp_path / "run" / "run.json").read_text())
    assert report["stages"][0]["held_out"]["samples"] == 9, "one is left"


def test_dry_run_and_command_say_how_many_are_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = dry_run(toy.toy(FEW), tmp_path / "run")
    assert found.held_out == 449 and "1,797 samples, 449 of them held out, batches of 8" in text(found)
    flags = toy.flags({"train.steps": 1, "data.held_out": 0.25})
    kept = [flag for flag in flags if not flag.startswith(("--stage", "--log.tensorboard"))]
    assert (
        main(["train", "digits", f"--out={tmp_path / 'run'}", f"--data={toy.digits()}", "--method=vanilla", *kept]) == 0
    )
    said = capsys.readouterr().out
    assert "no guidance, 449 samples held out ->" in said and " on the held-out samples (449), " in said


def measured_in(rank: int, folder: str, data: str, several: str, sharded: bool) -> None:
    """One of several processes: the losses at the start of a run, of digits and of buckets."""
    held_out_loss.DRAWS = 64
    found = []
    for path in (data, several):
        config = toy.toy(FEW | {"data.path": path, "train.shard": sharded, "train.accumulate": 1})
        trainer = trainer_of(config, Path(folder, "run"))
        assert trainer.held_out is not None
        found += [trainer.held_out.measure(), trainer.held_out.measure()]
    if rank == 0:
        Path(folder, f"found-{sharded}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_several_processes_measure_the_same_numbers(tmp_path: Path, sharded: bool) -> None:
    paths = {"digits": toy.digits(), "buckets": ratios.shared()}
    spawn(measured_in, str(tmp_path), *map(str, paths.values()), sharded, world=2)
    found = json.loads((tmp_path / f"found-{sharded}.json").read_text())
    for k, (kind, path) in enumerate(paths.items()):
        dotted = {"data.path": str(path), "train.accumulate": 1}
        trainer = trainer_of(toy.toy(FEW | dotted), tmp_path / kind)
        assert trainer.held_out is not None
        expected = trainer.held_out.measure()
        assert found[2 * k] == pytest.approx(expected, rel=1e-5) and found[2 * k + 1] == found[2 * k]
