"""The addresses of the page: what they answer, that jobs make what the commands make, and that nothing is written."""

import base64
import dataclasses
import io
import json
import re
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

from selftrans.checkpoints.load import load_model
from selftrans.data.buckets import open_data
from selftrans.data.decoded import decode_images, latents_of
from selftrans.encoders.autoencoder import load_autoencoder
from selftrans.evaluate.plots import as_pictures
from selftrans.evaluate.probes import collect, pca_basis, pca_maps
from selftrans.experiments.analyse_run import null_of
from selftrans.sampling.images import Sampler
from selftrans.sampling.run_settings import overridden
from selftrans.train.run import train
from selftrans.ui import server
from selftrans.ui.server import Page
from tests.support import ratios, text_runs, toy
from tests.support.processes import LONGEST
from tests.support.toy import quick  # noqa: F401 - a fixture
from tests.support.ui_runs import begun, client, ids, line, preview, write_log

SETTINGS = {"num": 3, "steps": 2, "sampler": "heun", "seed": 5, "labels": [4, 10, 1]}


@pytest.fixture(scope="module")
def page():
    """The shared toy runs, and their data: the folder that holds both."""
    toy.digits()
    return client(toy.finished(), toy.vanilla(), toy.digits())


@pytest.fixture(scope="module")
def runs():
    return ids(toy.finished(), toy.vanilla())


def model(key, stage="stage2", step=8, weights="ema"):
    return {"run": key, "stage": stage, "step": step, "weights": weights}


def done(page, **asked):
    """The end of a job, as the page gets it."""
    answer = page.post("/api/jobs", json=asked)
    assert answer.status_code == 200, answer.text
    for _ in range(50 * LONGEST):
        job = page.get("/api/jobs").json()
        if job["state"] != "running":
            return job
        time.sleep(0.02)
    raise AssertionError(job)


