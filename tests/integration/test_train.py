"""Training by the command and by `train()`: its files, its output, its count of operations, what is refused."""

import contextlib
import io
import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from selftrans.cli.main import main
from selftrans.config import from_json
from selftrans.train.run import train
from selftrans.train.run_report import totals
from tests.support import toy
from tests.support.operations import sit_forward_flops
from tests.support.toy import quick  # noqa: F401 - a fixture

# ---- one command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of `selftrans train digits` at toy size, and its output."""
    out = tmp_path_factory.mktemp("train") / "a run"
    small = {"train.preview_every": 3, "log.tensorboard": True, "train.accumulate": 1}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    screen, bars = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(bars):
        assert main(["train", "digits", f"--out={out}", *toy.flags(small)]) == 0
    torch.set_num_threads(before)
    output = {"out": screen.getvalue(), "err": bars.getvalue()}
    return out, output


def test_output_shows_stages_steps_rate_and_loss_terms(run):
    out, output = run
    lines = output["out"].splitlines()
    assert lines[0].startswith("[1/2] stage1: 4 steps, ") and "structure guidance at block 2" in lines[0]
    assert " M trained, with heads)" in lines[0] and " M trained, with heads)" in lines[1]
    assert lines[1].startswith("[2/2] stage2: 8 steps, ") and "self guidance at block 1 until step 5" in lines[1]
    assert lines[2].startswith("done: 8 student steps, ") and lines[2].endswith(f"-> {out}")
    name = shlex.quote(str(out))
    assert lines[3:] == [f"samples: selftrans sample {name} --out SAMPLES; curves and previews: selftrans ui {name}"]
    for text in ("stage1: 100%", "4/4", "stage2: 100%", "8/8", "step/s", "loss=", "flow=", "structure/feature_norm="):
        assert text in output["err"], text
    assert "warning" not in output["err"]


def test_run_directory_holds_config_manifest_and_report(run):
    out, _ = run
    raw = json.loads((out / "config.json").read_text())
    config = from_json((out / "config.json").read_text())
    assert config.train.steps == 8 and config.sections["stage1"].steps == 4 and config.data.path is None
    own = {"stage1", "stage2"}
    assert set(raw) == {"version", "recipe", "method", "data", "model", "train", "sample", "log", "init", "lora"} | own
    assert json.loads((out / "run.json").read_text())["order"] == ["stage1", "stage2"]
    data = json.loads((out / "data.json").read_text())
    assert data == json.loads((out / "data" / "manifest.json").read_text()) and data["count"] == 1797
    assert {path.name for path in out.iterdir()} - {".lock"} == {
        *("config.json", "data.json", "run.json", "data", "stage1", "stage2", "tensorboard")
    }
    for stage in ("stage1", "stage2"):
        assert {path.name for path in (out / stage).iterdir()} == {"checkpoints", "previews", "log.jsonl"}


def test_checkpoints_are_safetensors_and_json_with_equal_permissions(run):
    out, _ = run
    names = {"student", "ema", "heads", "optimizer"}
    for stage, steps in {"stage1": (3, 4), "stage2": (6, 8)}.items():
        assert [int(path.name[5:]) for path in sorted((out / stage / "checkpoints").iterdir())] == list(steps)
        for path in (out / stage / "checkpoints").iterdir():
            assert {file.name for file in path.iterdir()} == {f"{name}.safetensors" for name in names} | {"state.json"}
            assert len({file.stat().st_mode for file in path.iterdir()}) == 1
    assert {path.suffix for path in out.rglob("*") if path.is_file() and "tensorboard" not in path.parts} == {
        *("", ".json", ".jsonl", ".safetensors", ".png")
    }


def test_summary_says_compute_once_for_a_run_of_one_stage():
    report = {"order": ["vanilla"], "student_steps": 800, "student_tflops": 3.126, "teacher": None}
    report |= {"total_tflops": 3.126, "total_seconds": 91.4}
    assert totals(report) == "done: 800 student steps, 3.13 TFLOPs, 91 s"
    both = "done: 800 student steps, 3.13 TFLOPs; with all stages and the teacher's training 4.82 TFLOPs, 134 s"
    costly = report | {"total_tflops": 4.82, "total_seconds": 134.0}
    assert totals(costly | {"order": ["stage1", "stage2"]}) == both
    assert totals(costly | {"order": ["stage2"], "teacher": {"tflops": 1.694}}) == both, "a teacher of another run"


