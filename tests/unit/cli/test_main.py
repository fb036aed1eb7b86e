"""The command line as people type it: it teaches, it takes every override, and it says in one line what is wrong."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from selftrans import __version__
from selftrans.cli.commands import COMMANDS
from selftrans.cli.main import main
from selftrans.config import from_json
from selftrans.recipes import RECIPES
from tests.support import toy
from tests.support.toy import quick  # noqa: F401 - a fixture


def one_line(capsys) -> str:
    """What was said on stderr: one line of ours, no traceback, nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("selftrans: ") and err.count("\n") == 1, (out, err)
    return err


# ---- help


def test_the_overview_names_every_command(capsys):
    for argv in ([], ["-h"], ["--help"]):
        assert main(argv) == 0
        said = capsys.readouterr().out
        assert "usage: selftrans COMMAND" in said
        assert all(f"\n  {name} " in said for name in ["train", *COMMANDS])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_teaches(name, capsys):
    assert main([name, "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"usage: selftrans {name}" in said
    assert (COMMANDS[name].__doc__ or "").split("\n")[0][:60] in said


def test_help_of_train_names_every_recipe_and_of_a_recipe_every_override(capsys):
    for argv in (["train"], ["train", "--help"]):
        assert main(argv) == 0
        said = capsys.readouterr().out
        assert all(f"\n  {name} " in said for name in RECIPES) and "--teacher RUN_OR_FILE" in said
    assert main(["train", "cifar10", "--help"]) == 0
    said = capsys.readouterr().out
    for words in ("--train.batch-size INT", "--stage2.until-step {None}|INT", "--model.name STR", "(default: 50000)"):
        assert words in said, words
    assert "--out RUN, --data DIR, --teacher RUN_OR_FILE" in said and "selftrans prepare CIFAR10.zip" in said


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag, capsys):
    assert main([flag]) == 0
    assert capsys.readouterr().out == f"selftrans {__version__}\n"


# ---- wrong words: status 2, one line, the nearest name


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("trian digits", "command 'trian' is unknown; did you mean train?"),
        ("smaple run", "command 'smaple' is unknown; did you mean sample?"),
        ("xyz", "command 'xyz' is unknown (see selftrans --help)"),
        ("train digit --out x", "recipe 'digit' is unknown; did you mean digits?"),
        ("train sit_imagenet_b --out x", "did you mean sit_imagenet"),
        ("train digits", "--out RUN is missing"),
        ("train digits --out", "--out needs a value"),
        ("train digits --out --train.steps 3", "--out needs a value"),
        ("train digits --out x --data=", "--data needs a value"),
        ("train digits --out x --train.stesp 3", "override --train.stesp is unknown; did you mean train.steps?"),
        ("train digits --out x --train.stesp=3", "did you mean train.steps?"),
        ("train digits --out x --teachr y", "override --teachr is unknown; did you mean teacher?"),
        ("train digits --out x --stage3.steps 3", "did you mean stage1.steps?"),
        ("train digits --out x --train.steps", "--train.steps"),
        ("train digits --out x --train.steps many", "--train.steps: invalid literal for int() with base 10: 'many'"),
        ("train digits --out x --train.steps 1.5", "--train.steps"),
        ("train digits --out x --train.lr fast", "--train.lr: could not convert string to float: 'fast'"),
        ("train digits --out x --train.betas 0.9", "--train.betas"),
        ("train digits --out x --train.precision fp8", "Expected one of"),
        ("train digits --out x --train.recompute maybe", "Expected one of"),
        ("train digits --out x stray", "stray"),
        ("train digits --out x -q", "-q"),
        ("sample", "Missing from selftrans sample"),
        ("sample run", "--out PATH"),
        ("sample run --out x --stpes 3", "option --stpes is unknown; did you mean steps?"),
        ("sample run --out x --num few", "--num"),
        ("evaluate made", "--reference"),
        ("analyse run --out x --timestep 0.4", "did you mean timesteps?"),
        ("prepare pictures --out x --dtype float8", "--dtype"),
    ],
)
def test_wrong_words(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv.split()) == 2
    line = one_line(capsys)
    assert said in line and " --help)" in line
    assert list(tmp_path.iterdir()) == []


# ---- every way to write a value


