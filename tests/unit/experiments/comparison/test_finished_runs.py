"""A comparison that is repeated after its folder, its settings or its files have changed: what is kept, and what is done again.

The toy runs are trained in this process, in place of workers, and points are made up from the weights, in place of measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import FILES
from selftrans.cli.main import main
from selftrans.data.dataset import Dataset
from selftrans.evaluate import extractors
from selftrans.evaluate.classifier import SmallClassifier
from selftrans.evaluate.extractors import FeaturesNotFinite, extractor_sha256, load_extractor
from selftrans.experiments.comparison import compare, comparison_settings, measurement, runner, worker
from selftrans.experiments.comparison.compared_runs import Comparison
from selftrans.experiments.comparison.comparison_settings import classifier_of, equal_lengths, for_method
from selftrans.experiments.comparison.finished_runs import all_measured, finished_runs
from selftrans.experiments.comparison.measurement import DECODED_BY, MEASURED, Measurement, check_alike, measured_before
from selftrans.sampling.images import NotFinite
from selftrans.storage import InUse, lock_file, temporary_for
from tests.support import toy
from tests.support.pools import InProcess, in_this_process
from tests.support.toy import quick  # noqa: F401 - quick is a fixture

SMALL = {"train.steps": 2, "stage1.steps": 2, "sample.steps": 1, "train.accumulate": 1}
NAMES = ("vanilla", "structure", "self_transcendence")
DONE = Counter[str]()  #: tasks of the pool, by kind


class Counting(InProcess):
    """Counts its jobs by kind."""

    def submit(self, job: Callable[..., Any], *arguments: Any) -> Future[Any]:
        kind = "reference" if not arguments else "run" if arguments[0].checkpoint is None else "measurement"
        DONE[kind] += 1
        return super().submit(job, *arguments)


def made_up(folder: Path, measurement: Measurement) -> dict[str, Any]:
    """A point whose distance depends on the weights."""
    state = checkpoint.read(folder).state
    weights = checkpoint.weights_sha256(folder / "ema.safetensors")
    numbers = {"distance": float(int(weights[:6], 16)), "seconds": 0.5, "tflops": 1.0}
    return {"step": state["step"], "metric": "m", "accuracy": None, "probe": 0.5} | numbers | measurement.identity


def counted(patch: pytest.MonkeyPatch) -> None:
    DONE.clear()
    in_this_process(patch, Counting)
    patch.setattr(runner, "end_workers", lambda *_: 0)
    patch.setattr(measurement, "measure_checkpoint", made_up)
    patch.setattr(measurement, "training_statistics", lambda *_, **__: None)


@pytest.fixture(autouse=True)
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    counted(monkeypatch)


def comparison(out: Path, *names: str, dotted: dict[str, Any] | None = None, images: int = 24) -> Comparison:
    config = toy.toy(SMALL | (dotted or {}))
    config = equal_lengths(toy.override(config, {"method": "self_transcendence"}))
    variants = {name: for_method(config, name) for name in names or NAMES}
    return Comparison(config, variants, (0,), out, images, "values")


def measured(chosen: Comparison) -> tuple[dict, Counter[str]]:
    """The points of each run, and what was done for them."""
    DONE.clear()
    results = runner.train_and_measure(chosen, workers=1)
    return {job: points for job, (_, points) in results.items()}, Counter(DONE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of NAMES, trained and measured once; copy it before you change it."""
    with pytest.MonkeyPatch.context() as patch:
        toy.quicken(patch)
        counted(patch)
        out = tmp_path_factory.mktemp("compared")
        runner.train_and_measure(comparison(out), workers=1)
    return out


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy, whose taught run names the teacher in it."""
    copy = toy.copy(trained, tmp_path / "compared")
    taught_by(copy, str(trained), str(copy))
    return copy


def taught_by(folder: Path, before: str, now: str) -> None:
    config = folder / "self_transcendence-seed0" / "config.json"
    assert before in config.read_text()
    config.write_text(config.read_text().replace(before, now))


def points_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return list(json.loads((folder / f"{name}-seed0" / MEASURED).read_text()))


def test_finished_comparison_starts_no_worker_and_reads_no_weights(folder, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(runner, "ProcessPoolExecutor", refuse)
    monkeypatch.setattr(checkpoint, "read", refuse)
    monkeypatch.setattr(comparison_settings, "decoded_images", refuse)
    chosen = comparison(folder)
    compare.check_before(chosen, finished_runs(chosen))
    found, _ = measured(chosen)
    assert found == {(name, 0): points_of(folder, name) for name in NAMES} and len(found["structure", 0]) == 2
    one_more = comparison(folder, *NAMES, "sra")
    assert not all_measured(one_more, finished_runs(one_more))
    with pytest.raises(AssertionError):
        compare.check_before(one_more, finished_runs(one_more))


def test_deleted_run_is_trained_again_alone(folder):
    """Here one that has taught another, which is finished."""
    weights, others = toy.tensors(folder / "structure-seed0", "stage1"), [NAMES[0], NAMES[2]]
    shutil.rmtree(folder / "structure-seed0")
    before = [toy.tree(folder / f"{name}-seed0") for name in others]
    found, done = measured(comparison(folder))
    assert done == {"reference": 1, "run": 1, "measurement": 2} and len(found["structure", 0]) == 2
    assert [toy.tree(folder / f"{name}-seed0") for name in others] == before
    toy.assert_same(toy.tensors(folder / "structure-seed0", "stage1"), weights)


@pytest.mark.parametrize("moved", [False, True])
def test_run_keeps_its_teacher_when_that_is_compared_no_more(folder, tmp_path, moved):
    """Without the method that trained it, and where the folder was moved; also for the steps that are left."""
    if moved:
        folder = folder.rename(tmp_path / "moved")
    run = folder / "self_transcendence-seed0"
    expected, weights = points_of(folder, "self_transcendence"), toy.tensors(run)
    found, done = measured(comparison(folder, "vanilla", "self_transcendence"))
    assert not done and found["self_transcendence", 0] == expected
    if not moved:
        return
    shutil.rmtree(toy.checkpoint(run))
    found, done = measured(comparison(folder, "vanilla", "self_transcendence"))
    assert done["run"] == 1
    toy.assert_same(toy.tensors(run), weights)
    assert [point["distance"] for point in found["self_transcendence", 0]] == [p["distance"] for p in expected]


class Bar(contextlib.nullcontext):
    """A progress bar that counts."""

    def __init__(self, **options: Any) -> None:
        super().__init__(self)
        self.total, self.count = options["total"], 0

    def update(self, count: int) -> None:
        self.count += count

    def set_postfix_str(self, text: str) -> None:
        """It shows nothing."""


def test_run_that_trained_its_own_teacher_keeps_it_when_another_run_could_teach(tmp_path, folder, monkeypatch):
    """The progress bar counts the steps of both stages."""
    out, bars = tmp_path / "alone", []
    chosen = comparison(out, "self_transcendence")
    with monkeypatch.context() as patch:
        patch.setattr(runner, "progress_bar", lambda **options: bars.append(Bar(**options)) or bars[-1])
        measured(chosen)
        measured(chosen)
    assert [chosen.steps(job) for job in chosen.jobs] == [4] and [bar.count for bar in bars] == 2 * [bars[0].total]
    assert [comparison(out).steps(job) for job in chosen.jobs] == [2], "where stage 1 is a run of its own"
    run = out / "self_transcendence-seed0"
    weights = toy.tensors(run)
    shutil.rmtree(toy.checkpoint(run))
    toy.copy(folder / "structure-seed0", out / "structure-seed0")
    _, done = measured(comparison(out, "structure", "self_transcendence"))
    assert done["run"] == 1
    toy.assert_same(toy.tensors(run), weights)
    (run / MEASURED).unlink()
    _, done = measured(comparison(out, "structure", "self_transcendence"))
    assert (done["run"], done["measurement"]) == (0, 2)


def test_teacher_given_before_and_left_out_now_is_still_refused(folder):
    taught_by(folder, str(folder), "/elsewhere/of")
    shutil.rmtree(folder / "structure-seed0")
    with pytest.raises(ValueError, match=r"stage2\.teacher was /elsewhere/of/[^\n]*, is None; use those"):
        measured(comparison(folder, "self_transcendence"))


def point_without(key: str) -> Callable[[list], list]:
    return lambda points: [points[0], {name: value for name, value in points[1].items() if name != key}]


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        (point_without("distance"), 1),
        (point_without("probe"), 1),
        (point_without("metric"), 1),
        (point_without("sha256"), 1),
        (lambda points: [points[0], points[1] | {"distance": "1.0"}], 1),
        (lambda points: [points[0], points[1] | {"step": None}], 1),
        (lambda points: [*points, 3, None, [], {"sha256": 4}], 0),
        (lambda points: {"points": points}, 2),
    ],
)
def test_points_that_no_table_can_use_are_measured_again(folder, damage, again):
    path = folder / "vanilla-seed0" / MEASURED
    expected = json.loads(path.read_text())
    path.write_text(json.dumps(damage(expected)))
    found, done = measured(comparison(folder))
    assert done["measurement"] == again and done["run"] == 0 and found["vanilla", 0] == expected


def test_half_a_file_of_points_is_measured_again(folder):
    path = folder / "vanilla-seed0" / MEASURED
    expected = json.loads(path.read_text())
    path.write_text(path.read_text()[:200])
    found, done = measured(comparison(folder))
    assert done["measurement"] == 2 and found["vanilla", 0] == expected == json.loads(path.read_text())


def test_other_images_or_features_measure_all_again(folder):
    found, done = measured(comparison(folder, images=25))
    assert done["measurement"] == 6 and {p["images"] for points in found.values() for p in points} == {25}
    assert {point["images"] for point in points_of(folder, "vanilla")} == {25}


def test_full_disk_while_measuring_costs_no_point(folder, monkeypatch):
    for name in NAMES:
        (folder / f"{name}-seed0" / MEASURED).unlink()
    write, calls = measurement.write_json, Counter[str]()

    def full(path: Path, value: Any) -> None:
        calls["all"] += 1
        if calls["all"] == 2:
            raise ValueError(f"{path} cannot be written (No space left on device); free disk space")
        write(path, value)

    monkeypatch.setattr(measurement, "write_json", full)
    with pytest.raises(ValueError, match="No space left on device"):
        measured(comparison(folder))
    found, done = measured(comparison(folder))
    assert done["run"] == 0 and done["measurement"] == 5 and {len(points) for points in found.values()} == {2}


def test_damaged_last_checkpoint_that_is_not_measured_is_trained_again(folder):
    run = folder / "vanilla-seed0"
    weights, file = toy.tensors(run, "vanilla"), toy.checkpoint(run, "vanilla") / "ema.safetensors"
    (run / MEASURED).unlink()
    half = file.read_bytes()[:100]
    file.unlink()  # its tensors are mapped into memory
    file.write_bytes(half)
    with pytest.warns(UserWarning, match="skipping a damaged checkpoint"):
        _, done = measured(comparison(folder))
    assert done["run"] == 1
    toy.assert_same(toy.tensors(run, "vanilla"), weights)


def test_other_data_and_settings_are_refused_by_name(folder):
    with pytest.raises(ValueError, match=r"was trained on (latents with shift|other data)"):
        measured(comparison(folder, dotted={"data.path": str(toy.plain_digits())}))
    with pytest.raises(ValueError, match=r"train\.lr was 0\.001, is 0\.5"):
        measured(comparison(folder, dotted={"train.lr": 0.5}))
    with pytest.raises(ValueError, match="has trained vanilla for 2 steps already"):
        measured(comparison(folder, "vanilla", dotted={"train.steps": 1}))


def test_points_of_two_extractors_are_not_put_into_one_table():
    point = {"sampler": {"steps": 1}, "images": 2, "extractor_sha256": "a", "block": 1}
    check_alike([point, point, point | {DECODED_BY: "x"}, point | {DECODED_BY: "x"}], "f")
    for other in ({"extractor_sha256": "b"}, {DECODED_BY: "y"}, {"images": 3}):
        with pytest.raises(ValueError, match=r"features f\.safetensors, or the autoencoder, changed meanwhile"):
            check_alike([point | {DECODED_BY: "x"}, point, point | other], "f.safetensors")


def test_points_decoded_by_other_weights_of_the_autoencoder_are_not_kept(tmp_path, folder):
    (held, _), path = points_of(folder, "vanilla"), tmp_path / MEASURED
    identity = {key: held[key] for key in ("sampler", "images", "extractor_sha256", "block")} | {DECODED_BY: "now"}
    for recorded, kept in (({}, True), ({DECODED_BY: "now"}, True), ({DECODED_BY: "before"}, False)):
        path.write_text(json.dumps([held | recorded]))
        assert bool(measured_before(path, identity)) is kept


def test_classifier_of_other_data_is_refused(tmp_path):
    data, other = (toy.prepared(tmp_path / name, count=count) for name, count in (("a", 5), ("b", 6)))
    config = toy.toy({"data.path": str(data)}, name="imagefolder")
    file = classifier_of(config, Dataset.open(data), tmp_path / "classifier.safetensors")
    assert classifier_of(config, Dataset.open(data), file) == file
    config = toy.toy({"data.path": str(other)}, name="imagefolder")
    with pytest.raises(ValueError, match=r"classifier\.safetensors was trained on other data than .*--out[^\n]*$"):
        classifier_of(config, Dataset.open(other), file)
    file.with_suffix(".json").unlink()  # of an earlier version, which did not record the data
    assert classifier_of(config, Dataset.open(other), file) == file


def test_hash_of_an_extractor_is_known_without_what_it_measures(tmp_path, monkeypatch):
    file = tmp_path / "c.safetensors"
    SmallClassifier(8, 1, 10).save(file)
    expected = load_extractor(file).sha256
    monkeypatch.setattr(extractors, "digits_classifier", None)
    assert extractor_sha256(file) == extractor_sha256("digits", weights=file) == expected
    assert extractor_sha256("values", shape=(8, 8, 1)) == load_extractor("values", shape=(8, 8, 1)).sha256 != expected
    assert extractor_sha256("inception") == extractors.INCEPTION_SHA256
    with pytest.raises(ValueError, match="no inception weights at nowhere"):
        extractor_sha256("nowhere.pth")


def test_files_are_written_once_and_again_when_something_has_changed(folder):
    chosen = comparison(folder, "vanilla")
    finished = finished_runs(chosen)
    assert all_measured(chosen, finished) and compare.unchanged(chosen, finished) is None
    summary = compare.summarise(chosen, runner.train_and_measure(chosen))
    compare.write(chosen, summary | {"time": {"seconds": 1.0}})
    held = json.loads((folder / "compare.json").read_text())
    assert compare.unchanged(chosen, finished) == held and held["time"] == {"seconds": 1.0}
    page = folder / "compare.html"
    text = page.read_text()
    for damaged in (text[:100], None):
        page.unlink()
        if damaged:
            page.write_text(damaged)
        assert compare.unchanged(chosen, finished) is None
    page.write_text(text)
    assert compare.unchanged(chosen, finished) == held
    assert compare.unchanged(dataclasses.replace(chosen, images=25), finished) is None
    assert compare.unchanged(chosen, {}) is None
    (folder / "compare.json").write_text((folder / "compare.json").read_text()[:100])
    assert compare.unchanged(chosen, finished) is None


def test_damaged_checkpoint_whose_samples_are_shown_is_trained_again(tmp_path):
    """It is measured, so only the samples need it; also where another method is added in the same call."""
    config = toy.toy(SMALL)
    compare.compare_methods(config, tmp_path, NAMES[:1], images=24, features="values")
    file = toy.checkpoint(tmp_path / "vanilla-seed0", "vanilla") / "ema.safetensors"
    half = file.read_bytes()[:100]
    file.unlink()  # its tensors are mapped into memory
    file.write_bytes(half)
    DONE.clear()
    with pytest.warns(UserWarning, match="skipping a damaged checkpoint"):
        summary = compare.compare_methods(config, tmp_path, NAMES[:2], images=24, features="values")
    assert [row["seeds"] for row in summary["table"]] == [1, 1] and DONE["run"] == 2


def test_method_that_diverges_fails_alone_and_is_tried_again(tmp_path, monkeypatch, capfd):
    """Here in training. The run that it would have taught trains its own teacher."""

    def diverging(config: Any, run: Path, **options: Any) -> None:
        if run.name.startswith("structure"):
            raise FloatingPointError(f"2 updates in a row in {run}; a lower train.lr")
        train(config, run, **options)

    train, config = worker.train, toy.toy(SMALL)
    again = lambda: compare.compare_methods(config, tmp_path, NAMES[1:], images=24, features="values")  # noqa: E731
    monkeypatch.setattr(worker, "train", diverging)
    with pytest.warns(UserWarning, match="^structure, seed 0, failed, and the others go on: 2 updates in a row in"):
        summary = again()
    reason = "2 updates in a row in structure-seed0; a lower train.lr"
    assert summary["failed"] == [{"method": "structure", "seed": 0, "reason": reason}]
    assert [(row["method"], row["seeds"], row.get("failed")) for row in summary["table"]] == [
        ("structure", 0, 1),
        ("self_transcendence", 1, None),
    ]
    assert json.loads((tmp_path / "compare.json").read_text()) == json.loads(json.dumps(summary))
    assert all(reason in text for text in (capfd.readouterr().out, (tmp_path / "compare.html").read_text()))
    assert (tmp_path / "compare.csv").read_text().splitlines()[1].startswith("structure,0,,")
    monkeypatch.setattr(worker, "train", train)
    DONE.clear()
    summary = again()
    assert DONE == {"reference": 1, "run": 1, "measurement": 2} and not summary["failed"]
    assert "failed:" not in (tmp_path / "compare.html").read_text() + capfd.readouterr().out


def test_run_whose_samples_are_not_finite_is_left_out_and_measured_again(folder, monkeypatch):
    def overflowing(checkpoint: Path, measurement: Measurement) -> dict[str, Any]:
        if checkpoint == last:
            raise NotFinite("sample 3 is not finite: the weights of the model have diverged")
        return made_up(checkpoint, measurement)

    last, failed = toy.checkpoint(folder / "vanilla-seed0", "vanilla"), {}
    expected = {name: points_of(folder, name) for name in NAMES}
    (folder / "vanilla-seed0" / MEASURED).unlink()
    monkeypatch.setattr(measurement, "measure_checkpoint", overflowing)
    with pytest.warns(UserWarning, match="vanilla, seed 0, failed"):
        results = runner.train_and_measure(comparison(folder), failed=failed)
    (reason,) = failed.values()
    assert list(failed) == [("vanilla", 0)] and reason.startswith(
        "vanilla-seed0/vanilla/checkpoints/step-00000002 cannot"
    )
    assert {name: points for (name, _), (_, points) in results.items()} == {n: expected[n] for n in NAMES[1:]}
    assert points_of(folder, "vanilla") == expected["vanilla"][:1], "what could be measured is kept"
    with pytest.raises(ValueError, match=r"cannot be measured: sample 3 is not finite: .*; leave its method out"):
        runner.train_and_measure(comparison(folder))
    monkeypatch.setattr(measurement, "measure_checkpoint", made_up)
    found, done = measured(comparison(folder))
    assert done == {"reference": 1, "measurement": 1} and found["vanilla", 0] == expected["vanilla"]


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
def test_comparison_of_which_every_run_fails_is_an_error(kind, tmp_path, monkeypatch):
    def crowded(*_: object, **__: object) -> None:
        raise kind("cuda is out of memory; use a smaller model")

    monkeypatch.setattr(worker, "train", crowded)
    message = "^every run failed; first vanilla, seed 0: cuda is out of memory; use a smaller model$"
    with pytest.warns(UserWarning, match="vanilla, seed 1, failed"), pytest.raises(ValueError, match=message):
        compare.compare_methods(toy.toy(SMALL), tmp_path, ["vanilla"], seeds=(0, 1), images=24, features="values")
    assert not list(tmp_path.glob("compare.*"))


def test_exit_status_says_that_a_run_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "compare_methods", lambda *_, **__: {"failed": [{"method": "sra"}]})
    assert main(["compare", "digits", "--out", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert error == (
        "selftrans: 1 run failed (the table above and compare.json say why); the same command tries again\n"
    )


def test_second_comparison_in_a_folder_is_refused(tmp_path):
    with lock_file(tmp_path / ".lock"), pytest.raises(InUse, match="is in use by process"):
        compare.compare_methods(toy.toy(SMALL), tmp_path, ["vanilla"], features="values")


def test_what_a_killed_comparison_left_is_removed(tmp_path, monkeypatch):
    left = [temporary_for(tmp_path / name) for name in ("compare.html", f"vanilla-seed0/{MEASURED}")]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("")

    other = temporary_for(tmp_path / "exported")  # of another command, which may be running
    other.mkdir()

    def ended(_: Comparison) -> None:
        assert not any(path.exists() for path in left) and other.exists()
        raise KeyError

    monkeypatch.setattr(compare, "finished_runs", ended)
    with pytest.raises(KeyError):
        compare.compare_methods(toy.toy(SMALL), tmp_path, ["vanilla"], features="values")


@pytest.mark.parametrize("kind", [NotFinite, FeaturesNotFinite])
def test_checkpoint_whose_samples_are_not_finite_is_named(kind, tmp_path, monkeypatch):
    held = SimpleNamespace(state={"sha256": {FILES["ema"]: "0"}})
    monkeypatch.setattr(checkpoint, "read", lambda folder: held)
    monkeypatch.setattr(measurement, "measured_before", lambda *_: {})
    monkeypatch.setattr(measurement, "measure_checkpoint", lambda *_: (_ for _ in ()).throw(kind("sample 0 ...")))
    with pytest.raises(
        NotFinite, match=f"^{tmp_path} cannot be measured: sample 0 ...; leave its method out, or train"
    ):
        measurement.measure_point(tmp_path / "run", tmp_path, SimpleNamespace(identity={}))
