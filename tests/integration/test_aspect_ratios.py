"""Runs on buckets of aspect ratios: both stages, resumed exactly, sampled in any size, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from selftrans.cli.main import main
from selftrans.data.buckets import open_data
from selftrans.data.prepare import prepare
from selftrans.evaluate.classifier import SmallClassifier
from selftrans.evaluate.metrics import frechet_distance
from selftrans.evaluate.statistics import Moments
from selftrans.experiments import evaluate_samples
from selftrans.experiments.comparison import measurement
from selftrans.sampling.images import Sampler
from selftrans.sampling.sized_sampler import SizedSampler
from selftrans.train.run import train
from tests.support import captioned, ratios, toy
from tests.support.toy import quick  # noqa: F401 - a fixture

RUN = {"train.checkpoint_every": 3, "train.keep": 9, "train.batch_size": 4}


def config(dotted=None, data=None):
    return toy.toy(RUN | {"data.path": str(data or ratios.shared())} | (dotted or {}))


def shapes_seen(monkeypatch):
    """The shape of the latents of each micro-batch from now on."""
    from selftrans.train import training_step

    seen, original = [], training_step.to_batch

    def noting(*arguments):
        batch = original(*arguments)
        seen.append(tuple(batch.z0.shape))
        return batch

    monkeypatch.setattr(training_step, "to_batch", noting)
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
def test_captions_train_in_buckets_have_previews_and_are_sampled_in_their_sizes(store, tmp_path, monkeypatch):
    data = ratios.with_captions(tmp_path, store)
    few = {"train.steps": 3, "stage1.steps": 2, "train.batch_size": 4, "train.preview_every": 3}
    report = train(captioned.config({"data.path": str(data)} | few), tmp_path / "run", quiet=True)
    assert report["student_steps"] == 3
    assert (tmp_path / "run" / "stage2" / "previews" / "step-00000003.png").exists()
    monkeypatch.setattr(evaluate_samples, "load_extractor", lambda *_, **__: Colours())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = evaluate_samples.evaluate_samples(tmp_path / "run", data, None, settings={"num": 24, "steps": 2})["made"]
    assert made["sizes"] == ratios.COUNTS and made["captions"] == str(data)


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
        ({"model.patch": 4}, r"does not divide into patches of 4.*--bucket-multiple"),
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


class Colours:
    """Mean and deviation of each colour: features of pictures of any size."""

    name, sha256, dim, pictures, head = "colours", "0" * 64, 6, True, False

    def __call__(self, images):
        flat = images.reshape(len(images), -1, 3).astype(np.float64)
        return {"features": np.concatenate([flat.mean(axis=1), flat.std(axis=1)], axis=-1)}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run of one step, without guidance."""
    out = tmp_path_factory.mktemp("short") / "run"
    train(config({"method": "vanilla", "train.steps": 1, "train.preview_every": 0}), out, quiet=True)
    return out


def distance_by_hand(run, count, steps):
    """Of all pictures of the data, whose pixels are stored as they are, and of images sampled in their sizes."""
    data = open_data(ratios.shared())
    real = [((part.read(range(8), ["moments"])["moments"][:, 0, :3] + 1) * 127.5).round() for part in data.buckets]
    reference = np.concatenate([Colours()(x.permute(0, 2, 3, 1).numpy())["features"] for x in real])
    sized = SizedSampler(Sampler.load(run, {"num": count, "steps": steps}), data)
    sampled = np.concatenate([Colours()(batch.images)["features"] for batch in sized.sample()])
    return frechet_distance(*(Moments(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (sampled, reference)))


def test_a_run_is_evaluated_against_all_buckets(short, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_samples, "load_extractor", lambda *_, **__: Colours())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ["evaluate", str(short), "--reference", str(ratios.shared()), "--num=24", "--steps=3"]
    for _ in range(2):  # the second time with statistics from the cache
        assert main([*command, "--out", str(tmp_path / "a.json")]) == 0
        output, report = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
        assert report["made"]["sizes"] == ratios.COUNTS and "sizes 6x10 (8), 8x8 (8), 10x6 (8)" in output
        assert report["reference_images"] == 24 and report["num_images"] == 24
        assert report["frechet_distance"] == pytest.approx(distance_by_hand(short, 24, 3), rel=1e-4)
    assert main(["evaluate", str(ratios.shared()), *command[2:4], "--out", str(tmp_path / "b.json")]) == 0
    assert json.loads((tmp_path / "b.json").read_text())["frechet_distance"] == pytest.approx(0, abs=1e-6)


def test_a_comparison_measures_in_all_sizes(short, monkeypatch):
    monkeypatch.setattr(measurement, "load_extractor", lambda *_, **__: Colours())
    measuring = measurement.Measurement.of(config({"sample.steps": 3}), "colours", weights=None, images=24, block=2)
    point = measurement.measure_checkpoint(toy.checkpoint(short, "vanilla"), measuring)
    assert point["distance"] == pytest.approx(distance_by_hand(short, 24, 3), rel=1e-4) and 0 <= point["probe"] <= 1
    assert measurement.samples_of(short, measuring.sample, 3, measuring.conditioning).shape == (3, 8, 8, 3)


@pytest.mark.parametrize("target", [False, True])
def test_analyse_reads_the_bucket_of_the_model(short, tmp_path, capsys, target):
    command = ["analyse", str(short), f"--out={tmp_path}", "--timesteps", "0.4", "--samples=20"]
    command[-1:] = ["--samples=40", "--target", "--blocks=1", "--scales=2"] if target else ["--samples=20"]
    status = main(command)
    said = capsys.readouterr().err
    assert "of which 8x8 (8 pictures) is read: it is nearest to a square" in said
    if target:
        counts = json.loads((tmp_path / "target.json").read_text())["pictures"]
        assert status == 0 and counts["fitted"] + counts["held_out"] == 8
        return
    report = json.loads((tmp_path / "analyse.json").read_text())
    assert status == 0 and report["images"] == 8 and report["data"].endswith("/8x8")


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_features_of_one_size_are_refused_before_any_work(short, tmp_path, capsys, command):
    SmallClassifier(8, 3, 2).save(tmp_path / "c.safetensors")
    words = {
        "evaluate": ["evaluate", str(short), "--reference", str(ratios.shared()), "--out", str(tmp_path / "x.json")],
        "compare": ["compare", "digits", "--data", str(ratios.shared()), "--out", str(tmp_path / "x"), "--seeds=0"],
    }[command]
    for features, message in (
        (str(tmp_path / "c.safetensors"), "takes 8x8x3 images, these are"),
        ("values", "one shape"),
    ):
        assert main([*words, "--features", features]) == 1
        err = capsys.readouterr().err
        assert "holds buckets of several sizes" in err and message in err and "inception takes any size" in err
        assert err.count("\n") == 1 and not (tmp_path / "x.json").exists() and not list(tmp_path.glob("x/*seed*"))


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
