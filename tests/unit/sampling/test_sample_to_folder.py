"""`selftrans sample`: a run to a folder of pictures; repetition, continuation with more images, several processes."""

import json
import os

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from selftrans.cli.main import main
from selftrans.config import SampleConfig
from selftrans.encoders.autoencoder import load_autoencoder
from selftrans.sampling.folder import sample_to_folder
from selftrans.sampling.images import Sampler, padded
from selftrans.sampling.sample_file import read_png
from selftrans.storage import sha256_file
from selftrans.types import Conditions
from tests.support import toy
from tests.support.toy import quick  # noqa: F401 - a fixture


def sample(run, out, *options, num=6, steps=2):
    return main(["sample", str(run), f"--out={out}", f"--num={num}", f"--steps={steps}", *options])


def images(folder):
    with np.load(folder / "samples.npz", allow_pickle=False) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def test_pictures_npz_and_samples_json(tmp_path):
    out = tmp_path / "new" / "made"
    assert sample(toy.finished(), out, num=12) == 0
    assert sorted(os.listdir(out)) == [*(f"{k:06d}.png" for k in range(12)), "samples.json", "samples.npz"]
    array, labels = images(out)
    assert array.shape == (12, 8, 8, 1) and array.dtype == np.uint8
    assert list(labels) == [k % 10 for k in range(12)]  # balanced
    for k in range(12):
        image, label = read_png(out / f"{k:06d}.png")
        assert np.array_equal(image, array[k]) and label == k % 10
    assert np.asarray(Image.open(out / "000003.png")).shape == (8, 8)
    record = json.loads((out / "samples.json").read_text())
    file = toy.checkpoint(toy.finished()) / "ema.safetensors"
    assert record["num"] == 12 and record["complete"] and record["shape"] == [12, 8, 8, 1]
    settings = record["settings"]
    assert settings["source"]["path"] == str(file.resolve()) and settings["source"]["sha256"] == sha256_file(file)
    expected = {"steps": 2, "sampler": "heun", "guidance_scale": 1.0, "weights": "ema", "stage": "stage2", "step": 8}
    assert settings.items() >= expected.items() and settings["autoencoder"] == toy.PIXELS
    assert not {"guidance_channels", "time_shift", "velocity_scale"} & settings.keys(), (
        "as in folders of before these settings"
    )
    more = {"guidance_scale": 2.0, "guidance_channels": 1, "time_shift": 3.0, "velocity_scale": 1.05}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in more.items()]
    assert sample(toy.finished(), tmp_path / "other", *words, num=1) == 0
    assert json.loads((tmp_path / "other" / "samples.json").read_text())["settings"].items() >= more.items()


def test_padded_batches_give_no_extra_pictures(tmp_path, monkeypatch):
    sample(toy.finished(), tmp_path / "plain", "--batch-size=4")
    filled = []
    monkeypatch.setattr("selftrans.sampling.images.padded", lambda indices, n: filled.append(n) or padded(indices, n))
    monkeypatch.setattr("selftrans.sampling.images.worth_compiling", lambda *_: True)
    monkeypatch.setattr("selftrans.sampling.images.compile_model", lambda model: None)
    assert sample(toy.finished(), tmp_path / "filled", "--batch-size=4") == 0 and filled == [4, 4]
    assert np.array_equal(images(tmp_path / "filled")[1], images(tmp_path / "plain")[1])
    difference = images(tmp_path / "filled")[0].astype(int) - images(tmp_path / "plain")[0]
    assert np.abs(difference).max() <= 1  # rounding depends on the batch size


def test_folder_is_continued_with_graphs(tmp_path):
    """They are no part of what its images depend on. The last batch is filled, and is of one image in the second folder."""
    assert sample(toy.finished(), tmp_path / "whole", "--batch-size=4") == 0
    assert sample(toy.finished(), tmp_path / "parts", "--batch-size=2", num=3) == 0
    assert sample(toy.finished(), tmp_path / "parts", "--batch-size=2", "--capture=on") == 0
    (whole, labels), (parts, found) = images(tmp_path / "whole"), images(tmp_path / "parts")
    assert np.array_equal(labels, found) and np.abs(whole.astype(int) - parts).max() <= 1
    record = json.loads((tmp_path / "parts" / "samples.json").read_text())
    assert record["complete"] and "capture" not in record["settings"]


