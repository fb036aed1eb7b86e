"""What the page says of a run: where it is, what went wrong, and that no file of it can cost the page."""

import fcntl
import json
import os
import random

import pytest

from selftrans.ui.run_plan import guided_blocks, plan_of
from tests.support import toy
from tests.support.toy import quick  # noqa: F401 - a fixture
from tests.support.ui_runs import begun, client, ids, line, preview, state, write_log

OLD = 1_000_000_000


def quiet(run):
    """Its files as if they were written long ago."""
    for path in run.rglob("*"):
        os.utime(path, (OLD, OLD))
    return run


def test_a_run_in_its_second_stage(tmp_path):
    run = begun(tmp_path / "run", {"train.steps": 100, "stage1.steps": 40})
    write_log(run / "stage1" / "log.jsonl", [line(40, seconds=20.0)])
    write_log(run / "stage2" / "log.jsonl", [line(10, seconds=10.0), line(30, seconds=20.0, skipped=2)])
    preview(run, 20)
    preview(run, 4)
    found = state(run).summary()
    assert found["state"] == "running" and (found["stage"], found["number"], found["stages"]) == ("stage2", 2, 2)
    assert (found["step"], found["steps"], found["rate"]) == (30, 100, 2.0)
    assert found["left"] == pytest.approx(70 / 2) and found["share"] == pytest.approx((1 + 0.3) / 2)
    assert found["skipped"] == 2 and found["loss"] == 1.0 and found["preview"] == [1, 20] and found["notes"] == []
    assert found["method"] == "Self-Transcendence" and found["model"] == "SiT-S/2, 3 blocks of 32"


def test_time_left_counts_later_stages_at_the_present_rate(tmp_path):
    run = begun(tmp_path / "run", {"train.steps": 100, "stage1.steps": 40})
    write_log(run / "stage1" / "log.jsonl", [line(10, seconds=5.0), line(30, seconds=15.0)])
    assert state(run).summary()["left"] == pytest.approx((10 + 100) / 2)


def test_states(tmp_path):
    run = quiet(begun(tmp_path / "run"))
    assert state(run).summary()["state"] == "begun"
    write_log(run / "stage1" / "log.jsonl", [line(2)])
    assert state(run).summary()["state"] == "running", "a line was written just now"
    quiet(run)
    found = state(run).summary()
    assert found["state"] == "stopped" and found["left"] is None and found["changed"] == OLD
    with open(run / ".lock", "w") as lock:  # as a process that trains in it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if state(run).locked():  # shown by Linux only
            assert state(run).summary()["state"] == "running"
    assert state(toy.finished()).summary()["state"] == "done"


@pytest.mark.parametrize(("device", "process", "locked"), [("own", 7, True), ("ff:ff", 41, True), ("ff:ff", 7, False)])
def test_a_lock_of_a_file_with_the_same_inode_elsewhere_is_not_that_of_the_run(
    tmp_path, monkeypatch, device, process, locked
):
    run = begun(tmp_path / "run")
    (run / ".lock").write_text("41")
    about = (run / ".lock").stat()
    own = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}"
    held = f"FLOCK ADVISORY WRITE {process} {own if device == 'own' else device}:{about.st_ino} 0 EOF"
    (tmp_path / "locks").write_text(f"1: POSIX ADVISORY WRITE 1 {own}:{about.st_ino} 0 EOF\n1: -> {held}\n2: {held}\n")
    monkeypatch.setattr("selftrans.ui.run_state.LOCKS", tmp_path / "locks")
    assert state(run).locked() == locked


def test_a_finished_run_that_is_extended(tmp_path):
    """run.json of the first finish stays until the second: its steps and totals are not those of the run any more."""
    run = begun(tmp_path / "run", {"train.steps": 20, "stage1.steps": 10})
    spent = [{"stage": "stage1", "steps": 10}, {"stage": "stage2", "steps": 20}]
    (run / "run.json").write_text(json.dumps({"order": ["stage1", "stage2"], "stages": spent, "total_tflops": 5.0}))
    write_log(run / "stage1" / "log.jsonl", [line(10)])
    write_log(run / "stage2" / "log.jsonl", [line(10), line(20)])
    found = state(quiet(run)).summary()
    assert (found["state"], found["step"], found["steps"], found["tflops"]) == ("done", 20, 20, 5)
    with open(run / ".lock", "w") as lock:  # before the new settings are written
        fcntl.flock(lock, fcntl.LOCK_EX)
        if state(run).locked():  # shown by Linux only
            assert state(run).summary()["state"] == "running"
    longer = begun(tmp_path / "longer", {"train.steps": 30, "stage1.steps": 10}) / "config.json"
    (run / "config.json").write_bytes(longer.read_bytes())
    found = state(quiet(run)).summary()
    assert (found["state"], found["step"], found["steps"], found["tflops"]) == ("stopped", 20, 30, None)
    write_log(run / "stage2" / "log.jsonl", [line(10), line(20), line(24)])
    found = state(run).summary()
    assert (found["state"], found["step"], found["steps"], found["left"]) == ("running", 24, 30, 6)
    (run / "config.json").unlink()  # with no plan the length is not known: "24 of 20" would be wrong
    assert state(run).summary()["steps"] is None and state(run).detail()["parts"][0]["steps"] == 10


