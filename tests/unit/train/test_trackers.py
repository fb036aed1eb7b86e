"""Trackers: TensorBoard itself, and stand-ins for the packages of the others."""

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from selftrans.train import trackers
from selftrans.train.run import train
from selftrans.train.trackers import Trackers
from tests.support import toy
from tests.support.toy import quick  # noqa: F401 - a fixture

TRACKED = {"method": "vanilla", "train.preview_every": 4, "train.accumulate": 1}


class Run:
    """A run at a stand-in of wandb, trackio or mlflow: keeps what it is given."""

    def __init__(self, **options):
        self.options, self.lines, self.ended = options, [], 0
        self.info = types.SimpleNamespace(run_id="run-of-mlflow")

    def log(self, values, step=None):
        self.lines.append((step, values))

    def finish(self):
        self.ended += 1


class Package(types.ModuleType):
    """A stand-in for one of these packages."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace(name=name)
        self.runs, self.settings = [], []
        self.config = types.SimpleNamespace(update=lambda values, **_: self.settings.append(values))
        self.utils = types.SimpleNamespace(
            validation=types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
        )

    def init(self, **options):
        self.runs.append(Run(**options))
        return self.runs[-1]

    def start_run(self, **options):
        return self.init(**options)

    def search_experiments(self, **_):
        return []

    def create_experiment(self, **_):
        return "experiment"

    def log_params(self, values):
        self.settings.append(values)

    def log_metrics(self, values, step):
        self.runs[-1].log(values, step)

    def log_artifact(self, local_path, artifact_path):
        self.runs[-1].log({artifact_path: local_path})

    def end_run(self):
        self.runs[-1].finish()

    Image = staticmethod(np.array)


@pytest.fixture
def packages(monkeypatch):
    found = {name: Package(name) for name in ("wandb", "trackio", "mlflow")}
    for name, package in found.items():
        monkeypatch.setitem(sys.modules, name, package)
    return found


def test_tensorboard_has_the_settings_and_the_previews_of_a_run(tmp_path):
    train(toy.toy(TRACKED | {"log.tensorboard": True}), tmp_path, quiet=True)
    files = [*(tmp_path / "tensorboard").iterdir()]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert len(files) == 1 and not (tmp_path / "trackers.json").exists()
    pictures = events.Images("vanilla/preview")
    assert [picture.step for picture in pictures] == [4, 8] and pictures[0].width > 16
    settings = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"train.batch_size" in settings and b"model.width" in settings


@pytest.mark.parametrize("content", [b"no picture", None])
def test_picture_that_cannot_be_read_causes_a_warning(tmp_path, monkeypatch, content):
    file = tmp_path / "step-00000004.png"
    Image.new("RGB", (8, 8)).save(file)
    if content is None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)  # above twice as many Pillow refuses
    else:
        file.write_bytes(content)
    trackers = Trackers(tmp_path)
    trackers._running["tensorboard"] = None  # not reached
    with pytest.warns(UserWarning, match=r"trackers do not get step-00000004.png \("):
        trackers.picture("vanilla", file, 4)


def test_every_tracker_gets_settings_lines_and_previews_and_a_continued_run_keeps_its_id(tmp_path, packages):
    names = ("wandb", "trackio", "mlflow")
    config = toy.toy(TRACKED | {"log.trackers": names, "train.steps": 4})
    train(config, tmp_path / "a run", quiet=True)
    train(config.override({"train.steps": 8}), tmp_path / "a run", quiet=True)
    known = json.loads((tmp_path / "a run" / "trackers.json").read_text())
    assert known["mlflow"] == "run-of-mlflow"
    for name, package in packages.items():
        first, second = package.runs
        assert len(package.settings) == 1 and package.settings[0]["train.lr"] == 1e-3
        assert [step for step, values in first.lines if "vanilla/loss" in values] == [2, 4]
        assert [step for step, values in second.lines if "vanilla/loss" in values] == [6, 8]
        assert first.ended == second.ended == 1
        key = "run_id" if name == "mlflow" else "id" if name == "wandb" else "name"
        assert second.options[key] == known[name] and first.options.get("resume") in ("allow", None)
    pictures = [
        values["vanilla/preview"] for _, values in packages["wandb"].runs[0].lines if "vanilla/preview" in values
    ]
    assert len(pictures) == 1 and pictures[0][0].dtype == np.uint8
    assert packages["trackio"].runs[0].lines[-1][1]["vanilla/preview"].ndim == 3
    assert packages["mlflow"].runs[0].lines[-1][1]["vanilla/preview"].endswith("step-00000004.png")


def test_steps_count_over_all_stages_except_in_tensorboard(tmp_path, packages):
    found = Trackers(tmp_path)
    found.start(toy.toy({"log.trackers": ("trackio",), "log.tensorboard": True}))
    for stage, before in (("one", 0), ("two", 10)):
        found.begin(before)
        found.log(stage, {"loss": 1.0}, 5)
    found.close()
    assert [step for step, _ in packages["trackio"].runs[0].lines] == [5, 15]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [events.Scalars(f"{stage}/loss")[0].step for stage in ("one", "two")] == [5, 5]


def test_changed_settings_are_text_where_a_tracker_has_it(tmp_path, packages):
    found = Trackers(tmp_path)
    found.start(toy.toy({"log.trackers": ("wandb", "mlflow"), "log.tensorboard": True}))
    found.log("one", {"loss": 1.0}, 5, ["train.loss was own, is noise", "train.lr was 1, is 2"])
    found.log("one", {"loss": 2.0}, 6)
    found.close()
    said = "train.loss was own, is noise; train.lr was 1, is 2"
    assert packages["wandb"].runs[0].lines[0] == (5, {"one/loss": 1.0, "one/changed": said})
    assert packages["mlflow"].runs[0].lines[0] == (5, {"one/loss": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("one/changed/text_summary")
    assert text.step == 5 and text.tensor_proto.string_val == [said.encode()]


def test_tracker_that_is_missing_or_fails_causes_one_warning(tmp_path, packages, monkeypatch, recwarn):
    real = trackers.importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "mlflow" else real(name))

    def refused(**_):
        raise OSError("no route to host\nsecond line")

    packages["wandb"].init = refused
    config = toy.toy(TRACKED | {"log.trackers": ("mlflow", "wandb", "trackio"), "train.preview_every": 0})
    monkeypatch.setattr(Run, "log", lambda self, values, step=None: 1 / 0)
    report = train(config, tmp_path, quiet=True)
    said = [str(each.message) for each in recwarn if "tracker" in str(each.message)]
    assert said == [
        "tracker mlflow is not installed (pip install mlflow); the run continues without it",
        "tracker wandb cannot be started (no route to host); the run continues without it",
        "tracker trackio ends at step 2 (division by zero); log.jsonl continues",
    ]
    assert report["student_steps"] == 8 and len(toy.log(tmp_path, "vanilla")) == 4


def test_full_disk_for_the_record_of_trackers_causes_a_warning(tmp_path, packages, monkeypatch):
    def full(path, value):
        raise ValueError(f"{path} cannot be written (No space left on device); free disk space")

    monkeypatch.setattr(trackers, "write_json", full)
    found = Trackers(tmp_path)
    with pytest.warns(UserWarning, match=r"trackers.json cannot be written .*; a continued run will be a new one"):
        found.start(toy.toy({"log.trackers": ("trackio",)}))
    found.log("vanilla", {"loss": 1.0}, 5)
    assert packages["trackio"].runs[0].lines == [(5, {"vanilla/loss": 1.0})]


@pytest.mark.parametrize("content", ["[]", "{", '{"wandb": 3}', '{"wandb": "../x"}', "[" * 5000])
def test_damaged_record_of_trackers_is_a_new_run(tmp_path, content):
    (tmp_path / "trackers.json").write_text(content)
    assert trackers._recorded(tmp_path) == {}


def test_unknown_tracker_is_refused(capsys):
    from selftrans.cli.main import main

    assert main(["train", "digits", "--out", "x", "--log.trackers", "visdom"]) == 2
    assert "visdom" in capsys.readouterr().err