def test_overrides_of_every_kind(tmp_path, monkeypatch, capsys):
    seen = []

    def train(config, out):
        seen.append((config, out))
        return dict.fromkeys(("student_steps", "student_tflops", "total_tflops", "total_seconds"), 0)

    monkeypatch.setattr("selftrans.train.run.train", train)
    argv = (
        "train digits --train.steps=7 --train.batch_size 16 --train.lr 1e-3 --train.betas 0.8 0.95 --model.qk-norm False "
        "--train.compile None --stage2.until-step None --stage2.timestep-range 0.2 0.5 --stage1.timestep-range None "
        "--data.shape 1 8 8 --method vanilla --sample.labels 3 4 5 --stage1.block=1 --data=a/b"
    )
    assert main([*argv.split(), "--out", "a run"]) == 0
    config, out = seen[0]
    assert out == "a run"
    assert (config.train.steps, config.train.batch_size, config.train.lr) == (7, 16, 1e-3)
    assert config.train.betas == (0.8, 0.95) and config.train.compile is None and config.model.qk_norm is False
    assert config.sections["stage2"].until_step is None and config.sections["stage2"].timestep_range == (0.2, 0.5)
    assert config.sections["stage1"].timestep_range is None and config.sections["stage1"].block == 1
    assert config.data.shape == (1, 8, 8) and config.sample.labels == (3, 4, 5) and config.method == "vanilla"
    assert config.data.path == "a/b"
    assert config.model.width == RECIPES["digits"]().model.width  # the rest is the recipe's
    assert main(["train", "digits", "--teacher=some/run", "--out", "a run"]) == 0
    assert seen[1][0].sections["stage2"].teacher == "some/run" and seen[1][0].method == "self_transcendence"


def test_a_list_of_labels_survives_the_run_directory(tmp_path):
    argv = ["train", "digits", f"--out={tmp_path}", "--method=vanilla", *toy.flags({"train.steps": 1})]
    for _ in range(2):
        assert main([*argv, "--sample.labels", "3", "1"]) == 0
    assert from_json((tmp_path / "config.json").read_text()).sample.labels == (3, 1)


