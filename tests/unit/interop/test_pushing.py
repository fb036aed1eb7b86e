"""`selftrans push`: to a stand-in of the hub, and back by `hf://` and the pipeline."""

import json

import huggingface_hub
import numpy as np
import pytest

from selftrans.checkpoints.load import load_model
from selftrans.cli.main import main
from selftrans.interop import SiTPipeline
from selftrans.interop.pushing import Chosen, push, write_folder
from selftrans.interop.run_facts import compute_of
from tests.support import toy
from tests.support.hub import TOKEN, Repository, set_offline, stand_in  # noqa: F401 - a fixture
from tests.support.toy import quick  # noqa: F401 - a fixture

MIT = Chosen("mit")
HELD = {
    ".gitattributes",
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "selftrans.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
}


def to_hub(repository, run=None, chosen=MIT, **options):
    with pytest.warns(UserWarning, match="the card has no samples"):
        return push(run or toy.finished(), repository, chosen, say=lambda _: None, **options)


@pytest.mark.parametrize("apart", [False, True])
def test_run_is_pushed_and_used_from_the_hub(stand_in, apart, tmp_path, capsys):  # noqa: F811
    stand_in.apart = apart
    assert main(["push", str(toy.finished()), "me/digits", "--license", "mit", "--private"]) == 0
    said, repository = capsys.readouterr(), stand_in.repositories["me/digits"]
    assert said.out.splitlines()[-1] == f"pushed: hf://me/digits@{repository.sha}"
    assert TOKEN not in said.out + said.err and repository.private
    assert set(repository.files) == HELD
    assert TOKEN.encode() not in b"".join(repository.files.values())
    found, was = load_model("hf://me/digits"), load_model(toy.finished())
    toy.assert_same(dict(found.model.state_dict()), dict(was.model.state_dict()))
    assert found.source["path"] == f"hf://me/digits@{repository.sha}"
    pipe = SiTPipeline.from_pretrained("me/digits", revision=repository.sha)
    assert len(pipe([1, 2], num_inference_steps=2).images) == 2


@pytest.mark.parametrize(
    "stages", [None, [], ["stage2"], [None, {"stage": "stage2", "steps": 8}], [{"stage": "stage2"}]]
)
def test_compute_of_a_damaged_report_is_not_known(tmp_path, stages):
    (tmp_path / "run.json").write_text(json.dumps({"stages": stages}))
    assert compute_of(tmp_path, load_model(toy.finished())) is None


def test_repeated_push_sends_what_has_changed_only(stand_in):  # noqa: F811
    first = to_hub("me/digits")
    repository = stand_in.repositories["me/digits"]
    assert repository.uploaded[0] == ["selftrans.json"]  # so that an interrupted push can be continued
    sent = len(repository.uploaded)
    assert to_hub("me/digits") == first and len(repository.uploaded) == sent
    more = {"vae/config.json": b"{}", "scheduler/other.json": b"{}"}  # as an earlier push of a run with a VAE left them
    record = json.loads(repository.files["selftrans.json"])
    record["files"] += [*more]
    repository.commit(repository.files | more | {"selftrans.json": json.dumps(record).encode()})
    to_hub("me/digits", chosen=Chosen("apache-2.0"))
    assert set(repository.files) == HELD and b"license: apache-2.0" in repository.files["README.md"]
    changed, uploaded = {"README.md", "selftrans.json"}, {*repository.uploaded[-1]}
    # before 1.0, huggingface_hub sends all files with those that have changed
    assert uploaded == changed or (huggingface_hub.__version__.startswith("0.") and uploaded > changed)


def test_interrupted_push_continues(stand_in):  # noqa: F811
    stand_in.broken = "/commit/"
    repository = stand_in.repositories["me/digits"] = Repository()
    with pytest.raises(ValueError, match=r"could not be uploaded .* the same command continues") as error:
        to_hub("me/digits")
    assert TOKEN not in str(error.value) and "\n" not in str(error.value)
    stand_in.broken = ""
    to_hub("me/digits")
    assert set(repository.files) == HELD


def test_other_files_are_not_overwritten_without_force(stand_in):  # noqa: F811
    repository = stand_in.repositories["me/other"] = Repository()
    sha = repository.commit({"README.md": b"mine", "weights.bin": b"x"})
    with pytest.raises(ValueError, match=r"files that selftrans push has not written \(README.md, weights.bin\)"):
        to_hub("me/other")
    assert repository.sha == sha
    to_hub("me/other", force=True)
    assert set(repository.files) == HELD - {".gitattributes"} | {"weights.bin"}


def test_force_deletes_no_file_of_others(stand_in):  # noqa: F811
    repository = stand_in.repositories["me/other"] = Repository()
    repository.commit({"text_encoder/model.safetensors": b"theirs", "vae/x.bin": b"y"})
    to_hub("me/other", force=True)
    to_hub("me/other", force=True)
    assert {"text_encoder/model.safetensors", "vae/x.bin"} <= set(repository.files)


def test_public_repository_is_refused_where_a_private_one_is_asked_for(stand_in):  # noqa: F811
    repository = stand_in.repositories["me/public"] = Repository()
    with pytest.raises(ValueError, match="exists and is public"):
        to_hub("me/public", private=True)
    assert set(repository.files) == {".gitattributes"}


