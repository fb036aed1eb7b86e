"""A separate package adds a method and a backbone for 1-D data; every command works with them, or reports that it is missing.

The package is examples/own_method, installed as pip would install it. Its stages are `warmup`, then `align`; sorted by name
they would be in the wrong order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from selftrans.cli.main import main
from selftrans.train.interrupted import EXIT_RESUME
from tests.support.packages import importable, install
from tests.support.pools import one_process  # noqa: F401 - a fixture
from tests.support.toy import assert_same_run, quick  # noqa: F401
from tests.unit.cli.lines import one_line

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "examples" / "own_method"
WAVE = "--model.name wave-s --model.width 16 --model.depth 3 --model.kernel 3"
TOY = (
    f"{WAVE} --align.head-width 16 --train.batch-size 16 --train.checkpoint-every 4 --train.preview-every 0 "
    "--train.lr 1e-3 --log.every 5 --log.tensorboard False"
)
#: `selftrans` in a process that is sent SIGTERM when the second step of the last stage is saved
STOPPED = """
import os, signal, sys
from selftrans.cli.main import main

def saved(event, arguments):
    if event == "os.rename" and os.fsdecode(arguments[1]).endswith("align/checkpoints/step-00000002"):
        os.kill(os.getpid(), signal.SIGTERM)

sys.addaudithook(saved)
sys.exit(main(sys.argv[1:]))
"""
METHOD, MODEL = "own_method.warmup_align:WARMUP_ALIGN", "own_method.wave:WAVE"


def selftrans(line: str) -> int:
    return main(line.split())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of the module, with signals.npz and the package installed in `site`."""
    workdir = tmp_path_factory.mktemp("outsider")
    install(PROJECT, workdir / "site")
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 3
    phase = rng.uniform(0, 2 * np.pi, (96, 1))
    sines = np.sin((labels + 1)[:, None] * np.linspace(0, 2 * np.pi, 32, endpoint=False) + phase)
    data = (sines + 0.1 * rng.standard_normal((96, 32)))[:, None].astype(np.float32)  # (N, 1, 32)
    np.savez(workdir / "signals.npz", data=data, labels=labels, classes=np.array(["slow", "middle", "fast"]))
    return workdir


@pytest.fixture(autouse=True)
def installed(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(workdir)
    with importable(workdir / "site", drop=("own_method",)):
        yield


@pytest.fixture(scope="module")
def run(workdir: Path) -> Path:
    """An uninterrupted run of both stages."""
    with pytest.MonkeyPatch.context() as patch, importable(workdir / "site", drop=("own_method",)):
        patch.chdir(workdir)
        assert selftrans("prepare signals.npz --autoencoder values --out data") == 0
        assert selftrans(train("run", "--train.steps 40 --align.steps 6")) == 0
    return workdir / "run"


def train(out: str, options: str = "", method: str = "warmup_align") -> str:
    return f"train imagefolder --data data --out {out} --method {method} {TOY} {options}"


def written(path: Path) -> dict:
    return json.loads(path.read_text())


def test_help_lists_the_settings_of_method_and_model(capsys):
    assert selftrans("train imagefolder --model.name wave-m --help") == 0
    page = capsys.readouterr().out
    for option in ("--align.teacher", "--align.cleaner", "--model.kernel", "--stage1.block"):
        assert option in page
    assert "warmup_align" in page and "--model.heads" not in page


def test_order_of_stages_is_recorded_and_the_last_one_is_sampled(run, capsys):
    names = written(run / "run.json")["order"]
    assert names == ["warmup", "align"] and names != sorted(names)
    assert written(run / "config.json")["align"]["steps"] == 6
    for stage, asked in (("align", ""), ("warmup", "--stage warmup")):
        assert selftrans(f"sample run --out samples/{stage} --num 6 --steps 2 --sampler heun {asked}") == 0
        about = written(Path("samples", stage, "samples.json"))
        assert about["settings"]["stage"] == stage
        with np.load(Path("samples", stage, "samples.npz")) as arrays:
            assert arrays["arr_0"].shape == (6, 1, 32) and arrays["arr_0"].dtype == np.float32
            assert arrays["arr_1"].tolist() == [0, 1, 2, 0, 1, 2] and np.isfinite(arrays["arr_0"]).all()
    capsys.readouterr()
    assert selftrans("sample run --out samples/none --stage stage2") == 1
    assert "has no stage2: it holds warmup, align" in one_line(capsys)


def test_interrupted_run_ends_with_the_same_bits(run, workdir):
    """A process that finds the package through PYTHONPATH is stopped in the last stage; the run continues in this process."""
    words = train("stopped", "--train.steps 40 --align.steps 6 --train.checkpoint-every 2").split()
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(workdir / "site"), str(ROOT / "src")])}
    process = subprocess.run([sys.executable, "-c", STOPPED, *words], cwd=workdir, env=env, stderr=subprocess.PIPE)
    assert process.returncode == EXIT_RESUME, process.stderr.decode()
    steps = {int(path.name[5:]) for path in (workdir / "stopped" / "align" / "checkpoints").iterdir()}
    assert 2 <= max(steps) < 40
    assert selftrans(train("stopped", "--train.steps 40 --align.steps 6")) == 0
    assert_same_run(run, workdir / "stopped", stages=("warmup", "align"))