def test_command_gives_the_images_of_the_library(tmp_path):
    options = ["--sampler=sde", "--guidance-scale=2", "--guidance-interval", "0.2", "0.9", "--seed=5", "--batch-size=4"]
    assert sample(toy.finished(), tmp_path, *options, steps=3) == 0
    model = toy.toy().build_model((1, 8, 8), Conditions("labels", 10))
    model.load_state_dict(load_file(toy.checkpoint(toy.finished()) / "ema.safetensors"))
    config = SampleConfig(
        num=6, steps=3, sampler="sde", guidance_scale=2.0, guidance_interval=(0.2, 0.9), seed=5, batch_size=6
    )
    (_, labels, pictures), *more = Sampler(model, load_autoencoder(toy.PIXELS), config, device="cpu").sample()
    assert not more and np.array_equal(images(tmp_path)[1], labels)
    assert np.abs(images(tmp_path)[0].astype(int) - pictures).max() <= 1  # rounding depends on the batch size


def test_repeating_does_nothing_and_more_images_continue(tmp_path, capsys):
    assert sample(toy.finished(), tmp_path / "a", num=5) == 0
    before = toy.tree(tmp_path / "a")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    capsys.readouterr()
    assert sample(toy.finished(), tmp_path / "a", num=5) == 0
    assert "already holds these 5 samples; nothing to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == times
    (tmp_path / "a" / "000002.png").unlink()
    (tmp_path / "a" / "000003.png").write_bytes(before["000003.png"][:-9])
    assert sample(toy.finished(), tmp_path / "a", num=5, steps=2) == 0
    assert toy.tree(tmp_path / "a") == before
    assert sample(toy.finished(), tmp_path / "a", num=8) == 0
    assert sample(toy.finished(), tmp_path / "b", "--batch-size=3", num=8) == 0
    assert {k: v for k, v in toy.tree(tmp_path / "a").items() if k.endswith("png")} == {
        k: v for k, v in toy.tree(tmp_path / "b").items() if k.endswith("png")
    }


def test_message_of_a_process_that_ends_first_does_not_promise_the_npz(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    argv = ["sample", str(toy.vanilla()), "--out", str(tmp_path), "--num=4", "--steps=2"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"2 samples -> {tmp_path} (.png files); the process that writes the last sample,")
    monkeypatch.setenv("RANK", "1")
    assert main(argv) == 0
    assert (
        capsys.readouterr().out == f"4 samples, 2 of them new -> {tmp_path} (.png files, samples.npz, samples.json)\n"
    )


def test_message_after_continuing_counts_all_samples(tmp_path, capsys):
    for num, expected in ((2, "2 samples -> "), (5, "5 samples, 3 of them new -> ")):
        assert main(["sample", str(toy.finished()), f"--out={tmp_path}", "--steps=1", f"--num={num}"]) == 0
        assert capsys.readouterr().out == f"{expected}{tmp_path} (.png files, samples.npz, samples.json)\n"


def test_other_settings_and_fewer_images_are_refused(tmp_path, capsys):
    assert sample(toy.finished(), tmp_path) == 0
    before = toy.tree(tmp_path)
    for options, message in [
        (["--seed=3"], "seed: 0 there, 3 now"),
        (["--sampler=euler"], "sampler: heun there, euler now"),
        (["--weights=raw"], "weights: ema there, raw now"),
        (["--stage=stage1"], "stage: stage2 there, stage1 now"),
    ]:
        capsys.readouterr()
        assert sample(toy.finished(), tmp_path, *options) == 1
        output = capsys.readouterr().err
        assert output.startswith("selftrans: ") and message in output and output.count("\n") == 1
    assert sample(toy.finished(), tmp_path, num=3) == 1
    assert "begun for 6 samples" in capsys.readouterr().err
    assert toy.tree(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num=0"], "sample.num is 0"),
        (["--steps=0"], "sample.steps is 0"),
        (["--sampler=sde", "--steps=1"], "the SDE needs at least 2"),
        (["--guidance-interval", "0.9", "0.1"], "guidance_interval"),
        (["--guidance-scale=nan"], "guidance_scale"),
        (["--guidance-channels=0"], "guidance_channels is 0"),
        (["--guidance-scale=2", "--guidance-channels=2"], "guidance_channels is 2, the latents have 1 channel;"),
        (["--time-shift=0"], "time_shift is 0"),
        (["--time-shift=nan"], "time_shift is nan"),
        (["--velocity-scale=0"], "velocity_scale is 0"),
        (["--velocity-scale=inf"], "velocity_scale is inf"),
        (["--seed=-1"], "sample.seed is -1"),
        (["--batch-size=0"], "batch_size"),
        (["--stage=stage3"], "has no stage3: it holds stage1, stage2"),
    ],
)
def test_unusable_settings_are_refused_in_one_line(tmp_path, capsys, options, message):
    assert main(["sample", str(toy.finished()), f"--out={tmp_path / 'made'}", *options]) == 1
    output = capsys.readouterr().err
    assert output.startswith("selftrans: ") and message in output and output.count("\n") == 1
    assert not (tmp_path / "made").exists()