def cut(page, job, result):
    """The tiles of a picture of a job, (n, h, w, C)."""
    found = np.asarray(
        Image.open(io.BytesIO(page.get(f"/api/jobs/{job['id']}/pictures/{result['picture']}.png").content))
    )
    found = found.reshape(*found.shape[:2], -1)
    (h, w), columns = result["tile"], result["columns"]
    return np.stack([found[i // columns * h :][:h, i % columns * w :][:, :w] for i in range(result["count"])])


def test_the_page_loads_nothing_from_elsewhere():
    shown = client(toy.digits())
    texts = {file.name: shown.get(f"/{file.name}").text for file in server.STATIC.iterdir()}
    assert '<script type="module" src="/main.js">' in texts["index.html"] == shown.get("/").text
    imported = {found for text in texts.values() for found in re.findall(r'from "\./([\w.]+)"', text)}
    assert imported <= {*texts} and {name for name in texts if name.endswith(".js")} == imported | {"main.js"}
    for name, text in texts.items():
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text), name
        assert "style=" not in text.replace("grid-template", "") and " onclick=" not in text, name


def test_a_package_whose_files_are_links_serves_its_page(tmp_path, monkeypatch):
    """As some installers make it: with links to the files of their cache."""
    for file in server.STATIC.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.setattr(server, "STATIC", tmp_path)
    shown = client(toy.digits())
    assert {shown.get(f"/{name}").status_code for name in ("", "main.js", "style.css")} == {200}
    assert shown.get("/..%2ftest_server.py").status_code == 404


def test_runs_and_a_run(page, runs):
    found = page.get("/api/runs").json()
    assert {run["name"]: run["state"] for run in found["runs"]} == {"finished": "done", "vanilla": "done"}
    detail = page.get(f"/api/runs/{runs['finished']}").json()
    offered = detail["models"]
    assert (
        offered["conditions"] == "labels"
        and offered["classes"] == [str(k) for k in range(10)]
        and offered["rows"] == 1797
    )
    assert offered["teacher"] == model(runs["finished"], "stage1", 4, "raw") | {"name": "finished"}
    assert offered["scale"] == load_model(toy.finished()).config.sections["stage2"].scale
    again = page.get("/api/runs", headers={"If-None-Match": page.get("/api/runs").headers["etag"]})
    assert again.status_code == 304 and again.content == b""


@pytest.mark.parametrize(
    "path",
    [
        "api/runs/none",
        "api/runs/..%2F..",
        "api/runs/{key}/previews/9/1.png",
        "api/runs/{key}/previews/1/99.png",
        "api/jobs/77/pictures/0.png",
        "none",
    ],
)
def test_what_is_not_there(page, runs, path):
    answer = page.get(f"/{path.format(key=runs['finished'])}")
    assert answer.status_code == 404 and len(answer.text.splitlines()) == 1


def test_previews_are_served_and_links_are_not(tmp_path):
    run = begun(tmp_path / "given" / "run")
    write_log(run / "stage2" / "log.jsonl", [line(2)])
    preview(run, 2)
    secret = tmp_path / "secret.png"
    secret.write_bytes((run / "stage2" / "previews" / "step-00000002.png").read_bytes())
    (run / "stage2" / "previews" / "step-00000003.png").symlink_to(secret)
    (run / "stage2" / "previews" / "step-00000004.png").write_text("<script>")
    shown, (key,) = client(tmp_path / "given"), ids(tmp_path / "given").values()
    url = f"/api/runs/{key}/previews/1"
    answer = shown.get(f"{url}/2.png")
    assert answer.content == secret.read_bytes() and answer.headers["content-type"] == "image/png"
    assert [shown.get(f"{url}/{step}.png").status_code for step in (3, 4, 5)] == [404] * 3
    assert [part["previews"] for part in shown.get(f"/api/runs/{key}").json()["parts"]] == [[], [2, 4]]


def test_samples_are_those_of_the_command(page, runs):
    before = toy.tree(toy.finished())
    job = done(page, kind="sample", model=model(runs["finished"]), settings=SETTINGS | {"guidance_scale": 2.0})
    assert job["state"] == "done", job["error"]
    assert job["done"] == job["total"] == 4 and job["results"][0]["captions"] == ["4", "no class", "1"]
    options = SETTINGS | {"labels": (4, 10, 1), "guidance_scale": 2.0}
    (batch,) = Sampler.load(toy.finished(), options).sample()
    np.testing.assert_array_equal(cut(page, job, job["results"][0]), batch.images)
    assert toy.tree(toy.finished()) == before, "the page writes nothing into a run"


def test_page_samples_without_graphs(page, runs, monkeypatch):
    """A replay does not call the hook that counts passes."""
    on = lambda *given: dataclasses.replace(overridden(*given), capture="on")  # noqa: E731
    monkeypatch.setattr("selftrans.ui.sampling_jobs.overridden", on)
    monkeypatch.setattr("selftrans.sampling.images.CapturedPasses", None)
    job = done(page, kind="sample", model=model(runs["finished"]), settings=SETTINGS)
    assert job["state"] == "done", job["error"]


def test_a_run_of_text_is_sampled_with_prompts():
    run = text_runs.finished()
    shown, (key,) = client(run), ids(run).values()
    assert shown.get(f"/api/runs/{key}").json()["models"]["conditions"] == "text"
    chosen = {"num": 2, "steps": 1, "sampler": "euler", "prompts": ["a red\x1b square", "  "]}
    job = done(shown, kind="sample", model=model(key, step=4), settings=chosen)
    assert job["state"] == "done", job["error"]
    assert job["results"][0]["captions"] == ["a red square"] * 2
    job = done(
        shown, kind="maps", student=model(key, step=4), maps={"times": [0.5], "prompt": "a square"}, upload=upload()
    )
    assert job["state"] == "done", job["error"]
    assert job["results"][1]["condition"] == "a square"


def test_side_by_side_has_the_same_noise_and_labels(page, runs):
    wanted = [model(runs["finished"], step=0), model(runs["finished"], "stage1", 0)]
    job = done(page, kind="side", models=wanted, steps=[3, 3], settings=SETTINGS)
    assert job["state"] == "done", job["error"]
    assert [each["of"]["stage"] for each in job["results"]] == ["stage2", "stage1"] and job["total"] == job["done"] == 8
    for result in job["results"]:
        folder = toy.checkpoint(toy.finished(), result["of"]["stage"], 3)
        (batch,) = Sampler.load(folder, SETTINGS | {"labels": (4, 10, 1)}).sample()
        np.testing.assert_array_equal(cut(page, job, result), batch.images)
    found = page.get("/api/side", params={"run": [runs["finished"], runs["vanilla"]]}).json()
    assert [list(run["parts"]) for run in found["runs"]] == [["stage1", "stage2"], ["vanilla"]]
    assert found["differences"] == [] and found["distances"]["step"] == {}


def test_maps_are_those_of_the_features(page, runs):
    student, teacher = model(runs["finished"]), model(runs["finished"], "stage1", 4, "raw")
    maps = {"times": [0.3, 0.7], "row": 11, "scale": 5.0}
    job = done(page, kind="maps", student=student, teacher=teacher, maps=maps)
    assert job["state"] == "done", job["error"]
    picture, first, second = job["results"]
    assert (first["role"], second["role"]) == ("teacher", "student") and job["done"] == job["total"] == 6
    assert first["condition"].endswith(", w = 5") and second["guided"]["teacher"] == 2 and first["blocks"] == [1, 2, 3]
    loaded = load_model(toy.finished(), stage="stage1", weights="raw")
    rows = np.append(11, np.random.default_rng(0).permutation(1797)[:7])
    z0, labels = latents_of(open_data(toy.digits()), rows)
    feats = []
    for t in (0.3, 0.7):
        f_c, f_u = (collect(loaded.model, z0, c, t=t, taps=(2,))[2] for c in (labels, null_of(loaded.model, 8)))
        feats.append(f_u + 5 * (f_c - f_u))
    expected = [pca_maps(f[:1], loaded.model.grid, basis=pca_basis(torch.cat(feats)))[0] for f in feats]
    np.testing.assert_array_equal(cut(page, job, first)[2:4], np.round(255 * np.stack(expected)).astype(np.uint8))
    assert picture["label"] == int(labels[0])


def upload(side=16):
    content = io.BytesIO()
    Image.new("RGB", (side, side), (128, 128, 128)).save(content, "png")
    return base64.b64encode(content.getvalue()).decode()


def test_maps_of_a_run_on_buckets_are_of_pictures_of_the_model_s_size(tmp_path):
    """The latents of several pictures are one tensor: of the buckets, only that of the model's size fits."""
    few = {"data.path": str(ratios.shared()), "method": "vanilla", "train.steps": 2, "train.batch_size": 4}
    train(toy.toy(few | {"train.checkpoint_every": 2, "train.preview_every": 0}), tmp_path / "run", quiet=True)
    shown, key = client(tmp_path, ratios.shared()), ids(tmp_path)["run"]
    job = done(shown, kind="maps", student=model(key, "vanilla", 2), maps={"times": [0.5], "row": 3})
    assert job["state"] == "done", job["error"]
    bucket = open_data(ratios.shared()).buckets[1]
    expected = as_pictures(
        decode_images(load_autoencoder(bucket.manifest.autoencoder), latents_of(bucket, np.array([3]))[0])
    )
    assert bucket.manifest.resolution == 8 and (cut(shown, job, job["results"][0]) == expected).all()
    job = done(shown, kind="maps", student=model(key, "vanilla", 2), maps={"times": [0.5], "row": 8})
    assert job["error"] == "row 8 is not in the data; use 0 to 7"


def test_maps_of_an_uploaded_picture(page, runs):
    job = done(page, kind="maps", student=model(runs["vanilla"], "vanilla", 2), maps={"label": 3}, upload=upload())
    assert job["state"] == "done" and job["about"]["uploaded"], job["error"]
    assert job["results"][1]["condition"] == "label 3"
    (shown,) = cut(page, job, job["results"][0])
    assert shown.shape == (8, 8, 1) and set(shown.ravel()) == {128}
    broken = base64.b64encode(b"no picture").decode()
    job = done(page, kind="maps", student=model(runs["vanilla"], "vanilla", 2), upload=broken)
    assert job["state"] == "failed" and job["error"].startswith("the picture: cannot be read as a picture (")


def test_data_outside_the_given_folders_are_not_read(runs):
    shown = client(toy.vanilla())
    job = done(shown, kind="maps", student=model(runs["vanilla"], "vanilla", 2))
    assert job["state"] == "failed" and "start it with their folder, too, or choose a picture" in job["error"]


WRONG = [
    ({}, 400, "the kind of a job is sample, side or maps"),
    ([], 400, "a job is a json object"),
    ({"kind": "sample", "model": {"run": "none", "stage": "stage2", "step": 8}}, 404, "there is no such run"),
    ({"kind": "sample", "model": {"stage": "../..", "step": 8}}, 404, "has no such stage"),
    ({"kind": "sample", "model": {"stage": "stage2", "step": 7}}, 400, "step 7 of stage2 has no ema.safetensors"),
    ({"kind": "sample", "model": {"stage": "stage2", "step": 8, "weights": "../x"}}, 400, "model.weights should be"),
    ({"kind": "sample", "model": {"stage": "stage2", "step": "8"}}, 400, "model.step should be int"),
    ({"kind": "sample", "model": {}, "settings": {"steps": 0}}, 400, "model is missing"),
    (
        {"kind": "maps", "student": {"stage": "stage2", "step": 8}, "maps": {"times": [2.0]}},
        400,
        "choose 1 to 8 values in [0, 1]",
    ),
    (
        {"kind": "maps", "student": {"stage": "stage2", "step": 8}, "maps": {"scale": -1.0}},
        400,
        "w = -1 is out of range",
    ),
    ({"kind": "maps", "student": {"stage": "stage2", "step": 8}, "upload": "%"}, 400, "not sent as base64"),
    ({"kind": "side", "models": [], "steps": [1]}, 400, "choose 1 to 64 checkpoints in all"),
]


@pytest.mark.parametrize(("asked", "status", "said"), WRONG, ids=range(len(WRONG)))
def test_wrong_requests_are_one_line(page, runs, asked, status, said):
    for name in ("model", "student"):
        if isinstance(asked, dict) and isinstance(asked.get(name), dict) and asked[name]:
            asked = asked | {name: {"run": runs["finished"]} | asked[name]}
    if said == "model is missing":
        asked, said = asked | {"model": None}, "model should be an object"
    answer = page.post("/api/jobs", json=asked)
    assert answer.status_code == status and said in answer.json()["error"], answer.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "sample.steps is 0; use at least 1"),
        ({"num": 65}, "at most 64 pictures"),
        ({"autoguidance": "/etc"}, "the setting autoguidance cannot be chosen here"),
        ({"decode_with": "x"}, "the setting decode_with cannot be chosen here"),
        ({"guidance_interval": [0.5]}, "sample.guidance_interval should be"),
        ({"sampler": "none"}, "sample.sampler should be"),
        ({"seed": -1}, "sample.seed is -1"),
    ],
)
def test_wrong_settings_are_one_line(page, runs, settings, said):
    answer = page.post("/api/jobs", json={"kind": "sample", "model": model(runs["finished"]), "settings": settings})
    assert answer.status_code == 400 and said in answer.json()["error"]