def test_settings_of_the_method_change_on_resume_as_declared(run, capsys):
    short = "--train.steps 4"
    assert selftrans(train("resumed", short)) == 0
    assert written(Path("resumed/config.json"))["align"]["steps"] == 2, "half of train.steps, fixed when the run began"
    assert selftrans(train("resumed", "--train.steps 8")) == 0
    assert [stage["steps"] for stage in written(Path("resumed/run.json"))["stages"]] == [2, 8]
    capsys.readouterr()
    assert selftrans(train("resumed", "--train.steps 8 --align.smooth 1")) == 1
    assert "align.smooth was 2, is 1" in one_line(capsys)
    changed = "--train.steps 9 --align.weight 0.4"
    assert selftrans(train("resumed", changed)) == 1
    assert "--train.allow-changes True" in one_line(capsys)
    assert selftrans(train("resumed", f"{changed} --train.allow-changes True")) == 0
    assert "align.weight was 0.5, is 0.4" in written(Path("resumed/changes.json"))[0]["changed"]


def test_another_run_as_teacher_replaces_the_first_stage(run, capsys):
    assert selftrans(train("taught", "--train.steps 4 --teacher run")) == 0
    report = written(Path("taught/run.json"))
    assert report["order"] == ["align"] and "run/warmup" in report["teacher"]["path"]
    capsys.readouterr()
    assert selftrans(train("taught-2", "--train.steps 4 --align.teacher taught")) == 1
    assert "taught has no warmup: it holds align" in one_line(capsys)


def test_built_in_methods_train_the_new_backbone_and_the_new_method_trains_a_built_in_backbone(run):
    heads = "--stage1.head-width 16 --stage2.head-width 16"
    assert selftrans(f"{train('built-in', '--train.steps 2', 'self_transcendence')} {heads}") == 0
    pictures = "--model.width 32 --model.depth 3 --model.heads 2 --train.steps 2 --train.batch-size 8"
    options = "--train.preview-every 0 --log.tensorboard False --align.head-width 16"
    assert selftrans(f"train digits --out digits --method warmup_align {pictures} {options}") == 0
    assert written(Path("digits/run.json"))["order"] == ["warmup", "align"]


def test_options_of_training_reach_the_backbone(run):
    """bf16 casts the teacher's weights; recomputation gives the same bits; data without classes have one condition."""
    with np.load("signals.npz") as arrays:
        np.savez("unlabelled.npz", data=arrays["data"])
    assert selftrans("prepare unlabelled.npz --autoencoder values --out unlabelled") == 0
    common = "--train.steps 3 --data.path unlabelled --train.precision bf16 --data.on-device True --train.path cosine"
    for out, options in (("plain", ""), ("recomputed", "--train.recompute True")):
        assert selftrans(train(out, f"{common} {options}").replace("--data data ", "")) == 0
    assert_same_run(Path("plain"), Path("recomputed"), stages=("warmup", "align"))
    assert selftrans("sample recomputed --out samples/bf16 --num 2 --steps 2 --precision bf16 --guidance-scale 2") == 0


def test_samples_are_evaluated_by_their_values(run, capsys):
    assert selftrans("sample run --out samples/many --num 48 --steps 2 --sampler heun") == 0
    for samples in ("samples/many", "run --num 48 --steps 2 --sampler heun"):
        out = f"report-{samples.partition('/')[2][:4]}.json"
        assert selftrans(f"evaluate {samples} --reference data --features values --out {out}") == 0
    reports = [written(path) for path in sorted(Path().glob("report-*.json"))]
    assert len(reports) == 2
    first, second = (report["frechet_distance"] for report in reports)
    assert first == pytest.approx(second, rel=1e-6), "the same samples, from the folder and from the run"
    assert "Fréchet distance" in capsys.readouterr().out


