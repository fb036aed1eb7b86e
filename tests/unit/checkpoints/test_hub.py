"""Models named `hf://owner/name[@revision]`: download, what is recorded, and one line for each error."""

import json
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

import selftrans
from selftrans.checkpoints import hub
from selftrans.checkpoints.load import load_model
from selftrans.cli.main import main
from selftrans.interop.exporting import export_run
from selftrans.train.run import train
from tests.support import toy
from tests.support.hub import Repository, set_offline, stand_in  # noqa: F401 - a fixture
from tests.support.toy import quick  # noqa: F401 - a fixture


@pytest.fixture
def repository(stand_in, tmp_path):  # noqa: F811
    """me/digits with a run's weights in our own layout; its first commit has those of another run."""
    found = stand_in.repositories["me/digits"] = Repository()
    for run in (toy.vanilla(), toy.finished()):
        export_run(run, tmp_path / run.name)
        other = {"pytorch_model.bin": b"pickle", "custom.py": b"raise SystemExit", "notes.txt": b"notes"}
        found.commit(toy.tree(tmp_path / run.name) | other)
    return found


def test_run_is_sampled_from_the_hub_with_its_revision_recorded(repository, tmp_path):
    words = ["sample", "hf://me/digits", "--out", str(tmp_path / "a"), "--num", "2", "--steps", "2", "--sampler", "ode"]
    assert main(words) == 0
    source = json.loads((tmp_path / "a/samples.json").read_text())["settings"]["source"]
    assert source["path"] == f"hf://me/digits@{repository.sha}"
    files = [path.name for path in Path(constants.HF_HUB_CACHE).glob("models--me--digits/snapshots/*/*")]
    assert sorted(files) == ["config.json", "model.safetensors"]  # nothing else is downloaded
    words[1] = str(toy.finished())
    words[3] = str(tmp_path / "b")
    assert main(words) == 0
    assert np.array_equal(np.load(tmp_path / "a/samples.npz")["arr_0"], np.load(tmp_path / "b/samples.npz")["arr_0"])


def test_revision_is_that_which_is_asked_for(repository):
    first = [*repository.commits][1]
    assert load_model(f"hf://me/digits@{first}").stage == load_model(toy.vanilla()).stage
    assert load_model("hf://me/digits@main").stage == "stage2"
    assert load_model(Path("hf://me/digits")).stage == "stage2"  # a path has one slash of the two
    toy.assert_same(
        dict(selftrans.load("hf://me/digits").state_dict()), dict(load_model(toy.finished()).model.state_dict())
    )


def test_cache_is_used_where_the_hub_cannot_be_reached(repository, monkeypatch):
    online = load_model("hf://me/digits")
    set_offline(monkeypatch, True)
    assert load_model("hf://me/digits").source == online.source


def test_run_starts_from_the_hub_and_records_its_revision(repository, tmp_path):
    config = toy.toy({"method": "vanilla", "train.steps": 2, "init.path": "hf://me/digits"})
    report = train(config, tmp_path / "run", quiet=True)
    assert report["init"]["path"] == f"hf://me/digits@{repository.sha}"
    asked = "hf://me/digits"
    assert json.loads((tmp_path / "run/config.json").read_text())["init"]["path"] == asked
    assert train(config, tmp_path / "run", quiet=True)["init"] == report["init"]


def test_teacher_is_taken_from_the_hub(stand_in, tmp_path):  # noqa: F811
    found = stand_in.repositories["me/teacher"] = Repository()
    export_run(toy.finished(), tmp_path / "teacher", stage="stage1", weights="raw")
    found.commit(toy.tree(tmp_path / "teacher"))
    report = train(toy.toy({"stage2.teacher": "hf://me/teacher", "train.steps": 2}), tmp_path / "run", quiet=True)
    assert report["teacher"]["path"] == f"hf://me/teacher@{found.sha}" and report["teacher"]["steps"] == 4


def test_evaluate_needs_a_place_for_its_report(repository, tmp_path, capsys):
    words = ["evaluate", "hf://me/digits", "--reference", str(toy.digits()), "--features", "values", "--num", "4"]
    assert main(words) == 1 and "is on the hub, where no report is written; give --out FILE" in capsys.readouterr().err
    assert main([*words, "--steps", "2", "--sampler", "ode", "--out", str(tmp_path / "report.json")]) == 0
    made = json.loads((tmp_path / "report.json").read_text())["made"]
    assert made["source"]["path"] == f"hf://me/digits@{repository.sha}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://me", "names no model on the hub; write hf://owner/name"),
        ("hf://me/x/y", "names no model on the hub"),
        ("hf://me/../x", "names no model on the hub"),
        ("hf://me/absent", "hf://me/absent does not exist, or is private; check its name"),
        ("hf://me/digits@v9", "hf://me/digits@v9: the repository has no such revision"),
        ("hf://me/gated", r"hf://me/gated is gated: accept its terms on the hub, and log in \(hf auth login\)"),
        ("hf://me/empty", "hf://me/empty holds no model of selftrans"),
        ("hf://me/broken", "hf://me/broken is not in the cache, and the hub cannot be reached"),
    ],
)
def test_errors_are_one_line(repository, stand_in, name, message):  # noqa: F811
    for other in ("gated", "empty", "broken"):
        stand_in.repositories[f"me/{other}"] = Repository()
    stand_in.repositories["me/gated"].gated, stand_in.broken = True, "me/broken"
    with pytest.raises(ValueError, match=message) as error:
        load_model(name)
    assert "\n" not in str(error.value)


def test_offline_without_a_copy_is_one_line(stand_in, monkeypatch):  # noqa: F811
    set_offline(monkeypatch, True)
    with pytest.raises(
        ValueError, match="is not in the cache, and the hub cannot be reached; check the connection, and"
    ):
        hub.local("hf://me/digits")
    assert not stand_in.requests


def test_names_of_cached_files_are_pinned_and_others_are_not(tmp_path):
    commit = tmp_path / "models--an-owner--a--name" / "snapshots" / "abc"
    assert hub.pinned(commit) == hub.pinned(commit / "transformer" / "x") == "hf://an-owner/a--name@abc"
    assert hub.pinned(tmp_path / "snapshots" / "abc") is None and hub.pinned(Path("run")) is None
    assert hub.local("run") == Path("run")
    assert (
        hub.recorded_name(str(commit / "vae")) == "hf://an-owner/a--name@abc/vae"
        and hub.recorded_name("pixel") == "pixel"
    )


def test_parts_of_a_pipeline_are_downloaded_and_nothing_else():
    wanted = {
        "model_index.json", "selftrans.json", "transformer/config.json", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model-00001-of-00002.safetensors", "tokenizer/merges.txt", "tokenizer/spiece.model",
    }  # fmt: skip
    others = {"README.md", "samples.png", "pipeline.py", "model.pt", "transformer/model.bin", "tokenizer/run.txt"}
    assert set(filter_repo_objects([*wanted, *others], allow_patterns=hub.ALLOWED)) == wanted
