"""A run on pictures with captions, through both stages and every command after training, at toy size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selftrans.checkpoints.load import load_model
from selftrans.cli.main import main
from selftrans.config import SampleConfig
from selftrans.data.dataset import Dataset
from selftrans.encoders.autoencoder import load_autoencoder, to_uint8
from selftrans.encoders.text import load_text_encoder
from selftrans.evaluate.clip_score import ClipScorer
from selftrans.evaluate.plots import image_grid
from selftrans.experiments.comparison.comparison_settings import check_measuring, shared_settings
from selftrans.experiments.comparison.measurement import Measurement, measure_checkpoint
from selftrans.sampling.images import Sampler
from selftrans.sampling.samplers import guided, ode
from selftrans.sampling.streams import image_noise
from selftrans.train.run import train
from selftrans.types import take_cond
from tests.support import captioned, text_runs, toy
from tests.support.clip import save_clip
from tests.support.pools import one_process  # noqa: F401 - a fixture
from tests.support.toy import quick  # noqa: F401 - a fixture

PROMPTS = ("a red square on the left", "the square is blue", "")
GUIDED = ["--steps=2", "--sampler=heun", "--guidance-scale=20", "--guidance-interval", "0.4", "1"]


def samples(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / "samples.npz", allow_pickle=False) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def sample(out: Path, *options: str, run: Path | None = None) -> int:
    return main(["sample", str(run or text_runs.finished()), "--out", str(out), *options])


def error_line(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("selftrans: ")]
    assert len(lines) == 1
    return lines[0]


def test_prompts_are_the_conditions_of_the_samples(tmp_path):
    assert sample(tmp_path, "--prompts", *PROMPTS, "--num=5", *GUIDED) == 0
    images, labels = samples(tmp_path)
    assert labels.tolist() == [0, 1, 2, 0, 1]
    settings = json.loads((tmp_path / "samples.json").read_text())["settings"]
    model, encoder = (
        load_model(text_runs.finished()).model,
        load_text_encoder(str(captioned.shared().parent / "encoder")),
    )
    assert settings["prompts"] == list(PROMPTS) and settings["text_encoder_sha256"] == encoder.sha256
    cond = take_cond(encoder.encode(PROMPTS), torch.from_numpy(labels))
    with torch.inference_mode():
        velocity = guided(model, cond, scale=20.0, interval=(0.4, 1.0))
        z0 = ode(velocity, image_noise(range(5), model.shape, 0)(), steps=2, method="heun")
    pixels = load_autoencoder(settings["autoencoder"]).decode(z0)
    assert np.abs(to_uint8(pixels).numpy().astype(int) - images).max() <= 1
    plain = list(
        Sampler.of(
            load_model(text_runs.finished()), SampleConfig(num=5, steps=2, sampler="heun", prompts=PROMPTS)
        ).sample()
    )
    assert np.abs(plain[0].images.astype(int) - images).max() > 1, "guidance changes them"


def test_image_does_not_depend_on_the_batch(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert sample(whole, "--prompts", *PROMPTS, "--num=7", *GUIDED) == 0
    assert sample(parts, "--prompts", *PROMPTS, "--num=4", "--batch-size=3", *GUIDED) == 0
    (parts / "000001.png").unlink()
    assert sample(parts, "--prompts", *PROMPTS, "--num=7", "--batch-size=2", *GUIDED) == 0
    assert samples(whole)[1].tolist() == samples(parts)[1].tolist()
    assert np.abs(samples(whole)[0].astype(int) - samples(parts)[0]).max() <= 1


def test_folder_of_other_prompts_is_refused_and_files_name_prompts(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red square\n\nthe square is blue\n")
    few = ["--num=2", "--steps=2"]
    assert sample(tmp_path / "out", "--prompts", str(tmp_path / "prompts.txt"), *few) == 0
    assert sample(tmp_path / "out", "--prompts", "a red square", "the square is blue", *few) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert sample(tmp_path / "out", "--prompts", "a red square", *few) == 1
    assert "prompts: ['a red square', 'the square is blue'] there, ['a red square'] now" in error_line(capsys)


def test_fewer_images_than_prompts_are_announced(tmp_path, capsys):
    assert sample(tmp_path / "a", "--prompts", *PROMPTS, "--num=2", "--steps=2") == 0
    assert "2 images of 3 prompts: the last ones get none; give --num 3" in capsys.readouterr().err
    assert sample(tmp_path / "b", "--num=2", "--steps=2") == 0
    assert "the last ones get none" not in capsys.readouterr().err, "only where prompts are given"


def test_prompts_of_the_run_are_the_default(tmp_path):
    expected = Dataset.open(captioned.shared()).prompts
    assert load_model(text_runs.finished()).prompts == expected and len(expected) > 4
    assert sample(tmp_path, "--num=2", "--steps=2") == 0
    assert json.loads((tmp_path / "samples.json").read_text())["settings"]["prompts"] == list(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels=random"], "labels are for models of classes"),
        (["--prompts"], "no prompts are given"),
        (["--prompts", "missing.txt"], "missing.txt does not exist; give a text file with one prompt per line"),
        (
            ["--text-encoder", "minilm"],
            "minilm gives tokens of 384 channels, not 16; give the one that prepared the data",
        ),
    ],
)
def test_unusable_options_are_refused_in_one_line(options, message, tmp_path, capsys):
    assert sample(tmp_path / "out", *options) == 1
    assert message in error_line(capsys) and not (tmp_path / "out").exists()


def test_prompts_are_refused_by_a_model_of_classes(tmp_path, capsys):
    assert sample(tmp_path / "out", "--prompts", "a", run=toy.vanilla()) == 1
    assert "prompts are for models of text, this one is of 10 classes; leave them out" in error_line(capsys)
    config = toy.toy({"sample.prompts": ("a",)})
    with pytest.raises(ValueError, match=r"sample.prompts is for data with captions, these have 10 classes"):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "config.json").exists()


# ---- previews


def test_previews_show_the_same_prompts_with_their_texts():
    prompts, config = Dataset.open(captioned.shared()).prompts, text_runs.text_toy()
    for stage, step in (("stage1", 2), ("stage2", 4)):
        folder = text_runs.finished() / stage / "previews"
        assert (folder / "prompts.txt").read_text().splitlines() == list(prompts[: config.log.preview_images])
        shown = np.asarray(Image.open(folder / f"step-{step:08d}.png"))
        settings = SampleConfig(num=config.log.preview_images, sampler="heun", steps=config.log.preview_steps)
        (batch,) = Sampler.of(load_model(text_runs.finished(), stage=stage), settings).sample()
        plain = image_grid(batch.images, upscale=8)
        assert shown.shape[0] > plain.shape[0] and shown.shape[1] > plain.shape[1], "captions take place"
        first = batch.images[0].repeat(8, axis=0).repeat(8, axis=1)
        cell = (shown.shape[1] - 3 * 6) // 2
        left = 6 + (cell - 64) // 2
        assert np.abs(shown[6:70, left : left + 64].astype(int) - first).max() <= 1


def test_prompts_of_a_file_are_kept_with_the_run(tmp_path):
    (tmp_path / "mine.txt").write_text("a grey square\n")
    changed = {"sample.prompts": (str(tmp_path / "mine.txt"),), "method": "vanilla", "train.steps": 2}
    train(text_runs.text_toy(changed), tmp_path / "run", quiet=True)
    (tmp_path / "mine.txt").unlink()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["sample"]["prompts"] == ["a grey square"]
    assert load_model(tmp_path / "run").prompts == ("a grey square",)
    with pytest.raises(ValueError, match=r"mine\.txt does not exist"):
        train(text_runs.text_toy(changed | {"train.steps": 4}), tmp_path / "run", quiet=True)
    train(text_runs.text_toy(changed | {"train.steps": 4, "sample.prompts": None}), tmp_path / "run", quiet=True)
    assert load_model(tmp_path / "run").prompts == Dataset.open(captioned.shared()).prompts


def test_previews_of_captions_need_no_encoder_and_prompts_take_it_from_where_it_is(tmp_path, recwarn):
    encoder, moved = captioned.save_text_encoder(tmp_path / "encoder"), tmp_path / "moved"
    data = captioned.prepared(tmp_path / "data", encoder=encoder)
    Path(encoder).rename(moved)
    settings = {"method": "vanilla", "train.steps": 2, "train.preview_every": 2}
    train(text_runs.text_toy(settings, data), tmp_path / "a", quiet=True)
    assert (tmp_path / "a" / "vanilla" / "previews" / "step-00000002.png").exists()
    settings |= {"sample.prompts": ("a red square",), "data.text_encoder": str(moved)}
    train(text_runs.text_toy(settings, data), tmp_path / "b", quiet=True)
    assert (tmp_path / "b" / "vanilla" / "previews" / "prompts.txt").read_text() == "a red square\n"
    assert not [str(warning.message) for warning in recwarn if "no preview" in str(warning.message)]
    assert load_model(tmp_path / "b").model.conditions.encoder == str(moved), "sampling finds it there"


def test_stored_ids_need_their_encoder_and_say_so_before_anything_is_written(tmp_path, capsys):
    encoder, moved, data = captioned.save_text_encoder(tmp_path / "encoder"), tmp_path / "moved", tmp_path / "data"
    pictures = captioned.pictures(tmp_path / "pictures")
    assert main(["prepare", str(pictures), f"--out={data}", f"--text={encoder}", "--text-store=ids"]) == 0
    Path(encoder).rename(moved)
    settings = {"method": "vanilla", "train.steps": 2}
    with pytest.raises(ValueError, match=r"encoder is not there; give the one .*--data\.text-encoder PATH"):
        train(text_runs.text_toy(settings, data), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "config.json").exists()
    train(text_runs.text_toy(settings | {"data.text_encoder": str(moved)}, data), tmp_path / "run", quiet=True)
    # measured with the captions of data whose encoder is elsewhere
    words = [
        "evaluate",
        str(text_runs.finished()),
        "--reference",
        str(data),
        "--features=values",
        "--num=4",
        "--steps=2",
    ]
    words += ["--out", str(tmp_path / "e.json")]
    capsys.readouterr()
    assert main(words) == 1 and "is not there; give the one that prepared the data" in error_line(capsys)
    assert main([*words, "--text-encoder", str(moved)]) == 0
    assert "--text-encoder is ignored" not in capsys.readouterr().err


# ---- measuring


def evaluate(source: Path, reference: Path, out: Path, *options: str) -> dict:
    words = ["evaluate", str(source), "--reference", str(reference), "--features=values", "--out", str(out), *options]
    assert main(words) == 0
    return json.loads(out.read_text())


def test_run_is_evaluated_with_captions_of_the_reference(tmp_path, capsys):
    data, clip = captioned.shared(), save_clip(tmp_path / "clip")
    report = evaluate(text_runs.finished(), data, tmp_path / "a.json", "--num=20", "--steps=2", f"--clip={clip}")
    output = capsys.readouterr().out
    assert report["made"]["captions"] == str(data.resolve()) and "prompts" not in report["made"]
    assert f"captions of {data}" in output and "labels unknown" not in output and "balance" not in output
    assert "CLIP score " in output and f"100 max(cos, 0) by {clip}" in output and report["clip_pictures"] == 20
    # the training data stand in for a reference without captions
    other = evaluate(text_runs.finished(), data.parent / "pictures", tmp_path / "b.json", "--num=20", "--steps=2")
    assert (
        other["frechet_distance"] == pytest.approx(report["frechet_distance"], rel=1e-6) and "clip_score" not in other
    )


def test_clip_score_of_a_run_is_that_of_its_folder_and_of_each_picture(tmp_path):
    data, clip, options = captioned.shared(), save_clip(tmp_path / "clip"), ["--num=5", "--steps=2"]
    prompts = ["--prompts", *PROMPTS[:2]]
    assert sample(tmp_path / "made", *prompts, *options) == 0
    run = evaluate(text_runs.finished(), data, tmp_path / "a.json", *prompts, *options, f"--clip={clip}")
    stored = evaluate(tmp_path / "made", data, tmp_path / "b.json", f"--clip={clip}")
    images, labels = samples(tmp_path / "made")
    expected = ClipScorer(clip).score(images, [PROMPTS[k] for k in labels]).mean()
    assert run["clip_score"] == pytest.approx(stored["clip_score"], abs=0.05) and run["made"]["prompts"] == list(
        PROMPTS[:2]
    )
    assert stored["clip_score"] == pytest.approx(expected, abs=1e-3)


def test_missing_captions_and_prompts_are_one_line(tmp_path, capsys):
    run, other = (
        text_runs.finished(),
        captioned.prepared(tmp_path / "other", encoder=captioned.save_text_encoder(tmp_path / "e", seed=1)),
    )
    words = ["--reference", str(other), "--features=values", "--num=2"]
    assert main(["evaluate", str(run), *words]) == 1
    assert "prepare its captions with the text encoder of the model, or give --prompts" in error_line(capsys)
    pictures = captioned.shared().parent / "pictures"
    assert main(["evaluate", str(toy.vanilla()), *words, f"--clip={save_clip(tmp_path / 'clip')}"]) == 1
    assert f"no prompts are recorded for the images of {toy.vanilla()}; leave out --clip" in error_line(capsys)
    assert main(["evaluate", str(pictures), *words[:3], f"--clip={tmp_path / 'clip'}"]) == 1
    assert "no prompts are recorded" in error_line(capsys)


@pytest.mark.filterwarnings("ignore:.*covariance is singular")
def test_checkpoint_is_measured_with_stored_captions(tmp_path):
    config = text_runs.text_toy()
    measurement = Measurement.of(config, "values", weights=None, images=20, block=1)
    point = measure_checkpoint(toy.checkpoint(text_runs.finished()), measurement)
    assert point["distance"] > 0 and point["accuracy"] is None and point["probe"] is None
    assert point["sampler"]["captions"] == str(captioned.shared().resolve()) and "labels" not in point["sampler"]


def test_pictures_without_classes_are_compared_in_features_that_exist(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # an import of it fails
    with pytest.raises(
        ValueError, match=r"need torch-fidelity .*, or --features values \(the 192 values of a picture\)"
    ):
        check_measuring(*shared_settings(text_runs.text_toy(), tmp_path))
    check_measuring(*shared_settings(text_runs.text_toy(), tmp_path, features="values"))


def test_analysis_has_maps_and_says_that_it_has_no_probes(tmp_path, capsys):
    words = ["analyse", str(text_runs.finished()), "--out", str(tmp_path / "a"), "--samples=20", "--timesteps", "0.4"]
    assert main(words) == 0
    output = capsys.readouterr()
    assert "no linear probes" in output.err and "has captions, and no classes to be probed" in output.err
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["analyse.json", "pca.png", "tsne-t0.4.png"]
    assert (
        json.loads((tmp_path / "a" / "analyse.json").read_text())["probe_accuracy"] == {}
        and "probes.png" not in output.out
    )


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_methods_are_compared_on_captions(tmp_path, capfd):
    sizes = ["--model.width=32", "--model.depth=3", "--model.heads=2", "--model.patch=4", "--train.batch-size=8"]
    sizes += ["--stage1.block=1", "--stage2.student-block=1", "--stage2.teacher-block=2", "--sample.steps=2"]
    sizes += ["--stage1.head-width=16", "--stage2.head-width=16"]
    words = ["compare", "imagefolder", "--data", str(captioned.shared()), "--out", str(tmp_path), "--features=values"]
    words += ["--steps=2", "--images=20", "--workers=1", "--seeds", "0", "--methods", "vanilla", "self_transcendence"]
    assert main([*words, "--model.name=MMDiT-S/2", *sizes]) == 0, capfd.readouterr().err
    output = capfd.readouterr().out
    summary = json.loads((tmp_path / "compare.json").read_text())
    assert [row["method"] for row in summary["table"]] == ["vanilla", "self_transcendence"] and summary[
        "labels"
    ] is None
    for row in summary["table"]:
        assert row["distance"]["mean"] > 0 and row["accuracy"] is None and row["probe"] is None
    (row,) = (line for line in output.splitlines() if line.startswith("vanilla "))
    assert row.split()[6:8] == ["-", "-"], "accuracy and shallow probe"
    page = (tmp_path / "compare.html").read_text()
    assert "the same captions for each method" in page and f"captions {captioned.shared()}" in page