def test_bodies_that_are_no_json_or_too_large(page, monkeypatch):
    sent = {"Content-Type": "application/json"}
    assert page.post("/api/jobs", content=b"{", headers=sent).status_code == 400
    assert page.post("/api/jobs", content=b"[" * 100_000, headers=sent).status_code == 400
    monkeypatch.setattr(server, "MOST_BODY", 10)
    answer = page.post("/api/jobs", content=b"x" * 11, headers=sent)
    assert answer.status_code == 400 and "larger than" in answer.json()["error"]


def test_texts_that_are_no_utf8_do_not_hide_the_job(page, runs):
    asked = {"kind": "maps", "student": model(runs["finished"]), "maps": {"prompt": "\ud800", "times": [0.5]}}
    first = page.post("/api/jobs", content=json.dumps(asked), headers={"Content-Type": "application/json"})
    assert first.status_code == 200 and first.json()["about"]["maps"]["prompt"] == "\ud800"
    page.post(f"/api/jobs/{first.json()['id']}/cancel", json={})
    for _ in range(50 * LONGEST):
        answer = page.get("/api/jobs")
        assert answer.status_code == 200
        if answer.json()["state"] != "running":
            break
        time.sleep(0.02)
    assert answer.json()["state"] != "running"


def test_files_of_removed_runs_are_forgotten(tmp_path):
    begun(tmp_path / "a"), begun(tmp_path / "b")
    shown = Page([tmp_path])
    assert len(shown.runs()["runs"]) == 2 and len({file.parts[0] for file in shown.files._known}) == 2
    shutil.rmtree(tmp_path / "b")
    shown.folders._next = 0.0
    assert len(shown.runs()["runs"]) == 1 and {file.parts[0] for file in shown.files._known} == {"a"}


