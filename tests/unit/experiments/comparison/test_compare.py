"""`selftrans compare`: the table compared with hand-computed numbers, the command, and its repetition."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import time
import warnings
from collections import Counter
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from selftrans.checkpoints import format as checkpoint
from selftrans.cli.main import main
from selftrans.data.dataset import Dataset
from selftrans.evaluate.classifier import SmallClassifier
from selftrans.experiments import html_report, reference
from selftrans.experiments.comparison import comparison_settings, measurement, runner, worker
from selftrans.experiments.comparison.compare import compare_methods
from selftrans.experiments.comparison.compared_runs import Comparison, interval
from selftrans.experiments.comparison.comparison_settings import for_method, shared_settings
from selftrans.experiments.comparison.measurement import (
    Measurement,
    PointsFile,
    identity_of,
    measure_point,
    measured_before,
    stored_conditions,
)
from selftrans.experiments.comparison.summary import (
    as_csv,
    curve,
    first_below,
    mean_curve,
    rows,
    time_line,
    time_shares,
)
from selftrans.experiments.comparison.worker import StepBar, train_one
from selftrans.methods.registry import titles
from selftrans.methods.repa import Repa
from selftrans.methods.self_transcendence import Stage1, Stage2
from selftrans.recipes import recipe
from selftrans.storage import temporary_for, write_json
from selftrans.train.capture_rules import ENDED, NotCaptured
from selftrans.train.trainer import Trainer
from tests.support import toy
from tests.support.pictures import class_folders
from tests.support.pools import forked_workers, one_process  # noqa: F401 - fixtures
from tests.support.processes import LONGEST
from tests.support.toy import PIXELS, quick  # noqa: F401 - quick is a fixture


def result(distances: list[float], *, teacher: float = 0.0, seconds: float = 10.0) -> tuple:
    """run.json and measured points: a distance every 100 steps, one TFLOP each."""
    measured = [
        {"step": 100 * i, "seconds": seconds, "tflops": float(i), "distance": d, "accuracy": 0.5, "probe": 0.25 * i}
        for i, d in enumerate(distances, start=1)
    ]
    student = measured[-1]["tflops"]
    return {"total_seconds": seconds, "total_tflops": student + teacher, "student_tflops": student}, measured


RESULTS = {
    ("vanilla", 0): result([80.0, 40.0, 10.0]),
    ("vanilla", 1): result([80.0, 40.0, 20.0]),
    ("fast", 0): result([40.0, 2.5, 1.0], teacher=2.0),
    ("fast", 1): result([20.0, 10.0, 3.0], teacher=2.0),
    ("slow", 0): result([90.0, 80.0, 11.0]),
    ("slow", 1): result([90.0, 80.0, 20.0]),
}


FAST = {job: run for job, run in RESULTS.items() if job[0] == "fast"}


def test_shares_of_the_time_by_hand():
    spent = {"steps": 30.0, "training": 40.0, "measuring": 10.0}
    results = {
        ("vanilla", seed): (run | {"spent": spent}, points) for seed, (run, points) in enumerate(RESULTS.values())
    }
    shares = time_shares(dict(list(results.items())[:2]), 60.0, 2)
    assert shares == {
        "seconds": 60.0, "workers": 2, "steps": 0.5, "training": pytest.approx(1 / 6), "measuring": pytest.approx(1 / 6),
        "other": pytest.approx(1 / 6),
    }  # fmt: skip
    line = "time: 50% training steps, 17% models and checkpoints, 17% measuring, 17% other, of 2 workers in 60 s"
    assert time_line(shares) == line
    assert time_line(time_shares(RESULTS, 60.0, 2)) is None  # nothing was trained


def test_rows_hold_means_and_deviations_over_seeds():
    vanilla, fast, slow = rows(RESULTS, ("vanilla", "fast", "slow"))
    assert vanilla["distance"] == {"mean": 15.0, "std": pytest.approx(math.sqrt(50))} and vanilla["seeds"] == 2
    assert fast["total_tflops"] == {"mean": 5.0, "std": 0.0} and fast["probe"]["mean"] == 0.75
    assert vanilla["steps_to_baseline"]["mean"] == 300 and vanilla["reached"] == 2
    # seed 0: from 40 at 100 to 2.5 at 200, 10 is halfway in log; seed 1: 20 at the first point
    assert fast["steps_to_baseline"]["mean"] == pytest.approx((150 + 100) / 2)
    assert fast["tflops_to_baseline"]["mean"] == pytest.approx((2 + 1.5 + 2 + 1) / 2), "the teacher's is in it"
    assert slow["reached"] == 1 and slow["steps_to_baseline"] == {"mean": 300.0, "std": 0.0}


def test_unknown_compute_gives_no_numbers():
    """The compute of an imported teacher, and the step of a run that reaches the goal at its first point."""
    imported = {("fast", seed): ({**run, "total_tflops": None}, points) for (_, seed), (run, points) in FAST.items()}
    _, row = rows({**RESULTS, **imported}, ("vanilla", "fast"))
    assert row["total_tflops"] is None and row["tflops_to_baseline"] is None and row["reached"] == 2
    assert row["at_once"] == 1, "of seed 1, whose first point is at 20"
    assert mean_curve({**RESULTS, **imported}, "fast", "tflops") == ([], [], [])
    *_, steps, compute = html_report.cells(row, {"fast": "fast"})
    assert steps == "≤ 125 ± 35" and compute == "-"


def test_mean_curves_keep_the_steps_that_every_seed_was_measured_at():
    run, measured = result([8.0, 4.0, 2.0])
    assert mean_curve({("a", 0): (run, measured), ("a", 1): (run, measured[::2])}, "a")[:2] == ([100, 300], [8.0, 2.0])


def test_columns_of_the_baseline_need_the_baseline():
    (row,) = rows(RESULTS, ("fast",), baseline="other")
    assert "steps_to_baseline" not in row
    (row,) = rows({("vanilla", 0): result([5.0]), ("bad", 0): result([9.0])}, ("bad",))
    assert row["steps_to_baseline"] is None and row["reached"] == 0


def test_failed_runs_are_counted_and_are_in_no_mean():
    """Without vanilla's second seed, and without any run of `slow`: by hand."""
    failed = {("vanilla", 1), ("slow", 0), ("slow", 1)}
    held = {job: run for job, run in RESULTS.items() if job not in failed}
    table = rows(held, ("vanilla", "fast", "slow"), failed=failed)
    vanilla, fast, slow = table
    assert (vanilla["seeds"], vanilla["failed"]) == (1, 1) and vanilla["distance"] == {"mean": 10.0, "std": 0.0}
    assert "failed" not in fast and fast["distance"]["mean"] == 2.0
    assert (fast["paired"], fast["reached"]) == (1, 1) and fast["steps_to_baseline"] == {"mean": 150.0, "std": 0.0}
    assert (slow["seeds"], slow["failed"], slow["steps"], slow["distance"]) == (0, 2, None, None)
    assert mean_curve(held, "slow") == ([], [], [])
    names = html_report.marked(table)
    assert names == {"vanilla": "vanilla (1 of 2 seeds failed)", "fast": "fast", "slow": "slow (failed)"}
    assert html_report.cells(slow, names) == ["slow (failed)", *["-"] * 9]
    assert html_report.cells(fast, names)[-2:] == ["150", "3.50"], "the runs that have a baseline are all that reach it"
    (alone,) = rows({("vanilla", 0): held["vanilla", 0], ("fast", 1): held["fast", 1]}, ("fast",))
    assert html_report.cells(alone, names)[-2:] == ["-", "-"], "no pair: it is unknown whether it gets there"