# ---- bad input: status 1, one line


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("train imagefolder --out x", "needs --data DIR"),
        ("train imagefolder --out x --data nowhere", "no manifest.json in nowhere"),
        ("train digits --out x --method repa2", "method 'repa2' is unknown"),
        ("train digits --out x --model.name SiT-Q/2", "did you mean SiT-"),
        ("train digits --out x --train.steps=-3", "train.steps must be above zero, not -3"),
        ("train digits --out x --model.heads 0", "model.heads must be above zero, not 0"),
        ("train digits --out x --model.heads 7", "width 64 is not a multiple of heads 7"),
        ("train digits --out file", "file"),
        ("sample nowhere --out x", "nowhere does not exist; expected a run directory"),
        ("analyse nowhere --out x", "nowhere does not exist"),
        ("evaluate nowhere --reference digits --features digitz", "did you mean digits?"),
        ("evaluate nowhere --reference digits --features x.safetensors", "x.safetensors"),
        ("classifier nowhere --out x", "no manifest.json in nowhere"),
        ("prepare nowhere --out x", "no source 'nowhere'"),
    ],
)
def test_bad_input(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert main(argv.split()) == 1
    assert said in one_line(capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_data_of_another_shape_or_class_count_than_the_checkpoints(tmp_path, capsys):
    colour, finished = toy.prepared(tmp_path / "colour"), toy.finished()
    capsys.readouterr()
    train = ["train", "imagefolder", f"--data={colour}", f"--out={tmp_path / 'run'}", *toy.taught_flags()]
    assert main([*train, f"--teacher={finished}"]) == 1
    assert "was trained on latents (1, 8, 8) with 10 classes; expected (3, 8, 8) with 2 classes" in one_line(capsys)
    assert main([*train, "--data.shape", "4", "8", "8"]) == 1
    assert "holds latents (3, 8, 8), but data.shape expects (4, 8, 8)" in one_line(capsys)
    assert main([*train, "--data.classes=3"]) == 1
    assert "has 2 classes, but data.classes expects 3" in one_line(capsys)
    assert main(["analyse", str(finished), f"--data={colour}", f"--out={tmp_path / 'a'}"]) == 1
    said = one_line(capsys)
    assert "(3, 8, 8) with 2 classes" in said and "(1, 8, 8) with 10" in said and "--data" in said
    assert not (tmp_path / "a").exists()
    run = toy.copy(toy.finished(), tmp_path / "copy")
    assert main(["train", "digits", f"--data={colour}", f"--out={run}", *toy.flags()]) == 1
    assert "was trained on other data than" in one_line(capsys)


# ---- what was made is measured


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Samples of the toy run, and a classifier of the digits."""
    folder = tmp_path_factory.mktemp("made")
    assert main(["sample", str(toy.finished()), f"--out={folder / 'samples'}", "--num=30", "--steps=2"]) == 0
    assert main(["classifier", str(toy.digits()), f"--out={folder / 'judge.safetensors'}", "--epochs=1"]) == 0
    return folder


def test_classifier_says_how_good_it_is(made, tmp_path, capsys):
    path = tmp_path / "again.safetensors"
    assert main(["classifier", str(toy.digits()), f"--out={path}", "--epochs=1"]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: accuracy 0.") and path.exists()
    flat = toy.prepared(tmp_path, classes=())
    assert main(["classifier", str(flat), f"--out={tmp_path / 'x'}"]) == 1
    assert "must end in .safetensors" in one_line(capsys)
    assert main(["classifier", str(flat), f"--out={tmp_path / 'x.safetensors'}"]) == 1
    assert "has 0 classes; a classifier needs at least two" in one_line(capsys)


def test_evaluate_samples_with_their_labels(made, capsys):
    samples, judge = made / "samples", made / "judge.safetensors"
    assert main(["evaluate", str(samples), f"--reference={toy.digits()}", f"--features={judge}"]) == 0
    text, shown = capsys.readouterr().out, json.loads((samples / "evaluate.json").read_text())
    assert f"Fréchet distance          {shown['frechet_distance']:.5g}" in text and "steps 2" in text
    assert shown["label_balance"] == {"classes": 10, "fewest": 3, "most": 3} and "3 to 3 images of each of 10" in text
    assert shown["made"]["steps"] == 2 and shown["made"]["num"] == 30 and 0 <= shown["accuracy"] <= 1
    assert "FID" not in json.dumps(shown)
    assert main(["evaluate", str(samples), "--reference=digits", f"--features={judge}"]) == 0
    again = json.loads((samples / "evaluate.json").read_text())
    assert again[again["metric"]] == pytest.approx(shown[shown["metric"]], rel=1e-6)  # prepared digits are the digits


def test_evaluate_a_folder_against_itself(made, tmp_path, capsys):
    for k in range(20):
        array = np.random.default_rng(k).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / f"{k}.png")
    argv = ["evaluate", str(tmp_path), f"--reference={tmp_path}", f"--features={made / 'judge.safetensors'}"]
    assert main(argv) == 0
    shown, text = json.loads((tmp_path / "evaluate.json").read_text()), capsys.readouterr().out
    assert shown[shown["metric"]] == pytest.approx(0, abs=1e-2)
    assert "sampler unknown, steps unknown" in text and shown["made"]["sampler"] is None, "nobody wrote it down"


def test_evaluate_refuses_samples_that_are_not_all_there(made, tmp_path, capsys):
    samples = toy.copy(made / "samples", tmp_path / "samples")
    (samples / "samples.npz").unlink()
    argv = ["evaluate", str(samples), "--reference=digits", f"--features={made / 'judge.safetensors'}"]
    assert main(argv) == 1
    assert "is not complete; repeat the `selftrans sample` command" in one_line(capsys)
    for name, content in {"samples.npz": "no archive", "samples.json": "[]"}.items():
        (samples / name).write_text(content)
        assert main(argv) == 1
        assert f"{samples} is damaged" in one_line(capsys)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short"])
def test_a_reference_that_is_no_archive(made, tmp_path, capsys, content):
    (tmp_path / "reference.npz").write_bytes(content)
    argv = ["evaluate", str(made / "samples"), f"--reference={tmp_path / 'reference.npz'}"]
    assert main([*argv, f"--features={made / 'judge.safetensors'}"]) == 1
    assert "reference.npz cannot be read" in one_line(capsys)


def test_analyse_makes_its_pictures(tmp_path, capsys):
    before = toy.tree(toy.finished())
    out = tmp_path / "new" / "seen"
    argv = ["analyse", str(toy.finished()), f"--out={out}", "--timesteps", "0.3", "0.6", "--samples=60"]
    assert main(argv) == 0
    assert sorted(os.listdir(out)) == ["analyse.json", "pca.png", "probes.png", "tsne-t0.3.png", "tsne-t0.6.png"]
    report = json.loads((out / "analyse.json").read_text())
    assert report["blocks"] == [1, 2, 3] and report["images"] == 60
    assert (report["stage"], report["step"]) == ("stage2", 8)
    assert {t: len(accuracy) for t, accuracy in report["probe_accuracy"].items()} == {"0.3": 3, "0.6": 3}
    for name in ("pca.png", "probes.png"):
        pixels = np.asarray(Image.open(out / name))
        assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels)) > 50
    assert toy.tree(toy.finished()) == before


# ---- as a process


def test_as_a_process(tmp_path):
    command = [sys.executable, "-m", "selftrans", "train", "digits", "--out", "run", "--model.width=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "selftrans: width 3 is not a multiple of 4, which 2-D sine-cosine positions need\n"
