"""Classes that the data do not hold are not sampled: by labels of every mode, previews, `sample`, and comparisons."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import load_model
from selftrans.config import SampleConfig
from selftrans.data.dataset import Dataset
from selftrans.data.prepare import prepare
from selftrans.data.sources.decode import Reading
from selftrans.data.sources.source import present_classes
from selftrans.experiments.comparison.measurement import stored_conditions
from selftrans.sampling.conditioning import conditioning_of
from selftrans.sampling.images import Sampler
from selftrans.train import preview
from selftrans.train.run import train
from selftrans.types import Conditions
from tests.support import toy
from tests.support.pictures import encoded, noise
from tests.support.toy import quick  # noqa: F401 - a fixture


def test_classes_that_occur() -> None:
    ten = [str(k) for k in range(10)]
    assert present_classes(np.array([5, 1, 9, 1]), ten) == (1, 5, 9)
    assert present_classes(np.arange(10), ten) == () and present_classes(np.zeros(4, np.int64), ()) == ()
    assert present_classes(np.zeros(0, np.int64), ten) == ()


def test_labels_are_drawn_from_the_classes_that_occur() -> None:
    ten, k = Conditions("labels", 10), np.arange(3000)
    balanced = conditioning_of(ten, SampleConfig(), present=(1, 5, 9))
    assert balanced.of(k[:5])[1].tolist() == [1, 5, 9, 1, 5] and balanced.described["present"] == [1, 5, 9]
    drawn = conditioning_of(ten, SampleConfig(labels="random"), present=(1, 5, 9)).of(k)[1]
    assert set(drawn.tolist()) == {1, 5, 9} and np.bincount(drawn)[[1, 5, 9]].min() > 900
    with pytest.warns(UserWarning, match=r"no samples of the classes 2, 3; they have 1, 5, 9"):
        stated = conditioning_of(ten, SampleConfig(labels=(2, 3, 5, 10)), present=(1, 5, 9))
    assert stated.of(k[:4])[1].tolist() == [2, 3, 5, 10]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conditioning_of(ten, SampleConfig(labels=(9, 10)), present=(1, 5, 9))
    assert "present" not in conditioning_of(ten, SampleConfig()).described


def test_run_on_data_with_a_gap_samples_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = toy.pictures(tmp_path / "pictures", ("cat", "owl"))
    (pictures / "dog").mkdir()
    with pytest.warns(UserWarning, match="1 of 3 classes has no samples: dog"):
        prepare(pictures, tmp_path / "data", reading=Reading(allow_empty=True), progress=False)
    dataset = Dataset.open(tmp_path / "data")
    assert dataset.manifest.classes == ("cat", "dog", "owl") and dataset.present == (0, 2)
    assert stored_conditions(dataset, SampleConfig()).of(np.arange(4))[1].tolist() == [0, 2, 0, 2]
    shown = list[list[str]]()
    monkeypatch.setattr(preview.plots, "sample_sheet", lambda images, captions: shown.append(captions) or images)
    monkeypatch.setattr(preview.plots, "save", lambda *_: None)
    settings = {"method": "vanilla", "train.steps": 2, "train.preview_every": 2, "data.path": str(tmp_path / "data")}
    train(toy.toy(settings, name="imagefolder"), tmp_path / "run", quiet=True)
    assert shown == [["cat", "owl", "cat", "owl"]]
    loaded = load_model(tmp_path / "run")
    assert loaded.present == (0, 2)
    labels = [batch.labels for batch in Sampler.of(loaded, SampleConfig(num=5, steps=2)).sample()]
    assert np.concatenate(labels).tolist() == [0, 2, 0, 2, 0]


def test_classes_that_are_lost_to_unreadable_pictures_are_said(tmp_path: Path) -> None:
    pictures = toy.pictures(tmp_path / "pictures", ("cat", "dog", "owl"), count=2)
    for k in range(2):
        (pictures / "dog" / f"{k}.png").write_bytes(b"")
    (pictures / "owl" / "0.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"^no sample of 1 class can be used: dog; it keeps its label$"):
        prepare(pictures, tmp_path / "data", skip_bad=True, progress=False)
    assert Dataset.open(tmp_path / "data").present == (0, 2)


def test_labels_that_a_file_invents_are_refused(tmp_path: Path) -> None:
    path = toy.copy(toy.vanilla(), tmp_path / "run")
    weights = toy.checkpoint(path, "vanilla") / "ema.safetensors"
    assert "present" not in checkpoint.read_header(weights) and load_model(weights).present == ()
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for wrong in ([10], [-1], [2, 1], [1, 1], ["1"], 3):
        about = json.loads(header["__metadata__"][checkpoint.KEY]) | {"present": wrong}
        header["__metadata__"][checkpoint.KEY] = json.dumps(about)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        weights.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        with pytest.raises(ValueError, match=r"does not describe its model \(.*present"):
            load_model(weights)


def test_table_keeps_the_names_of_gaps(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pictures = [encoded(noise(8, k)) for k in range(4)]
    parquet.write_table(arrow.table({"image": pictures, "label": [1, 5, 9, 5]}), tmp_path / "x.parquet")
    with pytest.warns(UserWarning, match="7 of 10 classes have no samples: 0, 2, 3, 4, 6, 7, 8"):
        manifest = prepare(tmp_path / "x.parquet", tmp_path / "data", progress=False)
    assert manifest.num_classes == 10 and Dataset.open(tmp_path / "data").present == (1, 5, 9)