def test_curves_over_steps_and_total_compute():
    assert curve(RESULTS["fast", 0]) == ([100, 200, 300], [40.0, 2.5, 1.0])
    assert curve(RESULTS["fast", 0], "tflops") == ([3.0, 4.0, 5.0], [40.0, 2.5, 1.0])
    x, mean, deviation = mean_curve(RESULTS, "fast")
    assert x == [100, 200, 300] and mean == [30.0, 6.25, 2.0] and deviation[2] == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(
    ("y", "goal", "x"),
    [([8, 4, 2], 4, 200), ([8, 4, 2], 1, None), ([8, 2], 4, 150), ([8, 0.0], 0.0, 200), ([3], 4, 100)],
)
def test_first_step_at_a_goal_is_interpolated(y, goal, x):
    found = first_below([100 * (i + 1) for i in range(len(y))], y, goal)
    assert found == (None if x is None else pytest.approx(x))


def test_csv_has_a_column_for_each_mean_and_deviation():
    read = list(csv.DictReader(as_csv(rows(RESULTS, ("vanilla", "slow"))).splitlines()))
    assert [row["method"] for row in read] == ["vanilla", "slow"]
    assert float(read[0]["distance"]) == 15 and float(read[0]["distance_std"]) == pytest.approx(math.sqrt(50))


