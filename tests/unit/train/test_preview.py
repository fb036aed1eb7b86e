"""Previews: a preview that fails, stops or kills the process never ends a run."""

import signal

import numpy as np
import pytest
from safetensors.torch import load_file

from selftrans.checkpoints import format as checkpoint
from selftrans.sampling.conditioning import LabelConditioning
from selftrans.sampling.images import SampledBatch
from selftrans.train.preview import Preview, captions
from selftrans.train.run import train
from selftrans.train.signals import Interrupted
from selftrans.types import Conditions
from tests.support import toy
from tests.support.processes import Killed
from tests.support.toy import quick  # noqa: F401 - a fixture


def test_previews_use_the_ema_in_eval_mode(tmp_path, monkeypatch):
    shown = []

    def make(self, model, path):
        shown.append((path.name, model.training, {k: v.clone() for k, v in model.state_dict().items()}))

    monkeypatch.setattr(Preview, "_make", make)
    train(toy.toy({"method": "vanilla", "train.preview_every": 3}), tmp_path, quiet=True)
    assert [name for name, *_ in shown] == ["step-00000003.png", "step-00000006.png", "step-00000008.png"]
    assert not any(training for _, training, _ in shown)
    saved = load_file(toy.checkpoint(tmp_path, "vanilla") / "ema.safetensors")
    toy.assert_same(shown[-1][2], saved)


def test_failed_preview_does_not_stop_training(tmp_path):
    small = {"method": "vanilla", "train.preview_every": 8, "sample.labels": (99,)}
    with pytest.warns(UserWarning, match="no preview at .*99"):
        train(toy.toy(small), tmp_path, quiet=True)


def test_captions_are_classes_or_prompts():
    batch = SampledBatch(np.arange(3), np.array([1, 0, 2]), np.zeros((3, 2, 2, 1), np.uint8))
    labels = LabelConditioning(Conditions("labels", 2))
    assert captions([batch, batch], labels, ["cat", "dog"]) == ["dog", "cat", "no class"] * 2
    assert captions([batch], LabelConditioning(Conditions("none"))) is None


PICTURED = {"method": "vanilla", "train.preview_every": 2, "train.checkpoint_every": 2}


def test_preview_that_kills_the_process_three_times_is_skipped(tmp_path, monkeypatch):
    original = Preview._make

    def killing(self, model, path):
        if "4" in path.name:
            raise Killed
        original(self, model, path)

    monkeypatch.setattr(Preview, "_make", killing)
    for _ in range(3):
        with pytest.raises(Killed):
            train(toy.toy(PICTURED), tmp_path, quiet=True)
    with pytest.warns(UserWarning, match="the process has ended 3 times while making it"):
        train(toy.toy(PICTURED), tmp_path, quiet=True)
    names = sorted(path.name for path in (tmp_path / "vanilla" / "previews").glob("*.png"))
    assert names == [f"step-0000000{k}.png" for k in (2, 6, 8)]


@pytest.mark.parametrize("step", [4, 8], ids=["on the way", "at the end"])
def test_killed_after_writing_a_preview(tmp_path, monkeypatch, step):
    original = Preview._make

    def killing(self, model, path):
        original(self, model, path)
        if path.name == f"step-0000000{step}.png":
            raise Killed

    monkeypatch.setattr(Preview, "_make", killing)
    with pytest.raises(Killed):
        train(toy.toy(PICTURED), tmp_path, quiet=True)
    train(toy.toy(PICTURED), tmp_path, quiet=True)  # it is not made again; otherwise this would raise Killed
    left = sorted(path.name for path in (tmp_path / "vanilla" / "previews").iterdir())
    assert left == [f"step-0000000{k}.png" for k in (2, 4, 6, 8)]


def test_stop_signal_interrupts_a_preview_and_restart_makes_due_ones(tmp_path, monkeypatch):
    original, passes = Preview._make, []

    def stopping(self, model, path):
        if "4" in path.name and not passes:
            passes.append(path)
            self.stop.received = signal.SIGTERM
        original(self, model, path)

    monkeypatch.setattr(Preview, "_make", stopping)
    with (
        pytest.warns(UserWarning, match="no preview at .*4.png: asked to stop"),
        pytest.raises(Interrupted, match="step 5"),
    ):
        train(toy.toy(PICTURED), tmp_path, quiet=True)
    train(toy.toy(PICTURED), tmp_path, quiet=True)
    assert len(list((tmp_path / "vanilla" / "previews").iterdir())) == 3  # all except the interrupted one
    (tmp_path / "vanilla" / "previews" / "step-00000008.png").unlink()
    train(toy.toy(PICTURED), tmp_path, quiet=True)
    assert (tmp_path / "vanilla" / "previews" / "step-00000008.png").exists()


def test_preview_errors_do_not_stop_training(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ModuleNotFoundError("no diffusers here")

    monkeypatch.setattr("selftrans.train.preview.load_autoencoder", broken)
    with pytest.warns(UserWarning, match="no preview at .*: no diffusers here"):
        train(toy.toy(PICTURED), tmp_path, quiet=True)
    assert checkpoint.newest(tmp_path / "vanilla" / "checkpoints").step == 8