def test_missing_login_and_offline_are_one_line(stand_in, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(ValueError, match=r"me/new: the hub refuses to write; log in .*\(hf auth login\)") as error:
        to_hub("me/new")
    assert "hf_another" not in str(error.value)
    set_offline(monkeypatch, True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        to_hub("me/new")


def test_dry_run_writes_the_folder_with_samples_and_numbers_of_these_weights(tmp_path, capsys, monkeypatch):
    run = toy.copy(toy.finished(), tmp_path / "run")
    samples, data = tmp_path / "samples", tmp_path / "digits of mine"
    words = ["sample", str(run), "--out", str(samples), "--num", "4", "--steps", "2", "--sampler", "heun"]
    assert main([*words, "--guidance-scale", "2"]) == 0
    toy.copy(toy.plain_digits(), data)
    report = tmp_path / "report.json"
    measure = ["evaluate", str(samples), "--reference", str(data), "--features", "values", "--out", str(report)]
    assert main(measure) == 0
    monkeypatch.chdir(tmp_path)
    words = ["push", str(run), "me/digits", "--license", "mit", "--dry-run", "--samples", str(samples)]
    for _ in range(2):  # an earlier folder is replaced
        assert main([*words, "--evaluations", str(report)]) == 0
    assert "9 files of me/digits -> digits; nothing was uploaded" not in capsys.readouterr().err
    files = toy.tree(tmp_path / "digits")
    assert set(files) == HELD - {".gitattributes"} | {"samples.png"}
    assert str(tmp_path).encode() not in b"".join(files.values())
    card, record = files["README.md"].decode(), json.loads(files["selftrans.json"])
    measured = json.loads(report.read_text())
    assert card.startswith("---\nlicense: mit\nlibrary_name: selftrans\n")
    assert f"4 samples against digits of mine ({measured['reference_images']:,} images)" in card
    assert "2 steps of heun, guidance 2.0, seed 0" in card
    assert f"| {measured['frechet_distance']:.4g} |" in card
    run_json = json.loads((run / "run.json").read_text())
    assert f"In total, teachers included: {run_json['total_tflops']:,.4g} TFLOPs" in card
    assert record["compute"]["total_tflops"] == run_json["total_tflops"] and record["license"] == "mit"
    assert record["evaluations"][0]["frechet_distance"] == measured["frechet_distance"]


def test_numbers_and_samples_of_other_weights_are_left_out(tmp_path):
    run = toy.copy(toy.finished(), tmp_path / "run")
    other = {"metric": "frechet_distance", "frechet_distance": 1.25, "made": {"source": {"weights": "0" * 64}}}
    (run / "evaluate.json").write_text(json.dumps(other))
    with pytest.warns(UserWarning, match="card|left out") as said:
        write_folder(run, "me/digits", tmp_path / "out", MIT)
    assert [str(each.message).rpartition(": ")[2][:40] for each in said] == [
        "it does not say that its samples are of ",
        "give --samples FOLDER, as `selftrans sam",
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "None were measured on these weights" in card and "1.25" not in card


def test_preview_of_the_last_step_is_shown(tmp_path):
    from PIL import Image

    run = toy.copy(toy.finished(), tmp_path / "run")
    (run / "stage2/previews").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(run / "stage2/previews/step-00000008.png")
    write_folder(run, "me/digits", tmp_path / "out", MIT)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/samples.png")), pixels)
    assert "Samples: 2 steps of Heun's method" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["owner", "--license", "mit"], "owner is no name of a repository; write owner/name"),
        (["../x/y", "--license", "mit"], "is no name of a repository"),
        (["me/digits", "--license", "mit\nx: y"], "is no name of the hub; give one such as apache-2.0"),
        (["me/digits", "--license", "mit", "--evaluations", "absent.json"], "is no report of `selftrans evaluate`"),
        (["me/digits", "--license", "mit", "--samples", "absent"], "holds no samples; give a folder"),
        (["me/digits"], "--license STR"),
    ],
)
def test_wrong_arguments_write_nothing(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["push", str(toy.finished()), *words, "--dry-run"]) in (1, 2)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "files", [{"model_index.json": '{"_class_name": "OtherPipeline"}'}, {".git": "x"}, {"notes": ""}]
)
def test_pipelines_of_others_and_files_among_ours_are_kept(tmp_path, files):
    folder = tmp_path / "out"
    folder.mkdir()
    for name, text in ({"model_index.json": '{"_class_name": "SiTPipeline"}'} | files).items():
        (folder / name).write_text(text)
    before = toy.tree(folder)
    with pytest.raises(ValueError, match="exists and is not an export, or holds other files"):
        write_folder(toy.finished(), "me/digits", folder, MIT)
    assert toy.tree(folder) == before


def test_folder_that_is_no_export_is_kept(tmp_path):
    other = toy.pictures(tmp_path / "other")
    before = toy.tree(other)
    with pytest.raises(ValueError, match="exists and is not an export"):
        write_folder(toy.finished(), "me/digits", other, MIT)
    assert toy.tree(other) == before
