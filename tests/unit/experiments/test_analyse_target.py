"""`selftrans analyse --target`: numbers compared with the frozen teacher of a stage 2, every kind of teacher, its report."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selftrans.checkpoints.load import load_model
from selftrans.cli.main import main
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import latents_of
from selftrans.data.prepare import prepare
from selftrans.data.prepare_features import prepare_features
from selftrans.experiments.analyse_target import choose_pictures
from selftrans.methods.guidance import Frozen
from selftrans.train.run import train
from tests.support import text_runs, toy
from tests.support.toy import quick  # noqa: F401 - quick is a fixture
from tests.support.vision import save_encoder

FILES = ["target-maps.png", "target.json", "target.png"]


@pytest.fixture
def undrawn(monkeypatch):
    """Without pictures, which take most of the time."""
    monkeypatch.setattr("selftrans.experiments.analyse_target.draw_measures", lambda *_: None)
    monkeypatch.setattr("selftrans.experiments.analyse_target.draw_maps", lambda *_: None)


def analysed(out: Path, origin: Path | str, *words: str, images: int = 64) -> dict:
    argv = ["analyse", str(origin), "--target", "--out", str(out), f"--images={images}", *words]
    assert main(argv) == 0
    return json.loads((out / "target.json").read_text())


def drawn(out: Path) -> None:
    assert sorted(os.listdir(out)) == FILES
    for name in ("target.png", "target-maps.png"):
        pixels = np.asarray(Image.open(out / name))
        assert min(pixels.shape[:2]) > 150 and len(np.unique(pixels)) > 50


def test_shares_are_those_of_the_features_that_stage_2_is_guided_by(tmp_path, capsys):
    """The teacher of the run, in fp32, with tables of means computed by numpy."""
    before = toy.tree(toy.finished())
    report = analysed(tmp_path / "a", toy.finished(), "--t", "0.5", "--w", "1", "6", "--blocks", "2", images=200)
    drawn(tmp_path / "a")
    assert toy.tree(toy.finished()) == before
    teacher, counts = report["teacher"], report["pictures"]
    assert (teacher["stage"], teacher["weights"], teacher["block"]) == ("stage1", "raw", 2)
    dataset = Dataset.open(toy.digits())
    pictures = choose_pictures(dataset, 200, 0)
    fitted, held = counts["fitted"], counts["held_out"]
    assert (fitted, held) == (int(pictures.fitted.sum()), int((~pictures.fitted).sum()))
    assert np.array_equal(dataset.labels[pictures.rows], pictures.labels.numpy())
    assert 0.2 < held / (held + fitted) < 0.27
    z0, labels = latents_of(dataset, pictures.rows)
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    frozen = Frozen(load_model(toy.finished(), stage="stage1", weights="raw").model, 2)
    null = torch.full_like(labels, 10)
    f_c, f_u = frozen(0.5 * z0 + 0.5 * noise, torch.full((len(z0),), 0.5), labels, null)
    f_g = (f_u + 6 * (f_c - f_u)).numpy()
    means = np.stack([f_g[:fitted][labels[:fitted].numpy() == k].mean(axis=0) for k in range(10)])
    residual = ((f_g - means[labels.numpy()])[fitted:] ** 2).sum()
    total = ((f_g - f_g[:fitted].mean(axis=0))[fitted:] ** 2).sum()
    found = report["blocks"]["2"]
    assert found["shares"]["condition"]["6"][0] == pytest.approx(1 - residual / total, abs=1e-4)
    assert found["shares"]["condition"] == found["shares"]["condition_time"]  # one timestep
    norm = np.linalg.norm(f_g[fitted:], axis=-1).mean()
    assert found["sizes"]["token_norm"]["6"] == pytest.approx(norm, rel=1e-4)
    shown = capsys.readouterr().out
    assert f"{found['shares']['condition']['6'][0]:.3f}" in shown and re.search(r"^2\* ", shown, re.M)
    assert "swapped: label" in shown and f"{fitted} pictures fitted, {held} held out, 10 classes; t = 0.5" in shown


def test_a_repeated_analysis_is_the_same_and_another_seed_is_not(tmp_path, undrawn):
    words = (toy.finished(), "--timesteps", "0.4", "0.7", "--scales", "5", "--blocks", "1", "3")
    one, same = (analysed(tmp_path / name, *words) for name in "ab")
    other = analysed(tmp_path / "c", *words, "--seed=1")
    assert one == same and list(one["blocks"]) == ["1", "3"]
    assert one["blocks"]["1"]["probes"].keys() == {"f_u", "f_g"}
    assert one["blocks"]["1"]["shares"] != other["blocks"]["1"]["shares"]


def test_stage_weights_and_files_may_be_chosen(tmp_path, undrawn):
    words = ("--t=0.4", "--w=2", "--blocks=1")
    student = analysed(tmp_path / "a", toy.finished(), *words, "--stage=stage2", "--weights=ema")
    assert (student["teacher"]["stage"], student["teacher"]["weights"]) == ("stage2", "ema")
    averaged = analysed(tmp_path / "b", toy.finished(), *words, "--weights=ema")
    assert (averaged["teacher"]["stage"], averaged["teacher"]["weights"]) == ("stage1", "ema")
    file = toy.checkpoint(toy.finished(), "stage1") / "ema.safetensors"
    alone = analysed(tmp_path / "c", file, *words)
    assert alone["blocks"]["1"]["shares"] == averaged["blocks"]["1"]["shares"]
    plain = analysed(tmp_path / "d", toy.vanilla(), *words)
    assert plain["teacher"]["stage"] == "vanilla" and plain["teacher"]["block"] is None


def test_encoder_and_its_stored_features_are_measured_alike(tmp_path, capsys):
    root = toy.pictures(tmp_path / "pictures", count=30, side=16)
    encoder, data = save_encoder(tmp_path / "encoder"), tmp_path / "data"
    prepare(root, data, resolution=16, progress=False)
    words = ("--encoder", "--data", str(data), "--grid=4")
    computed = analysed(tmp_path / "a", encoder, *words)
    drawn(tmp_path / "a")
    assert (
        computed["scales"] == [] and computed["timesteps"] == [] and computed["blocks"]["0"]["probes"].keys() == {"f_u"}
    )
    prepare_features(root, data, encoder, grid=4, progress=False)
    stored = analysed(tmp_path / "b", data)
    share, again = (x["blocks"]["0"]["shares"]["condition"]["0"] for x in (computed, stored))
    assert again == pytest.approx(share, abs=2e-3)  # stored in half precision
    assert "stored features of" in capsys.readouterr().out
    assert main(["analyse", encoder, "--target", "--encoder", "--out", str(tmp_path / "x")]) == 1
    assert "an encoder needs pictures: give prepared data with --data DIR" in capsys.readouterr().err


def test_text_takes_the_place_of_the_label(tmp_path, capsys):
    report = analysed(tmp_path / "a", text_runs.finished(), "--t=0.4", "--w=5", "--blocks=1")
    drawn(tmp_path / "a")
    assert report["condition"] == "text" and report["predicted_from"].startswith("ridge regression on the mean text")
    assert report["chance"] is None and all("probes" not in of for of in report["blocks"].values())
    shown = capsys.readouterr()
    assert "a ridge regression on the mean text embedding" in shown.out and "no probes" in shown.err


def test_data_without_conditions_have_features_and_no_guidance(tmp_path, capsys):
    data = toy.prepared(tmp_path / "flat", classes=(), count=60)
    train(toy.toy({"data.path": str(data), "method": "vanilla", "train.steps": 2}), tmp_path / "run", quiet=True)
    report = analysed(tmp_path / "a", tmp_path / "run", "--t", "0.4", "0.6")
    drawn(tmp_path / "a")
    assert report["scales"] == [] and report["predicted_from"] is None
    assert list(report["blocks"]["1"]["shares"]) == ["time"]
    assert "no guidance" in capsys.readouterr().err


def test_maps_of_videos_show_one_frame_and_that_of_the_data(tmp_path, monkeypatch):
    """A strip of all frames would be too small to read, and would not say which frame the map below it is of."""
    arrays = np.random.default_rng(0).normal(size=(40, 1, 4, 4, 8)).astype(np.float32)
    np.savez(tmp_path / "a.npz", data=arrays, labels=np.arange(40) % 2)
    prepare(tmp_path / "a.npz", tmp_path / "data", autoencoder="values", progress=False)
    config = toy.toy(
        {"data.path": str(tmp_path / "data"), "model.patch": 4, "model.patch_frames": 2, "method": "vanilla"}
    )
    train(
        config.override({"train.steps": 1, "train.batch_size": 8, "train.preview_every": 0}),
        tmp_path / "run",
        quiet=True,
    )
    figures = {}
    monkeypatch.setattr(
        "selftrans.experiments.analyse_run.save", lambda figure, path: figures.update({path.name: figure})
    )
    monkeypatch.setattr("selftrans.evaluate.plots.save", lambda figure, path: figures.update({path.name: figure}))
    assert main(["analyse", str(tmp_path / "run"), "--out", str(tmp_path / "a"), "--t", "0.4"]) == 0
    analysed(tmp_path / "b", tmp_path / "run", "--t", "0.4", "--blocks", "1", "--w", "1", images=40)
    for name in ("pca.png", "target-maps.png"):
        assert figures[name].get_suptitle().endswith("middle frame")
        shapes = {axes.get_images()[0].get_array().shape[:2] for axes in figures[name].axes}
        assert shapes == {(4, 8), (1, 2)}, "the frame, and a row of two tokens"
    (axes,) = figures["probes.png"].axes
    assert axes.get_ylabel().endswith("10 samples held out") and axes.get_ylim() == (-0.03, 1.03)
    assert axes.get_legend().get_texts()[-1].get_text() == "chance 0.50"


def test_classes_are_drawn_where_there_are_too_many_for_a_table(tmp_path):
    dataset = Dataset.open(toy.digits())
    with pytest.warns(UserWarning, match="4 of 10 classes are measured"):
        few = choose_pictures(dataset, 64, 0)
    assert (
        len(few.labels.unique()) == 4 and len(few.rows) == 64 and set(few.others.tolist()) <= set(few.labels.tolist())
    )
    for label in few.labels.unique():
        of_class = few.labels == label
        assert int((of_class & ~few.fitted).sum()) == int(of_class.sum()) // 4
    rare = Dataset.open(toy.prepared(tmp_path, count=3))
    with pytest.warns(UserWarning, match="fewer than 4 pictures"), pytest.raises(ValueError, match="too few pictures"):
        choose_pictures(rare, 100, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images=39"], "39 pictures are too few"),
        (["--t", "1.5"], "timesteps [1.5] must be one or more numbers from 0 (data) to 1 (noise)"),
        (["--w", "nan"], "scales [nan] must be one or more finite numbers"),
        (["--blocks", "4"], "blocks [4] are not in a model of 3 blocks; choose from 1 to 3"),
        (["--blocks", "0"], "blocks [0] are not in a model of 3 blocks"),
        (["--seed=-1"], "seed -1 must be from 0 to 2147483647"),
        (["--stage=stage3"], "has no stage3"),
        (["--grid=4"], "--grid belongs to --encoder"),
    ],
)
def test_bad_options_are_refused_in_one_line(tmp_path, capsys, words, message):
    assert main(["analyse", str(toy.finished()), "--target", f"--out={tmp_path / 'x'}", *words]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("selftrans: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "x").exists()


def test_tables_are_shown_where_nothing_can_be_written(tmp_path, monkeypatch, capsys):
    def full(path, _):
        raise ValueError(f"{path} cannot be written (No space left on device)")

    monkeypatch.setattr("selftrans.experiments.evaluate_samples.write_json", full)
    argv = ["analyse", str(toy.finished()), "--target", f"--out={tmp_path}", "--images=64", "--blocks=1", "--t=0.5"]
    assert main(argv) == 1
    said = capsys.readouterr()
    assert "mean norm of a token" in said.out and "No space left" in said.err.splitlines()[-1]


def test_other_data_and_misplaced_options_are_refused(tmp_path, capsys):
    data = toy.prepared(tmp_path)
    argv = ["analyse", str(toy.finished()), f"--out={tmp_path / 'x'}"]
    assert main([*argv, "--target", f"--data={data}"]) == 1
    message = capsys.readouterr().err
    assert "(3, 8, 8) with 2 classes" in message and "(1, 8, 8) with 10 classes" in message and "--data" in message
    for option in (["--blocks", "1"], ["--seed=3"], ["--encoder"], ["--w", "3"]):
        assert main([*argv, *option]) == 1
        assert "belongs to --target; give both" in capsys.readouterr().err


def test_names_of_classes_and_files_are_not_formulas(tmp_path, capsys):
    """matplotlib would parse what stands between dollar signs, and fail."""
    root = toy.pictures(tmp_path / "pictures", ("$a_{$", r"$\frac"), count=20)
    prepare(root, tmp_path / "data", progress=False)
    encoder = save_encoder(tmp_path / "$x^{$")
    analysed(tmp_path / "a", encoder, "--encoder", "--data", str(tmp_path / "data"), "--grid=2")
    drawn(tmp_path / "a")