COMPARE = (
    f"compare imagefolder --data data --seeds 0 --workers 1 --steps 2 --images 40 {WAVE} --align.head-width 16 "
    "--train.batch-size 16 --sample.steps 2"
)


@pytest.mark.usefixtures("one_process")
def test_compare_trains_and_measures_vanilla_and_the_method(run):
    assert selftrans(f"{COMPARE} --out compared --methods vanilla warmup_align") == 0
    summary = written(Path("compared/compare.json"))
    rows = {row["method"]: row for row in summary["table"]}
    assert set(rows) == {"vanilla", "warmup_align"} and "align" in summary["config"]
    taught = written(Path("compared/warmup_align-seed0/run.json"))
    assert [stage["steps"] for stage in taught["stages"]] == [2, 2], "each stage is as long as the student's training"
    assert all(np.isfinite(row["distance"]["mean"]) for row in rows.values()) and "values" in summary["metric"]
    assert Path("compared/compare.html").exists()


def test_export_gives_the_same_samples(run):
    assert selftrans("export run --out exported") == 0
    for origin in ("run", "exported"):
        assert selftrans(f"sample {origin} --out samples/of-{origin} --num 3 --steps 2 --sampler heun") == 0
    arrays = [np.load(Path("samples", f"of-{origin}", "samples.npz"))["arr_0"] for origin in ("run", "exported")]
    assert np.array_equal(*arrays)


def test_features_are_analysed(run):
    assert selftrans("analyse run --out analysis --samples 40 --timesteps 0.4") == 0
    assert written(Path("analysis/analyse.json"))["blocks"] == [1, 2, 3]
    assert Path("analysis/pca.png").exists()


# ---- without entry points


def test_module_and_function_work_like_an_installed_package(run, workdir, capsys):
    with importable(PROJECT / "src", drop=("own_method",)):
        assert selftrans(train("named", "--train.steps 4", METHOD).replace("wave-s", MODEL)) == 0
    stored = written(Path("named/config.json"))
    assert (stored["method"], stored["model"]["name"]) == (METHOD, MODEL)
    with importable(PROJECT / "src", drop=("own_method",)):
        assert selftrans(f"sample named --out samples/named --num 2 --steps 2 --trust {MODEL}") == 0
    capsys.readouterr()
    with importable(workdir / "site", drop=("own_method",)):  # the installed package has another name
        assert selftrans(train("named", f"--train.steps 4 --trust {MODEL}")) == 1
    assert f"method was {METHOD}, is warmup_align" in one_line(capsys)


def test_module_and_function_are_imported_in_the_processes_of_compare(run):
    with importable(PROJECT / "src", drop=("own_method",)):
        assert selftrans(f"{COMPARE.replace('wave-s', MODEL)} --out compared-named --methods {METHOD}") == 0
    (row,) = written(Path("compared-named/compare.json"))["table"]
    assert row["method"] == METHOD and row["steps"] == 2


@pytest.mark.parametrize(
    "command", ["sample run", "export run", "analyse run", "evaluate run --reference data --features values"]
)
def test_code_that_a_checkpoint_names_is_not_imported_without_trust(command, run, capsys):
    with importable(PROJECT / "src", drop=("own_method",)):
        if not Path("untrusted").exists():
            assert selftrans(train("untrusted", "--train.steps 2", METHOD).replace("wave-s", MODEL)) == 0
    capsys.readouterr()
    with importable(PROJECT / "src", drop=("own_method",)):
        command = command.replace("run", "untrusted", 1)
        assert selftrans(f"{command} --out never") == 1
        error = one_line(capsys)
        assert "own_method" not in {name.partition(".")[0] for name in sys.modules}
    assert f"is not imported because a file names it; --trust {MODEL} allows it" in error
    assert not Path("never").exists()


def test_missing_package_is_reported_in_one_line(run, capsys):
    with importable(drop=("own_method",)):
        for line, expected in {
            "sample run --out never": "model.name 'wave-s' is not known here; install the package that adds it",
            train("run"): "method 'warmup_align' is unknown",
            "train imagefolder --data data --out never --model.name wave-s": "model.name 'wave-s' is unknown",
            "compare imagefolder --data data --out never --methods vanilla warmup_align": "method 'warmup_align' is unknown",
        }.items():
            assert selftrans(line) == 1
            assert expected in one_line(capsys)
    assert not Path("never").exists()


def test_no_file_of_selftrans_names_the_package():
    words = ("own_method", "own-method", "warmup_align", "wave-s", "WaveConfig", '"align"', "align.steps", "GatedBlock")
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [word for word in words if word in text], path
