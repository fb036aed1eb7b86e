"""Training of an autoencoder: interrupted anywhere it equals the uninterrupted one, bit for bit; bad steps, full disks."""

import contextlib
import dataclasses
import errno
import itertools
import json

import pytest
import torch

from selftrans import storage
from selftrans.checkpoints import format as checkpoint
from selftrans.data.buckets import open_data
from selftrans.data.prepare import prepare
from selftrans.train.autoencoder_network import AutoencoderLoss
from selftrans.train.autoencoder_settings import AutoencoderSettings
from selftrans.train.autoencoder_training import AutoencoderTraining, to_pixels
from selftrans.train.ema import EMA
from selftrans.train.log import JsonlLog, read_log
from selftrans.train.signals import Interrupted, StopSignal
from tests.support import ratios, toy
from tests.support.processes import Killed
from tests.support.toy import quick  # noqa: F401 - a fixture

TOY = AutoencoderSettings(factor=2, widths=(8, 8), attention=False, steps=6, batch_size=4, warmup=2).check()
CPU = torch.device("cpu")


class Bar:
    """A progress bar that shows nothing."""

    def __init__(self, *, total, initial, **_):
        self.total, self.count = total, initial

    def update(self, count=1):
        self.count += count

    def set_postfix(self, *_, **__):
        pass

    def close(self):
        pass


def training(folder, settings=TOY, data=None, **options):
    options = {"every": 2, "log_every": 2, "bar": Bar} | options
    return AutoencoderTraining(settings, open_data(data or toy.digits()), folder, CPU, **options)


def assert_same(a, b):
    toy.assert_same(toy.tensors(a, "."), toy.tensors(b, "."))
    assert toy.log(a, ".") == toy.log(b, ".")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    training(folder).run()
    return folder


def test_files_of_a_finished_training(uninterrupted):
    assert [step for step, _ in checkpoint.steps(uninterrupted / "checkpoints")] == [4, 6]
    tensors = toy.tensors(uninterrupted, ".")
    assert {name.partition("/")[0] for name in tensors} == {"autoencoder", "ema", "optimizer"}
    lines = read_log(uninterrupted / "log.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line.keys() == {"step", "loss", "l1", "kl", "grad_norm", "lr", "seconds"} for line in lines)
    assert [line["lr"] for line in lines] == [TOY.learning_rate(step) for step in (1, 3, 5)]


@pytest.mark.parametrize("variant", ["mirrored copies", "bf16", "buckets"])
def test_stopped_at_every_step(tmp_path, variant, uninterrupted):
    settings = dataclasses.replace(TOY, precision="bf16" if variant == "bf16" else "fp32")
    data = ratios.shared() if variant == "buckets" else None
    if variant != "mirrored copies":
        training(uninterrupted := tmp_path / "uninterrupted", settings, data).run()
    stop = StopSignal()
    stop.received = 15
    for step in range(1, TOY.steps):
        with pytest.raises(
            Interrupted, match=rf"stopped by SIGTERM at step {step}; checkpoint written in .*/run; the same"
        ):
            training(tmp_path / "run", settings, data, stop=stop).run()
    training(tmp_path / "run", settings, data, stop=stop).run()
    assert_same(tmp_path / "run", uninterrupted)


def half_a_file(tensors, path, **kwargs):
    path.write_bytes(b"\x08\x00\x00")


def half_a_line(log, line):
    log._file.write(json.dumps(line).encode()[:17])


PLACES = {
    "forward": (AutoencoderLoss, "forward", None),
    "between optimiser and average": (EMA, "update", None),
    "in a checkpoint's first file": (checkpoint, "save_file", half_a_file),
    "while a checkpoint is fsynced": (storage, "sync", None),
    "before old checkpoints are removed": (checkpoint, "prune", None),
    "in a log line": (JsonlLog, "write", half_a_line),
}


@pytest.mark.parametrize("place", PLACES)
def test_killed_at_many_places_equals_uninterrupted(tmp_path, monkeypatch, place, uninterrupted):
    owner, name, before = PLACES[place]
    original, calls = getattr(owner, name), itertools.count(1)

    def killing(*args, **kwargs):
        if next(calls) in (2, 3, 5):
            if before:
                before(*args, **kwargs)
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, killing)
    for _ in range(9):
        with contextlib.suppress(Killed):
            training(tmp_path).run()
            break
    monkeypatch.undo()
    assert next(calls) > 3
    training(tmp_path).run()
    assert_same(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lr": 1e-3, "channels": 2},
            "was started with other settings: channels was 4, is 2; lr was 0.0005, is 0.001; use",
        ),
        ({"perceptual": "0" * 64}, "perceptual was None, is 0000"),
        (
            {"steps": 5},
            "has trained for 6 steps already, more than the 5 asked for; give at least as many, or another --out",
        ),
    ],
)
def test_other_settings_are_refused_by_name(changes, message, uninterrupted):
    with pytest.raises(ValueError, match=message):
        training(uninterrupted, dataclasses.replace(TOY, **changes).check())