def test_paths_that_are_not_runs_are_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for origin, message in [
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "is not a run directory"),
        (toy.digits(), "is not a run directory"),
        (toy.digits() / "manifest.json", "not a selftrans weights file"),
        (toy.checkpoint(toy.finished()) / "optimizer.safetensors", "its header describes"),
    ]:
        assert sample(origin, tmp_path / "made") == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_raw_weights_other_stages_and_files(tmp_path):
    stage1 = toy.finished() / "stage1"
    for name, origin, options in [
        ("last", toy.finished(), []),
        ("raw", toy.finished(), ["--weights=raw"]),
        ("stage", toy.finished(), ["--stage=stage1"]),
        ("folder", stage1, []),
        ("checkpoint", toy.checkpoint(toy.finished(), "stage1"), []),
        ("file", toy.checkpoint(toy.finished(), "stage1") / "ema.safetensors", []),
    ]:
        assert sample(origin, tmp_path / name, *options) == 0
    names = ("last", "raw", "stage", "folder", "checkpoint", "file")
    last, raw, stage, *same = (images(tmp_path / name)[0] for name in names)
    assert not np.array_equal(last, raw) and not np.array_equal(last, stage)
    assert all(np.array_equal(stage, other) for other in same)


def test_random_labels_by_their_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert sample(toy.finished(), tmp_path / name, "--labels=random", f"--seed={seed}", num=20, steps=1) == 0
    a, b, c = (images(tmp_path / name)[1] for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c) and len(set(a)) > 4


def test_options_default_to_the_settings_of_the_run(tmp_path):
    assert main(["sample", str(toy.vanilla()), f"--out={tmp_path}", "--num=2"]) == 0
    settings = json.loads((tmp_path / "samples.json").read_text())["settings"]
    assert settings["steps"] == toy.toy().sample.steps and settings["sampler"] == toy.toy().sample.sampler


def test_processes_share_the_work(tmp_path, monkeypatch):
    settings = {"num": 7, "steps": 1}
    made = {}
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        made[rank] = sample_to_folder(toy.finished(), tmp_path / "both", settings)
    assert made == {0: 4, 1: 3}
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert sample_to_folder(toy.finished(), tmp_path / "alone", settings) == 7
    assert toy.tree(tmp_path / "both") == toy.tree(tmp_path / "alone")


def test_sampling_does_not_change_the_run(tmp_path):
    before = toy.tree(toy.finished())
    sample_to_folder(toy.finished(), tmp_path, {"num": 2, "steps": 1})
    assert toy.tree(toy.finished()) == before


# ---- autoguidance


def test_autoguidance_by_stage_1_is_applied_and_recorded(tmp_path):
    """With scale 0 only the weaker model remains, so the samples are those of stage 1; with 2 they are of neither."""
    run, stage1 = toy.finished(), str(toy.finished() / "stage1")
    weak, strong, zero, two = (tmp_path / name for name in ("weak", "strong", "zero", "two"))
    assert sample(run, weak, "--stage", "stage1") == sample(run, strong) == 0
    for out, scale in ((zero, "0"), (two, "2")):
        assert sample(run, out, "--autoguidance", stage1, "--guidance-scale", scale) == 0
    assert np.array_equal(images(zero)[0], images(weak)[0])
    assert not np.array_equal(images(two)[0], images(strong)[0]) and not np.array_equal(images(two)[0], images(weak)[0])
    settings = json.loads((two / "samples.json").read_text())["settings"]
    file = toy.checkpoint(toy.finished(), "stage1") / "ema.safetensors"
    assert settings["autoguidance"].items() >= {"weights": "ema", "stage": "stage1", "step": 4}.items()
    assert settings["autoguidance"]["source"]["sha256"] == sha256_file(file) and settings["guidance_scale"] == 2.0


def test_autoguidance_with_scale_one_is_ignored_with_a_warning(tmp_path, capsys):
    assert sample(toy.finished(), tmp_path / "out", "--autoguidance", "nowhere") == 0
    assert "the autoguidance is ignored: the guidance scale is 1" in capsys.readouterr().err
    assert "autoguidance" not in json.loads((tmp_path / "out" / "samples.json").read_text())["settings"]