def test_log_lines(run):
    stage1, stage2 = toy.log(run[0], "stage1"), toy.log(run[0], "stage2")
    assert [line["step"] for line in stage1] == [2, 4]
    assert [line["step"] for line in stage2] == [2, 4, 6, 8]
    common = ["stage", "step", "loss", "flow"]
    guided = ["", "/feature_norm", "/target_norm"]
    rest = ["grad_norm", "lr", "tflops"]
    assert list(stage1[0]) == common + [f"structure{part}" for part in guided] + rest
    assert list(stage2[1]) == common + [f"self{part}" for part in guided] + rest
    assert list(stage2[3]) == common + rest  # after the end of the guidance
    assert stage2[2]["self"] > 0  # this line includes step 5, the last with guidance
    for line in stage1:
        assert line["loss"] == pytest.approx(line["flow"] + 0.5 * line["structure"], rel=1e-6)
    assert [line["lr"] for line in stage2] == pytest.approx([2e-3 / 3, 1e-3, 1e-3, 1e-3])


def test_tensorboard_shows_the_log(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run[0] / "tensorboard"))
    events.Reload()
    for stage in ("stage1", "stage2"):
        lines = toy.log(run[0], stage)
        seen = events.Scalars(f"{stage}/loss")
        assert [(event.step, pytest.approx(event.value)) for event in seen] == [(x["step"], x["loss"]) for x in lines]


def test_previews_are_grids_of_pictures(run):
    files = sorted((run[0] / "stage2" / "previews").iterdir())
    assert [file.name for file in files] == ["step-00000003.png", "step-00000006.png", "step-00000008.png"]
    pixels = [np.asarray(Image.open(file)) for file in files]
    assert min(pixels[0].shape[:2]) >= 2 * 64  # four digits, enlarged, with their classes below
    assert all(len(np.unique(picture)) > 20 for picture in pixels) and not np.array_equal(pixels[0], pixels[2])


# ---- compute


def test_operations_in_run_json_equal_a_count_by_hand():
    report = json.loads((toy.finished() / "run.json").read_text())
    student = 3 * 8 * sit_forward_flops(16, 32, 3, 4)  # a step: 8 images, the backward pass counts twice
    rows = 2 * 2  # two micro-batches of four: at most floor(4 * 0.3) + 1 of their times lie in the range
    structure_head = 2 * 16 * (32 * 16 + 16 * 16 + 16 * 32 + 32 * 4)
    self_head = 2 * 16 * (32 * 16 + 16 * 16 + 16 * 32)
    teacher = sit_forward_flops(16, 32, 2, 4, final=False)  # two thirds of three blocks, without the layers after them
    stage1 = 4 * (student + 3 * rows * structure_head)
    stage2 = 8 * student + 5 * (3 * rows * self_head + 2 * rows * teacher)  # five steps of guidance, two halves each
    assert [(s["stage"], s["steps"]) for s in report["stages"]] == [("stage1", 4), ("stage2", 8)]
    assert [s["tflops"] * 1e12 for s in report["stages"]] == pytest.approx([stage1, stage2], rel=1e-12)
    assert report["student_steps"] == 8 and report["student_tflops"] * 1e12 == pytest.approx(stage2)
    assert report["total_tflops"] * 1e12 == pytest.approx(stage1 + stage2)
    assert report["method"] == "self_transcendence" and report["teacher"] is None
    lines = toy.log(toy.finished())
    assert lines[3]["tflops"] - lines[2]["tflops"] == pytest.approx(2 * student / 1e12)  # without the teacher


# ---- other methods, other data


def test_vanilla_and_structure_are_single_stages(tmp_path, capsys):
    assert main(["train", "digits", f"--out={tmp_path / 'v'}", "--method=vanilla", *toy.flags()]) == 0
    assert "[1/1] vanilla: 8 steps" in capsys.readouterr().out
    assert {*toy.log(tmp_path / "v", "vanilla")[0]} == {"stage", "step", "loss", "flow", "grad_norm", "lr", "tflops"}
    assert main(["train", "digits", f"--out={tmp_path / 's'}", "--method=structure", *toy.flags()]) == 0
    assert "[1/1] stage1: 8 steps" in capsys.readouterr().out
    assert json.loads((tmp_path / "s" / "run.json").read_text())["student_steps"] == 8


def test_structure_alone_equals_stage_1_of_the_full_method(tmp_path):
    train(toy.toy({"method": "structure", "train.steps": 4}), tmp_path, quiet=True)
    toy.assert_same(toy.tensors(tmp_path, "stage1"), toy.tensors(toy.finished(), "stage1"))


def test_unused_teacher_is_reported_as_ignored(tmp_path, capsys):
    argv = ["train", "digits", f"--out={tmp_path}", "--method=vanilla", f"--teacher={toy.finished()}", *toy.flags()]
    assert main(argv) == 0
    assert "warning: --teacher is ignored: method vanilla has no teacher" in capsys.readouterr().err