def test_teacher_is_shared_only_where_it_is_the_same(tmp_path):
    config, _, _ = shared_settings(recipe("digits"), tmp_path, features="values")
    assert config.sections["stage1"].steps == config.train.steps
    other = config.override({"stage1.target": "latent"})
    short = config.override({"stage1.steps": interval(config.train.steps)})
    odd = config.override({"stage1.steps": 7})
    small = config.override({"stage2.teacher_width": 32})
    variants = {"structure": dataclasses.replace(config, method="structure"), "same": config, "other": other}
    chosen = Comparison(config, variants | {"short": short, "odd": odd, "small": small}, (3,), tmp_path, 10, "digits")
    assert chosen.teacher(("same", 3)) == chosen.teacher(("short", 3)) == ("structure", 3)
    assert chosen.teacher(("small", 3)) is None
    assert chosen.teacher(("other", 3)) is None and chosen.teacher(("odd", 3)) is None
    assert chosen.teacher(("structure", 3)) is None
    given = config.override({"stage2.teacher": "elsewhere"})
    assert Comparison(config, variants | {"same": given}, (3,), tmp_path, 10, "digits").teacher(("same", 3)) is None


def test_grey_pictures_with_classes_are_measured_by_a_classifier_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_settings, "classifier_of", lambda *_: Path("c.safetensors"))
    config = toy.toy({"data.path": str(toy.plain_digits())}, name="imagefolder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shared_settings(config, tmp_path)[1:] == ("c.safetensors", None)


def test_steps_at_which_runs_are_measured(tmp_path):
    config = recipe("digits").override({"train.steps": 1000})
    chosen = Comparison(config, {}, (), tmp_path, 10, "digits")
    assert chosen.measured_steps(1000) == [200, 400, 600, 800, 1000] and len(chosen.measured_steps(1001)) == 6
    longer = dataclasses.replace(chosen, every=200)
    assert longer.measured_steps(1513) == [200, 400, 600, 800, 1000, 1513]
    assert dataclasses.replace(chosen, every=1).measured_steps(3) == [1, 2, 3]


def test_points_measured_before_stay_in_the_file_until_all_are_there(tmp_path):
    """They may be measured in any order, and an interruption loses none."""
    old = [{"sha256": name, "distance": 1.0} for name in "abx"]
    (tmp_path / "measured.json").write_text(json.dumps(old))
    points = PointsFile(tmp_path, [Path("1"), Path("2")])

    def stored() -> str:
        return "".join(point["sha256"] for point in json.loads((tmp_path / "measured.json").read_text()))

    points.add(Path("2"), old[1])
    assert (stored(), points.points) == ("bax", [old[1]])
    points.add(Path("1"), old[0])
    assert (stored(), points.points) == ("ab", old[:2])


def test_comparable_points_are_kept_and_damaged_ones_measured_again(tmp_path, monkeypatch):
    sample, dataset = dataclasses.replace(recipe("digits").sample, num=3), Dataset.open(toy.plain_digits())
    identity, path = (
        identity_of(sample, dataset, stored_conditions(dataset, sample), "e", 2),
        tmp_path / "measured.json",
    )
    assert measured_before(path, identity) == {}
    numbers = {
        "step": 2,
        "seconds": 0.5,
        "metric": "m",
        "distance": 1.0,
        "probe": 0.5,
        "tflops": None,
        "accuracy": None,
    }
    sound = {"sha256": "w"} | numbers | json.loads(json.dumps(identity))
    assert (sound["images"], sound["extractor_sha256"], sound["block"]) == (3, "e", 2)
    others = {"images": 4, "block": 1, "extractor_sha256": "f", "sampler": sound["sampler"] | {"guidance_scale": 9.0}}
    path.write_text(json.dumps([sound, *(sound | {"sha256": key, key: value} for key, value in others.items())]))
    assert measured_before(path, identity) == {"w": sound}
    monkeypatch.setattr(measurement, "decoder_dtype", lambda *_: torch.bfloat16)
    reduced = identity_of(sample, dataset, stored_conditions(dataset, sample), "e", 2)
    assert reduced == identity | {"decoder": "bf16"} and measured_before(path, reduced) == {}
    path.write_text(json.dumps([sound, sound | {"sha256": "r", "decoder": "bf16"}]))
    assert measured_before(path, identity) == {"w": sound}, "not one whose samples were decoded in bfloat16"
    assert list(measured_before(path, reduced)) == ["r"]
    partial = '[{"images": 3, "extractor_sha256": "e"}]'
    for content in ("", "[{", "3", "[3]", "null", '{"a": 1}', "[" * 100_000, partial):
        path.write_text(content)
        assert measured_before(path, identity) == {}


def test_settings_of_a_run_do_not_depend_on_the_other_methods():
    config = recipe("digits").override({"repa.encoder": "some/encoder", "sra.span": 0.1})
    plain = recipe("digits")
    assert for_method(config, "repa").sections == {"repa": Repa(encoder="some/encoder", head_width=128)}
    assert for_method(config, "sra") == plain.override({"method": "sra", "sra.span": 0.1}).restricted()
    assert for_method(config, "vanilla") == plain.override({"method": "vanilla"}).restricted()
    config = config.override({"stage1.weight": 0.1, "stage2.weight": 0.1, "stage1.steps": 9})
    assert for_method(config, "vanilla") == plain.override({"method": "vanilla"}).restricted()
    assert for_method(config, "structure") == plain.override({"method": "structure", "stage1.weight": 0.1}).restricted()
    taught = for_method(config, "self_transcendence")
    assert (taught.section(Stage1).steps, taught.section(Stage1).weight, taught.section(Stage2).weight) == (9, 0.1, 0.1)


class Tags(HTMLParser):
    """Open and closed tags balance, and pictures are inside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.pictures += dict(attrs)["src"].startswith("data:image/")
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_compare_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    out, prepare, prepared = tmp_path / "compared", comparison_settings.prepare_builtin, []
    monkeypatch.setattr(comparison_settings, "prepare_builtin", lambda *args: prepared.append(args) or prepare(*args))
    command = f"compare digits --out {out} --steps 2 --images 24 --workers 1 --model.width 16 --model.depth 3".split()
    command += [
        "--train.batch-size",
        "16",
        "--sra.head-width",
        "8",
        "--stage1.head-width",
        "8",
        "--stage2.head-width",
        "8",
    ]
    command += ["--stage2.until-step", "1", "--layersync.until-step", "1", "--sample.steps", "2"]
    methods = ["vanilla", "structure", "self_transcendence", "layersync"]
    assert main([*command, "--methods", *methods, "--seeds", "0", "1"]) == 0
    output = capfd.readouterr()
    assert len(prepared) == 1, "prepared once"
    assert all(name in output.out for name in [*titles(methods).values(), "±", "compare.html"])
    assert "selftrans: warning: 24 images for 64 dimensions" in output.err and "UserWarning" not in output.err
    assert "first: measuring the training data" in output.err, "the only worker trains nothing meanwhile"
    summary = json.loads((out / "compare.json").read_text())
    assert [row["method"] for row in summary["table"]] == methods
    assert 0 < summary["time"]["steps"] < 1 and f"time: {summary['time']['steps']:.0%} training steps" in output.out
    assert summary["config"]["model"]["width"] == 16 and summary["seeds"] == [0, 1] and summary["images"] == 24
    for row in summary["table"]:
        assert row["seeds"] == 2 and row["steps"] == 2 and row["distance"]["mean"] > 0
    taught = json.loads((out / "self_transcendence-seed0" / "run.json").read_text())
    alone = json.loads((out / "structure-seed0" / "run.json").read_text())
    assert [stage["stage"] for stage in taught["stages"]] == ["stage2"], "stage 1 is that of the run next to it"
    assert taught["total_tflops"] == pytest.approx(taught["student_tflops"] + alone["total_tflops"])
    lasts = [summary["curves"]["tflops"][name][0][-1] for name in methods]
    assert lasts[2] == pytest.approx(taught["total_tflops"]) and lasts[0] < lasts[3] + 1e-9 < lasts[2]
    assert summary["config"]["layersync"]["until_step"] == 1 and summary["autoencoder"] == PIXELS
    assert ", until_step 1" in (out / "compare.html").read_text()
    page = Tags((out / "compare.html").read_text())
    assert page.open == [] and page.pictures == 1 + len(methods)
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG") and (out / "compare.csv").exists()
    # repeated with one more method: existing runs are kept
    weights = out / "vanilla-seed0" / "vanilla" / "checkpoints" / "step-00000002" / "ema.safetensors"
    trained = weights.stat().st_mtime_ns
    assert main([*command, "--methods", *methods, "sra", "--seeds", "0", "1"]) == 0 and len(prepared) == 2
    kept = {row["method"]: row["distance"] for row in json.loads((out / "compare.json").read_text())["table"]}
    assert {row["method"]: row["distance"] for row in summary["table"]} == {
        m: kept[m] for m in methods
    } and "sra" in kept
    assert weights.stat().st_mtime_ns == trained


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_comparison_continues_with_more_steps_methods_and_seeds(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With more steps, another sampler, and one more method with its own settings: one table with equal measurements."""
    out = tmp_path / "compared"
    command = f"compare digits --out {out} --images 24 --workers 1 --model.width 16 --model.depth 3".split()
    command += [
        "--train.batch-size",
        "16",
        "--stage1.head-width",
        "8",
        "--stage2.head-width",
        "8",
        "--stage1.block",
        "1",
    ]
    command += ["--sample.steps"]
    assert main([*command, "2", "--steps", "10", "--methods", "vanilla", "structure", "--seeds", "0"]) == 0
    more = ["--methods", "vanilla", "structure", "self_transcendence", "--seeds", "0", "1", "--stage1.steps", "3"]
    assert main([*command, "3", "--steps", "15", *more]) == 0, capfd.readouterr().err
    summary = json.loads((out / "compare.json").read_text())
    assert summary["curves"]["step"]["vanilla"][0] == [6, 12, 15], "what the run that was made longer has, too"
    assert summary["curves"]["step"]["self_transcendence"][0] == [3, 6, 9, 12, 15]
    stages = [json.loads((out / f"self_transcendence-seed{k}" / "run.json").read_text())["stages"] for k in (0, 1)]
    assert list(map(len, stages)) == [2, 1], "the longer run has no checkpoint at step 3 that could teach"
    measured = [point for path in out.glob("*/measured.json") for point in json.loads(path.read_text())]
    assert len(measured) == 4 * 5 + 2 * 3
    assert {(point["sampler"]["steps"], point["block"]) for point in measured} == {(3, 1)}
    assert summary["sampler"]["steps"] == 3 and summary["config"]["sample"]["steps"] == 3


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_data_without_classes_are_compared_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The table omits probe and accuracy, which need classes."""
    labelled, flat = class_folders(tmp_path / "labelled", 12), tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(labelled.rglob("*.png"))):
        shutil.copy(path, flat / f"{i}.png")
    for source in (labelled, flat):
        assert main(["prepare", str(source), "--out", str(tmp_path / f"{source.name}-data")]) == 0
    extractor = str(tmp_path / "classifier.safetensors")
    assert main(["classifier", str(tmp_path / "labelled-data"), "--out", extractor, "--epochs", "1"]) == 0
    command = f"compare imagefolder --data {tmp_path}/flat-data --features {extractor} --images 8 --out {tmp_path}/out"
    command += " --steps 2 --methods vanilla --workers 1 --seeds 0 --model.width 16 --model.depth 2 --model.heads 2"
    command += " --train.batch-size 4 --stage1.block 1 --sample.steps 1"
    assert main(command.split()) == 0, capfd.readouterr().err
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())["table"]
    assert row["distance"]["mean"] > 0 and row["probe"] is None and row["accuracy"] is None


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_given_teacher_is_used_and_its_cost_is_unknown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = ["--model.width", "16", "--model.depth", "3", "--train.batch-size", "16", "--stage1.head-width", "8"]
    command = ["compare", "digits", "--out", str(tmp_path / "x"), "--images", "24", "--workers", "1", "--steps", "5"]
    command += [*small, "--stage2.head-width", "8", "--sample.steps", "2", "--seeds", "0", "--stage2.teacher"]
    assert main([*command, "nowhere"]) == 1
    assert "nowhere does not exist" in capfd.readouterr().err and not list((tmp_path / "x").glob("*-seed*"))
    teacher = tmp_path / "teacher"
    assert main(["train", "digits", "--out", str(teacher), "--method", "structure", "--train.steps", "4", *small]) == 0
    for path in teacher.glob("stage1/checkpoints/*/*.safetensors"):  # as for imported weights
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["selftrans"]) | {"tflops": None}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        save_file(tensors, path, metadata={"selftrans": json.dumps(about)})
        shutil.copy(path, tmp_path / path.name)
    assert main([*command, str(tmp_path / "ema.safetensors"), "--train.path", "cosine"]) == 1
    assert "was trained on the linear path" in capfd.readouterr().err and not list((tmp_path / "x").glob("*-seed*"))
    assert main([*command, str(tmp_path / "ema.safetensors"), "--methods", "structure", "self_transcendence"]) == 0
    output = capfd.readouterr()
    summary = json.loads((tmp_path / "x" / "compare.json").read_text())
    assert [one["path"] for one in summary["teachers"]] == [str(tmp_path / "ema.safetensors")]
    assert summary["table"][1]["total_tflops"] is None
    assert summary["curves"]["tflops"]["self_transcendence"] == [[], [], []]
    assert "ema.safetensors, step 4" in (tmp_path / "x" / "compare.html").read_text()
    assert output.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "digit", "--out", "x"], "did you mean digits"),
        (["compare", "digits", "--out", "x", "--methods", "vanila"], "'vanila' is unknown; did you mean vanilla"),
        (["compare", "digits", "--out", "x", "--methods", "vanilla", "vanilla"], "each of them once"),
        (["compare", "digits", "--out", "x", "--seeds", "1", "1"], "seeds that differ"),
        (["compare", "digits", "--out", "x", "--workers", "0"], "--workers 0 should be 1 or more"),
        (["quickstart", "--out", "x", "--workers", "-1"], "--workers -1 should be 1 or more"),
        (["quickstart", "--out", "x", "--seeds", "-1"], "seeds that differ from each other, from 0 on"),
        (["compare", "digits", "--out", "x", "--train.stepz", "3"], "did you mean --train.steps"),
        (["compare", "digits", "--methods", "vanilla"], "--out"),
        (["compare", "cifar10", "--out", "x"], "needs --data DIR"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(words, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(words) in (1, 2)
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("repa", [], "holds no features"),
        ("layersync", ["--layersync.target-block", "9"], "layersync reads block 9, but the student has blocks 1..3"),
        ("sra", ["--sra.target-block", "9"], "sra.target_block 9 is outside the student's 1..3"),
        ("self_transcendence", ["--stage2.teacher-block", "9"], "teacher block 9 is outside the teacher's 1..3"),
        ("structure", ["--train.lr-decay", "2", "5"], "steps, but train.lr_decay ends at step 5"),
    ],
)
def test_unusable_methods_are_refused_before_training(method, words, message, tmp_path, capfd):
    command = ["compare", "digits", "--out", str(tmp_path / "x"), "--methods", "vanilla", method, "--seeds", "0"]
    assert main([*command, "--features", "values", "--model.width", "16", "--model.depth", "3", *words]) == 1
    assert message in capfd.readouterr().err and not list((tmp_path / "x").glob("*-seed*"))


def test_features_of_other_images_are_refused_before_training(tmp_path, capfd):
    SmallClassifier(16, 1, 10).save(tmp_path / "of-16.safetensors")
    command = ["compare", "digits", "--out", str(tmp_path / "x"), "--features", str(tmp_path / "of-16.safetensors")]
    assert main(command) == 1
    error = capfd.readouterr().err
    assert "takes 16x16x1 images, these are 8x8x1" in error and error.count("\n") == 1
    assert not list((tmp_path / "x").glob("*-seed*"))


def watched_worker(comparison: Comparison, *shared: Any) -> None:
    """`init_worker` of a process that notes each decoding of the training data, and is killed in its run, if it is the first
    to get there."""
    toy.quicken()
    decode, update, steps = reference.decoded_images, StepBar.update, Counter[StepBar]()
    end = time.monotonic() + LONGEST

    def noting(*args: Any, **options: Any) -> Any:
        with (comparison.out / "decoded").open("a") as file:
            file.write("x")
        return decode(*args, **options)

    def killed(bar: StepBar, count: int = 1) -> None:
        update(bar, count)
        steps[bar] += count
        if steps[bar] == 5:
            while not list(comparison.out.glob("reference-*.npz")) and time.monotonic() < end:  # of the other worker
                time.sleep(0.01)
            with suppress(FileExistsError):
                (comparison.out / "killed").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)

    reference.decoded_images, StepBar.update = noting, killed  # type: ignore[assignment, method-assign]
    runner.init_worker(comparison, *shared)


@pytest.mark.usefixtures("forked_workers")
def test_comparison_with_a_killed_worker_continues_as_if_there_was_none(tmp_path, monkeypatch):
    config = toy.toy({"method": "vanilla", "train.steps": 10, "sample.steps": 1})
    plain = Comparison(config, {"vanilla": config}, (0, 1), tmp_path / "plain", 24, "values")
    measuring = Measurement.of(config, "values", weights=None, images=24, block=plain.block)
    expected = {}
    for job in plain.jobs:
        run = train_one(plain, job, lambda steps: None)
        expected[job] = [measure_point(run, folder, measuring) for folder in plain.due(job)]
    comparison = dataclasses.replace(plain, out=tmp_path / "interrupted")
    comparison.out.mkdir()
    monkeypatch.setattr(runner, "init_worker", watched_worker)
    monkeypatch.setattr(runner, "processes", lambda comparison, workers: (workers, 1))
    with pytest.raises(ValueError, match=r"^a worker process was ended .* continues: give it --workers 1, [^\n]*$"):
        runner.train_and_measure(comparison, workers=2)
    assert (comparison.out / "killed").exists() and not list(comparison.out.glob("*/measured.json"))
    results = runner.train_and_measure(comparison, workers=1)
    assert (comparison.out / "decoded").read_text() == "x", "the statistics of the training data are computed once"
    for job, points in expected.items():
        toy.assert_same(toy.tensors(comparison.run(job), "vanilla"), toy.tensors(plain.run(job), "vanilla"))
        for found, point in zip(results[job][1], points, strict=True):
            assert {found[key] == point[key] for key in ("step", "distance", "probe", "accuracy", "sampler")} == {True}


def worker_of_a_failing_pool(comparison: Comparison, *shared: Any) -> None:
    """`init_worker` of a pool in which, at step 5 of the run, computing the reference fails or its worker, idle by then, is
    killed; the run then reports more steps than the pipe to the parent process holds."""
    toy.quicken()
    update, steps, out = StepBar.update, Counter[StepBar](), comparison.out
    end = time.monotonic() + LONGEST

    def until(name: str) -> None:
        while not (out / name).exists() and time.monotonic() < end:
            time.sleep(0.01)

    def training(bar: StepBar, count: int = 1) -> None:
        update(bar, count)
        steps[bar] += count
        if steps[bar] == 5:
            (out / "trains").touch()
            until("other")
            if (out / "kill").exists():
                time.sleep(0.3)  # the other worker is idle
                os.kill(int((out / "other").read_text()), signal.SIGKILL)
            stop: Any = signal.getsignal(signal.SIGTERM)
            while stop.__self__.received is None and time.monotonic() < end:  # the parent process has seen the failure
                time.sleep(0.01)
            for _ in range(10_000):
                update(bar, 0)

    def measurement() -> None:
        until("trains")  # in the other worker
        write_json(out / "other", os.getpid())
        if not (out / "kill").exists():
            raise ValueError("the reference cannot be computed")

    StepBar.update, worker._measurement = training, measurement  # type: ignore[method-assign, assignment]
    runner.init_worker(comparison, *shared)


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize(
    ("kill", "message"), [(False, "^the reference cannot be computed$"), (True, "^a worker process was ended")]
)
def test_run_in_training_ends_with_a_checkpoint_where_another_worker_fails(tmp_path, monkeypatch, kill, message):
    config = toy.toy({"method": "vanilla", "train.steps": 20, "sample.steps": 1})
    comparison, job = Comparison(config, {"vanilla": config}, (0,), tmp_path, 24, "values", every=20), ("vanilla", 0)
    if kill:
        (tmp_path / "kill").touch()
    monkeypatch.setattr(runner, "init_worker", worker_of_a_failing_pool)
    monkeypatch.setattr(runner, "processes", lambda comparison, workers: (workers, 1))
    with pytest.raises(ValueError, match=message):
        runner.train_and_measure(comparison, workers=2)
    ((step, _),) = checkpoint.steps(comparison.run(job) / "vanilla" / "checkpoints")
    assert 5 <= step <= 6
    reported: list[int] = []
    train_one(comparison, job, reported.append)
    assert reported == [step, *[1] * (20 - step)], "the run continues"


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("workers", "load", "policy"), [(1, 0.1, None), (1, 1.2, "PASSIVE"), (2, 0.1, "PASSIVE")])
def test_threads_wait_without_spinning_where_others_use_the_cores(tmp_path, monkeypatch, workers, load, policy, given):
    """What this process itself has added to the load average since it began does not count, if `load` is given."""
    now = 9.0 if given else load
    monkeypatch.setattr(os, "getloadavg", lambda: (now, now, now), raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # restored afterwards
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(runner, "_in_workers", lambda *shared: os.environ.get("OMP_WAIT_POLICY"))
    config = toy.toy({"method": "vanilla"})
    comparison = Comparison(config, {"vanilla": config}, (0, 1), tmp_path, 24, "values")
    before = load if given else None
    assert runner.train_and_measure(comparison, workers=workers, finished={}, load=before) == policy


@pytest.mark.parametrize(
    ("asked", "workers", "expected"),
    [("1", 1, (1, 1)), ("3", 1, (1, 3)), ("3", 2, (2, 2)), ("16", 1, (1, 4)), ("", 1, (1, 4)), ("2,1", 1, (1, 4))],
)
def test_workers_have_no_more_threads_than_the_environment_says(tmp_path, monkeypatch, asked, workers, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(runner, "cpu_cores", lambda: 4)
    config = toy.toy({"method": "vanilla"})
    comparison = Comparison(config, {"vanilla": config}, (0, 1), tmp_path, 24, "values")
    assert runner.processes(comparison, workers) == expected


def worker_with_graphs(comparison: Comparison, *shared: Any) -> None:
    """`init_worker` of a pool in which CUDA ends the recording of the second run."""
    toy.quicken()
    run = Trainer.run

    def recorded(trainer: Trainer) -> Any:
        folder = trainer.directory.parent
        with (comparison.out / "started").open("a") as file:
            file.write(f"{folder.name} at {trainer.step}, {(folder / ENDED).exists()}; ")
        if folder.name.endswith("seed1") and not (folder / ENDED).exists():
            raise NotCaptured("the step cannot be recorded", "CUDA ended the recording")
        return run(trainer)

    Trainer.run = recorded  # type: ignore[method-assign]
    runner.init_worker(comparison, *shared)


@pytest.mark.usefixtures("forked_workers")
def test_comparison_starts_its_workers_anew_where_graphs_end_one(tmp_path, monkeypatch):
    """What is trained and measured stays; the run that ended goes on without graphs, and is in the result."""
    config = toy.toy({"method": "vanilla", "train.steps": 10, "sample.steps": 1})
    comparison = Comparison(config, {"vanilla": config}, (0, 1), tmp_path, 24, "values", every=10)
    monkeypatch.setattr(runner, "init_worker", worker_with_graphs)
    monkeypatch.setattr(runner, "processes", lambda comparison, workers: (workers, 1))
    failed = {("vanilla", 0): "it had no memory in the first attempt"}
    with pytest.warns(UserWarning, match="^all workers start anew, and one run goes on without graphs: CUDA ended the"):
        results = runner.train_and_measure(comparison, workers=1, failed=failed)
    assert set(results) == {("vanilla", 0), ("vanilla", 1)} and failed == {}
    started = "vanilla-seed0 at 0, False; vanilla-seed1 at 0, False; vanilla-seed1 at 0, True; "
    assert (tmp_path / "started").read_text() == started


def worker_of_an_interrupted_pool(comparison: Comparison, *shared: Any) -> None:
    """`init_worker` of a pool in whose run, at step 5, SIGINT is sent to the parent process alone."""
    toy.quicken()
    update, steps = StepBar.update, Counter[StepBar]()

    def training(bar: StepBar, count: int = 1) -> None:
        update(bar, count)
        steps[bar] += count
        if steps[bar] == 5:
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(1)  # the parent process has passed it on

    StepBar.update = training  # type: ignore[method-assign]
    runner.init_worker(comparison, *shared)


def test_interrupt_leads_to_a_checkpoint_and_one_line_that_says_how_to_continue(tmp_path, monkeypatch, capfd):
    config = toy.toy({"method": "vanilla", "train.steps": 20, "sample.steps": 1})
    comparison, job = Comparison(config, {"vanilla": config}, (0,), tmp_path, 24, "values", every=20), ("vanilla", 0)
    monkeypatch.setattr(runner, "init_worker", worker_of_an_interrupted_pool)
    with pytest.raises(
        KeyboardInterrupt, match=r"^stopped by SIGINT; .* wrote a checkpoint; the same command continues$"
    ):
        runner.train_and_measure(comparison, workers=1)
    assert "Traceback" not in capfd.readouterr().err
    ((step, _),) = checkpoint.steps(comparison.run(job) / "vanilla" / "checkpoints")
    assert 5 <= step <= 6
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_too_few_images_are_refused_by_the_library(tmp_path):
    with pytest.raises(ValueError, match="at least two images"):
        compare_methods(recipe("digits"), tmp_path, ["vanilla"], images=1)
    assert not list(tmp_path.iterdir())


def test_files_that_a_killed_comparison_was_writing_are_removed(tmp_path):
    temporary_for(tmp_path / "compare.html").touch()
    absent = recipe("digits").override({"data.path": str(tmp_path / "absent")})
    with pytest.raises(ValueError, match="absent"):
        compare_methods(absent, tmp_path, ["vanilla"])
    assert not list(tmp_path.iterdir())