def test_a_finished_run_and_its_detail():
    found = state(toy.finished()).detail()
    assert [part["name"] for part in found["parts"]] == ["stage1", "stage2"] and found["notes"] == []
    last = found["parts"][1]
    assert last["checkpoints"] == [3, 6, 8] and last["steps"] == last["step"] == 8 and last["lines"] == 4
    logged = toy.log(toy.finished())
    assert last["curves"]["flow"]["x"] == [2, 4, 6, 8]
    assert last["curves"]["flow"]["y"] == pytest.approx([each["flow"] for each in logged], rel=1e-5)
    assert found["report"]["student_steps"] == 8 and found["settings"]["recipe"] == "digits"


def test_accidents(tmp_path):
    run = begun(tmp_path / "run")
    write_log(
        run / "stage1" / "log.jsonl", [line(2, skipped=1, skips=[{"step": 2, "loss": "nan", "rows": [7]}]), "junk\n"]
    )
    (run / "changes.json").write_text(json.dumps([{"steps": {"stage1": 2}, "changed": ["train.lr was 1, is 2"]}]))
    (run / "tensorboard").mkdir()
    for name in ("events.out.tfevents.1", "events.out.tfevents.2", "other"):
        (run / "tensorboard" / name).touch()
    found = state(run).detail()
    (part,) = [each for each in found["parts"] if each["name"] == "stage1"]
    assert part["skipped"] == 1 and part["skips"] == [{"step": 2, "loss": "nan"}] and part["damaged"] == 1
    assert found["starts"] == 2 and found["changes"][0]["changed"] == ["train.lr was 1, is 2"]


@pytest.mark.parametrize(
    ("file", "text", "note"),
    [
        (
            "config.json",
            '{"version": 1, "recipe": "x"}',
            "its settings are not understood (this configuration is not of version",
        ),
        ("config.json", '{"version', "run/config.json cannot be read ("),
        ("config.json", None, "config.json is missing"),
        ("run.json", "[]", "run/run.json does not hold what selftrans writes"),
        ("run.json", "\x00\x01", "run/run.json cannot be read ("),
    ],
)
def test_a_damaged_run_or_one_of_another_version_costs_a_line(tmp_path, file, text, note):
    run = begun(tmp_path / "run")
    write_log(run / "stage1" / "log.jsonl", [line(2), line(4)])
    (run / file).unlink() if text is None else (run / file).write_text(text)
    found = state(run).summary()
    assert [each for each in found["notes"] if each.startswith(note)] and found["step"] == 4 and found["rate"] == 1
    assert state(run).detail()["parts"][0]["curves"]["loss"]["y"] == [2, 2]


def test_any_json_in_the_files_of_a_run_is_survived(tmp_path):
    rng = random.Random(0)

    def junk(depth=0):
        leaves = [None, True, -1, 1e308, float("nan"), "", "stage1", "../..", "\ud800", 10**30, [], {}]
        if depth > 2 or rng.random() < 0.5:
            return rng.choice(leaves)
        keys = [
            "stages",
            "stage",
            "steps",
            "order",
            "method",
            "data",
            "path",
            "model",
            "sample",
            "conditions",
            "classes",
            "distance",
            "step",
        ]
        if rng.random() < 0.4:
            return [junk(depth + 1) for _ in range(3)]
        return {key: junk(depth + 1) for key in rng.sample(keys, 5)}

    good = begun(tmp_path / "good")
    names = ("config.json", "run.json", "data.json", "measured.json", "changes.json", "compare.json")
    for k in range(40):
        run = tmp_path / f"run-{k}-seed{k}"
        write_log(run / "stage1" / "log.jsonl", [json.dumps(junk()) + "\n" for _ in range(5)])
        (run / "run.json").write_text("{}")
        for name in names:
            if rng.random() < 0.8:
                (run / name).write_text(json.dumps(junk()))
    page = client(tmp_path)
    runs = page.get("/api/runs").json()["runs"]
    assert len(runs) == 41 and next(run for run in runs if run["name"] == "good")["notes"] == []
    for run in runs:
        assert page.get(f"/api/runs/{run['id']}").status_code == 200
    assert page.get("/api/tables").status_code == 200
    assert page.get("/api/side", params={"run": [run["id"] for run in runs[:8]]}).status_code == 200
    assert good.exists() and ids(tmp_path)["good"]


def test_the_guided_blocks_of_a_stage():
    """Of the toy run: stage 2 connects block 2 of three (half the depth) to the teacher's block 2 (two thirds)."""
    plan = plan_of(json.loads((toy.finished() / "config.json").read_text()))
    model = plan.config.build_model((1, 8, 8), toy.Conditions("labels", 10))
    stages = {stage.name: stage for stage in plan.stages}
    assert plan.steps("stage2") == 8 and plan.steps("none") is None and plan.title == "Self-Transcendence"
    found = guided_blocks(plan.config, stages["stage2"], model)
    taught = stages["stage2"].guide(model, toy.Frozen(model, 2))
    assert (
        found.student == taught[0].taps and found.teacher == 2 and found.scale == plan.config.sections["stage2"].scale
    )
    assert guided_blocks(plan.config, stages["stage1"], model).teacher is None