def test_other_data_are_refused(uninterrupted, tmp_path):
    prepare("digits", tmp_path / "unmirrored", progress=False)
    with pytest.raises(
        ValueError, match=r"was trained on other data than .*unmirrored; give the data it was trained on, or another"
    ):
        training(uninterrupted, data=tmp_path / "unmirrored")


def test_more_steps_continue_from_the_last_checkpoint(uninterrupted, tmp_path):
    copy = toy.copy(uninterrupted, tmp_path / "copy")
    longer = training(copy, dataclasses.replace(TOY, steps=8))
    assert longer.step == 6
    longer.run()
    assert [line["step"] for line in read_log(copy / "log.jsonl")] == [2, 4, 6, 8]


def broken_at(monkeypatch, *steps):
    """The loss of these 1-based steps becomes NaN."""
    original, calls = AutoencoderLoss.forward, itertools.count(1)

    def forward(self, pixels):
        loss, report = original(self, pixels)
        return (loss * torch.nan, report) if next(calls) in steps else (loss, report)

    monkeypatch.setattr(AutoencoderLoss, "forward", forward)


def test_update_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    broken_at(monkeypatch, 2)
    run = training(tmp_path)
    seen = []
    monkeypatch.setattr(
        EMA, "update", lambda self, step: seen.append([p.clone() for p in run.objective.vae.parameters()])
    )
    with pytest.warns(UserWarning, match="1 update up to step 2 was not finite and skipped"):
        run.run()
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))
    lines = read_log(tmp_path / "log.jsonl")
    assert [line.get("skipped") for line in lines] == [1, None, None]


def test_no_finite_updates_end_the_training(tmp_path, monkeypatch):
    broken_at(monkeypatch, 3, 4)
    with pytest.raises(
        FloatingPointError, match=r"the last 2 updates .* up to step 4, had no finite gradient; choose a lower"
    ):
        training(tmp_path).run()
    assert checkpoint.newest(tmp_path / "checkpoints").step == 2


def test_training_continues_on_a_full_disk_but_does_not_end_without_a_checkpoint(tmp_path, monkeypatch, uninterrupted):
    original, calls = checkpoint.save_file, itertools.count(1)

    def full(*args, **kwargs):
        if next(calls) == 4 or full.from_now_on:  # the first file of the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    full.from_now_on = False
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.warns(UserWarning, match="No space left.*training continues, earlier checkpoints stay valid"):
        training(tmp_path / "a").run()
    assert_same(tmp_path / "a", uninterrupted)
    full.from_now_on = True
    with (
        pytest.warns(UserWarning, match="No space left"),
        pytest.raises(OSError, match=r"No space left.*; free disk space, then the same command continues"),
    ):
        training(tmp_path / "b").run()


def test_each_copy_of_a_picture_is_used():
    moments = torch.arange(2.0).view(1, 2, 1, 1, 1).expand(400, 2, 1, 4, 4)
    torch.manual_seed(0)
    chosen = to_pixels(moments, CPU)
    assert chosen.shape == (400, 1, 4, 4) and chosen.dtype == torch.float32
    assert (chosen == chosen[:, :, :1, :1]).all() and 150 < chosen[:, 0, 0, 0].sum() < 250