def test_a_job_is_cancelled_and_a_second_one_refused(page, runs):
    asked = {
        "kind": "sample",
        "model": model(runs["finished"]),
        "settings": {"num": 64, "steps": 1000, "sampler": "heun"},
    }
    first = page.post("/api/jobs", json=asked).json()
    answer = page.post("/api/jobs", json=asked)
    assert answer.status_code == 409 and answer.json()["error"] == "another job is running; wait for it, or cancel it"
    page.post(f"/api/jobs/{first['id']}/cancel", json={})
    for _ in range(50 * LONGEST):
        if (job := page.get("/api/jobs").json())["state"] != "running":
            break
        time.sleep(0.02)
    assert job["state"] == "cancelled" and job["done"] < job["total"]


def test_a_damaged_checkpoint_fails_the_job_only(tmp_path, runs):
    run = toy.copy(toy.vanilla(), tmp_path / "copied")
    file = toy.checkpoint(run, "vanilla") / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    shown, (key,) = client(tmp_path), ids(tmp_path).values()
    job = done(shown, kind="sample", model=model(key, "vanilla", 2), settings=SETTINGS)
    assert job["state"] == "failed" and "is not a selftrans weights file" in job["error"]
    file.unlink()
    file.symlink_to(toy.checkpoint(toy.vanilla(), "vanilla") / "ema.safetensors")
    answer = shown.post("/api/jobs", json={"kind": "sample", "model": model(key, "vanilla", 2)})
    assert answer.status_code == 400 and "has no ema.safetensors" in answer.json()["error"]


def test_previews_of_other_settings_are_named(tmp_path):
    begun(tmp_path / "a")
    begun(tmp_path / "b", {"log.preview_steps": 9, "sample.seed": 3})
    keys = ids(tmp_path)
    found = client(tmp_path).get("/api/side", params={"run": [keys["a"], keys["b"]]}).json()
    assert found["differences"] == ["log.preview_steps is 2 and 9", "sample.seed is 0 and 3"]
    assert client(tmp_path).get("/api/side").json()["error"] == "choose 1 to 8 runs"
    json.dumps(found, allow_nan=False)
    begun(tmp_path / "c", {"sample.autoguidance": "weak", "sample.guidance_scale": 3.0, "sample.early_guidance": 2.0})
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    del config["sample"]["early_guidance"]  # as an earlier version wrote it
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    keys = ids(tmp_path)
    found = client(tmp_path).get("/api/side", params={"run": [keys["a"], keys["c"]]}).json()
    assert found["differences"] == ["sample.early_guidance is 1.0 and 2.0"], "autoguidance is in no preview"
