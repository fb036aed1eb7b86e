"""Runs on buckets of aspect ratios: both stages, resumed exactly, sampled in any size, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from selftrans.cli.main import main
from selftrans.data.prepare import prepare
from selftrans.train.run import train
from tests.support import captioned, ratios, toy
from tests.support.toy import quick  # noqa: F401 - a fixture

RUN = {"train.checkpoint_every": 3, "train.keep": 9, "train.batch_size": 4}


def config(dotted=None, data=None):
    return toy.toy(RUN | {"data.path": str(data or ratios.shared())} | (dotted or {}))


def shapes_seen(monkeypatch):
    """The shape of the latents of each micro-batch from now on."""
    from selftrans.train import trainer

    seen, original = [], trainer.to_batch

    def noting(*arguments):
        batch = original(*arguments)
        seen.append(tuple(batch.z0.shape))
        return batch

    monkeypatch.setattr(trainer, "to_batch", noting)
    return seen


def test_both_stages_train_on_every_shape_and_resume_bit_for_bit(tmp_path, monkeypatch):
    seen = shapes_seen(monkeypatch)
    train(config(), tmp_path / "whole", quiet=True)
    assert len(seen) == 2 * (4 + 8)
    assert {shape[2:] for shape in seen[:8]} == {shape[2:] for shape in seen[8:]} == {(6, 10), (8, 8), (10, 6)}
    assert seen[::2] == seen[1::2], "the micro-batches of a step are of one shape"
    copied = toy.copy(tmp_path / "whole", tmp_path / "resumed")
    for stage, last in (("stage1", 3), ("stage2", 0)):  # as if it had been killed in the first stage
        for folder in (copied / stage / "checkpoints").glob("step-*"):
            if int(folder.name[5:]) > last:
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()
    train(config(), copied, quiet=True)
    toy.assert_same_run(tmp_path / "whole", copied)


def test_one_bucket_trains_as_the_same_pictures_without_buckets(tmp_path):
    pictures = toy.pictures(tmp_path / "pictures", side=8)
    assert main(["prepare", str(pictures), "--out", str(tmp_path / "b"), "--resolution=8", "--buckets=3"]) == 0
    prepare(pictures, tmp_path / "p", resolution=8, progress=False)
    for name in "bp":
        train(config({"train.preview_every": 0}, tmp_path / name), tmp_path / f"run-{name}", quiet=True)
    for stage in ("stage1", "stage2"):
        toy.assert_same(toy.tensors(tmp_path / "run-b", stage), toy.tensors(tmp_path / "run-p", stage))
        assert toy.log(tmp_path / "run-b", stage) == toy.log(tmp_path / "run-p", stage)


@pytest.mark.parametrize("store", ["tokens", "ids"])
def test_captions_train_in_buckets_and_have_previews(store, tmp_path):
    data = ratios.with_captions(tmp_path, store)
    few = {"train.steps": 3, "stage1.steps": 2, "train.batch_size": 4, "train.preview_every": 3}
    report = train(captioned.config({"data.path": str(data)} | few), tmp_path / "run", quiet=True)
    assert report["student_steps"] == 3
    assert (tmp_path / "run" / "stage2" / "previews" / "step-00000003.png").exists()


def test_samples_have_the_size_that_is_asked_for(tmp_path, capsys):
    run = toy.finished()
    command = ["sample", str(run), "--num=2", "--steps=2"]
    assert main([*command, "--out", str(tmp_path / "wide"), "--size=6x10"]) == 0
    assert main([*command, "--out", str(tmp_path / "own"), "--size=8"]) == 0
    record, own = (json.loads((tmp_path / name / "samples.json").read_text()) for name in ("wide", "own"))
    assert record["shape"] == [2, 6, 10, 1] and record["settings"]["size"] == "6x10"
    assert own["shape"] == [2, 8, 8, 1] and "size" not in own["settings"]
    with np.load(tmp_path / "wide" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (2, 6, 10, 1)
    assert main([*command, "--out", str(tmp_path / "wide"), "--size=10x6"]) == 1
    assert "size: 6x10 there, 10x6 now" in capsys.readouterr().err
    for size, message in (
        ("7x8", "does not divide into patches"),
        ("8x", "should be a side"),
        ("0x8", "should be a side"),
    ):
        assert main([*command, "--out", str(tmp_path / "no"), f"--size={size}"]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "dotted, message",
    [
        ({"data.on_device": True}, "holds buckets of several sizes; leave data.on_device off"),
        ({"method": "repa", "repa.encoder": "owner/vit"}, "external encoder's features are on one square grid"),
        ({"method": "repa"}, "external encoder's features are on one square grid"),
        ({"model.patch": 4}, "does not divide into patches of 4"),
        (
            {"model.name": "diffusers-dit", "model.layers": 2, "model.heads": 2, "model.head_dim": 8, "model.patch": 2},
            "the model",
        ),
    ],
)
def test_what_needs_one_shape_is_refused_before_anything_is_written(dotted, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        train(config(dotted), tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_small_buckets_are_said_once(tmp_path):
    with pytest.warns(UserWarning, match="3 of the 3 buckets of .* have fewer pictures than the batch, 12") as said:
        train(config({"train.batch_size": 12, "method": "vanilla", "train.steps": 1}), tmp_path / "run", quiet=True)
    assert len([each for each in said if "buckets" in str(each.message)]) == 1


def test_other_data_in_any_bucket_end_a_run(tmp_path):
    data = ratios.prepared(tmp_path)
    settings = config({"method": "vanilla", "train.steps": 1}, data)
    train(settings, tmp_path / "run", quiet=True)
    for file in sorted((data / "10x6").iterdir()):
        file.unlink()
    (data / "10x6").rmdir()
    (data / "buckets.json").write_text('{"version": 1, "buckets": ["6x10", "8x8"]}')
    with pytest.raises(ValueError, match="was trained on other data"):
        train(settings, tmp_path / "run", quiet=True)