def test_ignored_settings_are_reported_on_stderr(tmp_path, capsys):
    argv = ["train", "digits", f"--data={toy.digits()}", f"--out={tmp_path}", *toy.flags({"method": "vanilla"})]
    assert main([*argv, "--dispersive.weight=0.1", "--train.steps=1"]) == 0
    assert "dispersive.weight is ignored: method vanilla does not use it" in capsys.readouterr().err


def test_run_directory_with_prepared_data_is_refused(tmp_path, capsys):
    data = toy.prepared(tmp_path)
    before = toy.tree(data)
    assert main(["train", "imagefolder", f"--data={data}", f"--out={data}", *toy.flags()]) == 1
    assert f"{data} holds prepared data; choose another --out" in capsys.readouterr().err
    assert toy.tree(data) == before


@pytest.mark.parametrize(
    ("classes", "count"),
    [((), 6), (("only",), 6), (("a b", "ü"), 3), (("x",), 1), ((), 1)],
    ids=["unconditional", "one class", "fewer than a batch", "one picture of one class", "one picture"],
)
def test_small_image_folders_train_sample_and_are_analysed(tmp_path, capsys, classes, count):
    toy.pictures(tmp_path / "my pictures", classes, count)
    assert main(["prepare", str(tmp_path / "my pictures"), f"--out={tmp_path / 'data'}"]) == 0
    small = ["--train.steps=3", "--stage1.steps=2", "--train.preview-every=3"]
    run = tmp_path / "run"
    assert main(["train", "imagefolder", f"--data={tmp_path / 'data'}", f"--out={run}", *toy.flags(), *small]) == 0
    assert main(["sample", str(run), f"--out={tmp_path / 'made'}", "--num=3", "--steps=2"]) == 0
    with np.load(tmp_path / "made" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 8, 8, 3)
        assert list(arrays["arr_1"]) == [k % max(1, len(classes)) for k in range(3)]
    capsys.readouterr()
    status = main(["analyse", str(run), f"--out={tmp_path / 'seen'}"])
    assert status == (count == 1)
    assert "1 image is too few for t-SNE" in capsys.readouterr().err or count > 1


# ---- failures


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in fp16")
def test_fp16_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fp16 needs a GPU; use bf16 or fp32"):
        train(toy.toy({"train.precision": "fp16"}), tmp_path)


def test_diverged_training_stops_and_keeps_the_last_good_checkpoint(tmp_path, capsys):
    bad = {"train.lr": 1e30, "train.checkpoint_every": 1, "log.every": 100, "train.warmup": 0, "method": "vanilla"}
    bad |= {"train.max_skips": 4}
    assert main(["train", "digits", f"--out={tmp_path}", *toy.flags(bad | {"train.steps": 20})]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert (
        message.startswith("selftrans: ")
        and "train.lr" in message
        and str(tmp_path / "vanilla" / "checkpoints") in message
    )
    assert all(torch.isfinite(t).all() for name, t in toy.tensors(tmp_path, "vanilla").items() if "student" in name)
    assert toy.checkpoint(tmp_path, "vanilla").name < "step-00000010"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("stage1.block", 9, "structure reads block 9, but the student has blocks 1..3"),
        ("stage2.student_block", 9, "self reads block 9, but the student has blocks 1..3"),
        ("stage2.student_block", 0, "self reads block 0"),
        ("stage2.teacher_block", 9, "teacher block 9 is outside the teacher's 1..3"),
        ("stage2.range_mode", "all", "range_mode"),
        ("stage2.timestep_range", (0.7, 0.4), "timestep_range"),
        ("train.batch_size", 9, "multiple of 2"),
        ("model.patch", 3, "patches of 3"),
        ("model.width", 30, "positions on 2 axes need a multiple of 4 channels, not 30"),
        ("data.shape", (4, 8, 8), "data.shape expects"),
        ("data.classes", 7, "data.classes expects 7"),
        ("method", "self_transcendance", "unknown"),
        ("method", "no_such_module:method", "cannot be imported"),
        ("method", "selftrans.methods:no_such_function", "cannot be imported"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(tmp_path, field, value, message):
    with pytest.raises(ValueError, match=message):
        train(toy.toy({field: value}), tmp_path / "run")
    assert {path.name for path in tmp_path.glob("run/*")} <= {".lock"}


def test_method_outside_the_package_trains_by_module_and_name(tmp_path, monkeypatch):
    (tmp_path / "outside_the_package.py").write_text(
        "from selftrans.methods.spec import MethodSpec, Stage\n"
        "def plan(config):\n"
        "    return [Stage('own', config.train.steps, lambda student, teacher: [])]\n"
        "METHOD = MethodSpec('own', 'Own', plan)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    report = train(toy.toy({"method": "outside_the_package:METHOD", "train.steps": 2}), tmp_path / "run", quiet=True)
    assert report["stages"][0]["stage"] == "own" and toy.checkpoint(tmp_path / "run", "own").exists()
