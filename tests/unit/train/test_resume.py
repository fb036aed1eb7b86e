"""A run interrupted anywhere, any number of times, equals the uninterrupted run bit for bit."""

import itertools
import json
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from selftrans import storage
from selftrans.checkpoints import format as checkpoint
from selftrans.cli.main import main
from selftrans.data.dataset import Dataset
from selftrans.data.prepare import prepare
from selftrans.methods.objective import Objective
from selftrans.storage import lock_file
from selftrans.train import trainer
from selftrans.train.ema import EMA
from selftrans.train.log import JsonlLog
from selftrans.train.preview import Preview
from selftrans.train.resume import record, settle
from selftrans.train.run import train
from selftrans.train.signals import Interrupted, StopSignal
from tests.support import toy
from tests.support.processes import Killed, start, wait_for_lines
from tests.support.toy import quick  # noqa: F401 - a fixture


def visits(config, out, stop=Interrupted) -> int:
    """Call `train` again after every interruption until the run is finished; returns the number of calls."""
    for visit in range(1, 100):
        try:
            train(config, out, quiet=True)
        except stop:
            continue
        return visit
    raise AssertionError("no progress")


# ---- stopped by a signal

SHORT = {"stage1.steps": 2, "train.steps": 5, "stage2.until_step": 3}
VARIANTS = {
    "default": SHORT,
    "options of stage 2": SHORT
    | {
        "stage2.null_rows": 0.5,
        "stage2.label_part": "decay",
        "stage2.fade": 0.5,
        "stage2.head": "conv",
        "stage2.target_norm": "spatial",
        "stage2.student_blocks": (1, 2),
        "stage2.teacher_blocks": (2, 1),
    },
    "bf16": SHORT | {"train.precision": "bf16"},
    "other options": SHORT
    | {
        "train.path": "cosine",
        "train.times": "lognormal",
        "train.weight_decay": 0.1,
        "train.recompute": (1, 3),
        "model.route": 0.5,
        "train.accumulate": 1,
        "stage1.target": "latent",
        "stage1.range_mode": "scale",
        "stage2.timestep_range": None,
        "stage2.target_norm": "layer",
        "stage2.teacher_weights": "ema",
        "log.every": 3,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_at_every_step(tmp_path, monkeypatch, variant):
    config = toy.toy(VARIANTS[variant])
    train(config, uninterrupted := tmp_path / "uninterrupted", quiet=True)
    monkeypatch.setattr(StopSignal, "asked", lambda self, accelerator: True)
    stops = config.sections["stage1"].steps - 1 + config.train.steps - 1  # the last step of a stage ends it anyway
    assert visits(config, tmp_path / "run") == stops + 1
    toy.assert_same_run(tmp_path / "run", uninterrupted)
    reports = [json.loads((run / "run.json").read_text()) for run in (tmp_path / "run", uninterrupted)]
    for report in reports:
        del report["total_seconds"]
        assert [stage.pop("seconds") > 0 for stage in report["stages"]] == [True, True]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("step", [4, 5, 6])
def test_stopped_around_the_end_of_guidance(tmp_path, monkeypatch, step):
    uninterrupted, calls = toy.finished(), itertools.count(-3)  # four steps of stage 1, then 1, 2, ...
    monkeypatch.setattr(StopSignal, "asked", lambda self, accelerator: next(calls) == step)
    message = f"at step {step}; checkpoint written in .*stage2; the same command continues"
    with pytest.raises(Interrupted, match=message):
        train(toy.toy(), tmp_path, quiet=True)
    assert int(toy.checkpoint(tmp_path).name[5:]) == step
    train(toy.toy(), tmp_path, quiet=True)
    toy.assert_same_run(tmp_path, uninterrupted)


# ---- killed


def half_a_file(tensors, path, **kwargs):
    path.write_bytes(b"\x08\x00\x00")


def half_removed(folder, *_, **__):
    *older, _newest = checkpoint.steps(folder)  # which is never removed
    for _, path in older[:1]:
        (path / "ema.safetensors").unlink(missing_ok=True)


def half_a_line(log, line):
    log._file.write(json.dumps(line).encode()[:17])


PLACES = {
    "forward": (Objective, "forward", None),
    "between optimiser and average": (EMA, "update", None),
    "in a checkpoint's first file": (checkpoint, "save_file", half_a_file),
    "while a checkpoint is fsynced": (storage, "sync", None),
    "before old checkpoints are removed": (checkpoint, "prune", None),
    "while old checkpoints are removed": (checkpoint, "prune", half_removed),
    "in a log line": (JsonlLog, "write", half_a_line),
    "after a log line": (JsonlLog, "flush", None),
    "in a preview": (Preview, "save", None),
    "between the stages": (trainer.Trainer, "__init__", None),
}


@pytest.mark.parametrize("place", PLACES)
def test_killed_at_many_places_equals_uninterrupted(tmp_path, monkeypatch, place):
    owner, name, before = PLACES[place]
    config = toy.toy(
        {"train.preview_every": 2} if owner is Preview else {}
    )  # first: the shared data are prepared for it
    original, calls = getattr(owner, name), itertools.count(1)

    def killing(*args, **kwargs):
        if next(calls) in (2, 3, 5, 11, 17):
            if before:
                before(*args, **kwargs)
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, killing)
    assert visits(config, tmp_path, Killed) > 2
    monkeypatch.undo()
    if before is half_removed:
        train(toy.toy(), tmp_path, quiet=True)
    toy.assert_same_run(tmp_path, toy.finished())
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".lock"]


LONG = {"method": "vanilla", "log.every": 1, "train.checkpoint_every": 2, "stage1.steps": 1}


@pytest.mark.slow
def test_killed_process_is_continued_by_another(tmp_path):
    config = toy.toy(LONG | {"train.steps": 200})
    argv = [
        "train",
        "digits",
        f"--data={toy.digits()}",
        f"--out={tmp_path / 'run'}",
        *toy.flags(LONG | {"train.steps": 200}),
    ]
    process = start(argv)
    wait_for_lines(process, tmp_path / "run" / "vanilla" / "log.jsonl", 7)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    reached = int(toy.checkpoint(tmp_path / "run", "vanilla").name[5:])
    assert 4 <= reached < 200
    short = {"train.steps": reached + 5}
    for out in (tmp_path / "run", tmp_path / "uninterrupted"):
        train(toy.override(config, short), out, quiet=True)
    toy.assert_same_run(tmp_path / "run", tmp_path / "uninterrupted", ("vanilla",))


# ---- one process at a time


def test_run_directory_is_locked(tmp_path):
    with lock_file(tmp_path / ".lock"):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}; wait for it, or choose another --out"):
            train(toy.toy(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with lock_file(tmp_path / ".lock"):  # the lock is released
        pass


# ---- the same command again, and with other settings


def test_repeating_a_finished_command_changes_nothing(tmp_path, capsys):
    run = toy.copy(toy.finished(), tmp_path / "run")
    before = toy.tree(run)
    train(toy.toy(), run)
    assert toy.tree(run).items() - before.items() <= {(".lock", str(os.getpid()).encode())}
    assert toy.tree(run).keys() == before.keys()
    output = capsys.readouterr().out
    assert "continues at step 4 of 4" in output and "continues at step 8 of 8" in output


def test_more_steps_continue_a_finished_run(tmp_path):
    run = toy.copy(toy.finished(), tmp_path / "run")
    longer = toy.toy({"train.steps": 12})
    for out in (run, run, tmp_path / "uninterrupted"):
        report = train(longer, out, quiet=True)
        assert report["student_steps"] == 12 and report["stages"][0]["steps"] == 4
    toy.assert_same_run(run, tmp_path / "uninterrupted")
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == 12
    with pytest.raises(ValueError, match=r"has trained stage2 for 12 steps already, more than the 8 asked for"):
        train(toy.toy(), run)
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == 12


def test_default_stage1_steps_are_fixed_at_the_first_start(tmp_path):
    for steps in (6, 8, 8, 10):
        report = train(toy.toy({"stage1.steps": None, "train.steps": steps}), tmp_path, quiet=True)
        assert [stage["steps"] for stage in report["stages"]] == [3, steps]
    with pytest.raises(ValueError, match=r"stage1.steps was 3, is 5"):
        train(toy.toy({"stage1.steps": 5, "train.steps": 10}), tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train.lr", 0.5, "train.lr was 0.001, is 0.5"),
        ("train.batch_size", 16, "train.batch_size was 8, is 16"),
        ("train.seed", 3, "train.seed was 0, is 3"),
        ("model.depth", 4, "model.depth was 3, is 4"),
        ("method", "vanilla", "method was self_transcendence, is vanilla"),
        ("recipe", "digits_other", "recipe was digits, is digits_other"),
        ("stage1.steps", 3, "stage1.steps was 4, is 3"),
        ("stage2.timestep_range", None, r"stage2.timestep_range was \(0.4, 0.7\), is None"),
        ("stage2.teacher", "x", "stage2.teacher was None, is x"),
    ],
)
def test_other_settings_are_refused_by_name(field, value, message):
    before = toy.tree(toy.finished())
    with pytest.raises(ValueError, match=rf"was started with other settings: {message}; use those, or another --out"):
        train(toy.toy({field: value}), toy.finished())
    assert toy.tree(toy.finished()) == before


def test_settings_that_do_not_affect_results_may_change(tmp_path):
    run = toy.copy(toy.finished(), tmp_path / "run")
    shutil.copytree(toy.digits(), tmp_path / "moved")
    free = {
        "data.path": str(tmp_path / "moved"),
        "log.every": 1,
        "train.checkpoint_every": 1,
        "train.preview_every": 9,
        "train.keep": 4,
        "train.keep_best": 0,
        "train.max_skips": 3,
        "train.steps": 9,
        "sample.steps": 3,
    }
    train(toy.toy(free), run, quiet=True)
    assert [line["step"] for line in toy.log(run)] == [2, 4, 6, 8, 9]
    assert (
        len(list((run / "stage2" / "checkpoints").iterdir())) == 4
    )  # of the earlier 3 (the best), 6 and 8, and the new 9
    assert (run / "stage2" / "previews" / "step-00000009.png").exists()
    assert json.loads((run / "config.json").read_text())["sample"]["steps"] == 3


@pytest.mark.parametrize("was", ["off", "on", None])
def test_runs_from_before_capture_was_automatic_continue_without_a_warning(tmp_path, was):
    run, manifest = toy.copy(toy.finished(), tmp_path / "run"), Dataset.open(toy.digits()).manifest
    plain = json.loads((run / "config.json").read_text())
    del plain["train"]["capture"]
    (run / "config.json").write_text(json.dumps(plain | {"train": plain["train"] | ({"capture": was} if was else {})}))
    with warnings.catch_warnings(action="error"):
        config = settle(toy.toy(), run, manifest)
        record(config, run, manifest)
    assert config.train.capture == "auto" and not (run / "changes.json").exists()


def test_same_pictures_at_another_scale_are_refused(tmp_path):
    run = toy.copy(toy.finished(), tmp_path / "run")
    prepare("digits", tmp_path / "plain", flip=True, standardise=False, progress=False)
    with pytest.raises(
        ValueError, match=r"trained on latents with shift \[-0.389382\] .* are now shift 0.0 and scale 1.0"
    ):
        train(toy.toy({"data.path": str(tmp_path / "plain")}), run)
    with pytest.raises(ValueError, match=r"which data\.autoencoder pixel would decode to other pixels"):
        train(toy.toy({"data.autoencoder": "pixel"}), tmp_path / "new")


def test_other_data_are_refused(tmp_path):
    run = toy.copy(toy.finished(), tmp_path / "run")
    before = toy.tree(run)
    prepare("digits", tmp_path / "unmirrored", progress=False)
    with pytest.raises(
        ValueError, match=r"was trained on other data than .*unmirrored; give the data it was trained on, or another"
    ):
        train(toy.toy({"data.path": str(tmp_path / "unmirrored")}), run)
    assert {k: v for k, v in toy.tree(run).items() if k != ".lock"} == {k: v for k, v in before.items() if k != ".lock"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "", "config.json cannot be used"),
        ("config.json", '{"version": 7}', "config.json cannot be used .*another version of selftrans"),
        ("config.json", '{"version": 2}', "config.json cannot be used .*config.recipe is missing"),
        ("data.json", "[]", "data.json cannot be used"),
        ("data.json", '{"shards": [{}]}', "data.json cannot be used"),
    ],
)
def test_damaged_run_file_is_named(tmp_path, file, content, message):
    run = toy.copy(toy.finished(), tmp_path / "run")
    (run / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        train(toy.toy(), run)
    assert (run / file).read_text() == content


def test_teacher_retrained_to_equal_weights_is_accepted(tmp_path, monkeypatch):
    """The last checkpoint of stage 1 is damaged after stage 2 has begun."""
    calls = itertools.count(-3)
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "asked", lambda self, accelerator: next(calls) == 2)
        with pytest.raises(Interrupted):
            train(toy.toy(), tmp_path, quiet=True)
    (toy.checkpoint(tmp_path, "stage1") / "student.safetensors").unlink()
    with pytest.warns(UserWarning, match="skipping a damaged checkpoint"):
        train(toy.toy({"log.preview_images": 5}), tmp_path, quiet=True)
    toy.assert_same_run(tmp_path, toy.finished())


def test_stage_of_which_no_checkpoint_is_valid_is_not_begun_anew(tmp_path):
    """The fault may be that of the disk, and the first new checkpoint would replace those of days."""
    run = toy.copy(toy.finished(), tmp_path / "run")
    folder = run / "stage2" / "checkpoints"
    for path in folder.glob("*/student.safetensors"):
        path.unlink()
    before = toy.tree(run)
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match="stage2/checkpoints holds no valid"),
    ):
        train(toy.toy(), run, quiet=True)
    assert toy.tree(run) == before
    shutil.rmtree(folder)
    train(toy.toy(), run, quiet=True)
    toy.assert_same_run(run, toy.finished())


# ---- allow_changes


def test_changed_learning_rate_with_allow_changes_is_reported_and_recorded(tmp_path, capsys):
    run = toy.copy(toy.finished(), tmp_path / "run")
    slower = {"train.steps": 10, "train.lr": 1e-5}
    with pytest.raises(ValueError, match=r"or --train.allow-changes True to continue with these"):
        train(toy.toy(slower), run, quiet=True)
    assert (
        main(
            [
                "train",
                "digits",
                f"--data={toy.digits()}",
                f"--out={run}",
                *toy.flags(slower | {"train.allow_changes": True}),
            ]
        )
        == 0
    )
    assert "continues with other settings: train.lr was 0.001, is 1e-05" in capsys.readouterr().err
    assert [line["lr"] for line in toy.log(run, "stage2")[-2:]] == [0.001, 1e-5]
    (change,) = json.loads((run / "changes.json").read_text())
    assert change == {"steps": {"stage1": 4, "stage2": 8}, "changed": ["train.lr was 0.001, is 1e-05"]}
    train(toy.toy(slower), run, quiet=True)  # the changed settings are now those of the run
    assert len(json.loads((run / "changes.json").read_text())) == 1
    with pytest.raises(ValueError, match=r"model.depth was 3, is 4; use those, or another --out$"):
        train(toy.toy(slower | {"model.depth": 4, "train.allow_changes": True}), run, quiet=True)


def test_run_of_constant_rate_ends_with_a_decay(tmp_path):
    """A run of 8 steps goes on to 12: the rate falls from 1e-3 after step 8 to zero after step 12."""
    run = toy.copy(toy.finished(), tmp_path / "run")
    given = {"train.steps": 12, "train.lr_decay": (8, 12), "train.allow_changes": True}
    with pytest.warns(UserWarning, match=r"train.lr_decay was None, is \(8, 12\)"):
        train(toy.toy(given), run, quiet=True)
    assert [line["lr"] for line in toy.log(run, "stage2")[-3:]] == pytest.approx([1e-3, 0.75e-3, 0.25e-3])


def test_log_says_from_where_on_its_values_are_of_another_loss(tmp_path, monkeypatch):
    """The line after the change names it, also if that line was lost with a killed process, and holds no step before it."""
    run, other = toy.copy(toy.finished(), tmp_path / "run"), {"train.loss": "noise", "train.allow_changes": True}
    before, update = toy.log(run), EMA.update

    def killed(self, step):
        if step == 11:
            raise Killed
        update(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(EMA, "update", killed)
        with pytest.warns(UserWarning, match="train.loss"), pytest.raises(Killed):
            train(toy.toy(other | {"train.steps": 13, "train.checkpoint_every": 100}), run, quiet=True)
    assert toy.log(run)[-1]["step"] == 10
    goes_on = {"train.loss": "noise", "train.steps": 12, "train.checkpoint_every": 10, "log.tensorboard": True}
    train(toy.toy(goes_on), run, quiet=True)
    train(toy.toy({"train.loss": "noise", "train.steps": 14}), run, quiet=True)
    lines = toy.log(run)
    assert lines[: len(before)] == before
    assert [(line["step"], line.get("changed")) for line in lines[len(before) :]] == [
        (10, ["train.loss was own, is noise"]),
        (12, None),
        (14, None),
    ]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [text.step for text in events.Tensors("stage2/changed/text_summary")] == [10]


def test_lost_config_is_read_from_the_newest_checkpoint(tmp_path):
    run = toy.copy(toy.finished(), tmp_path / "run")
    (run / "config.json").unlink()
    with pytest.raises(ValueError, match=r"train.clip was 1.0, is 9.0"):
        train(toy.toy({"train.clip": 9.0}), run, quiet=True)
    train(toy.toy(), run, quiet=True)
    assert (run / "config.json").read_bytes() == (toy.finished() / "config.json").read_bytes()


def test_method_named_by_an_untrusted_run_is_not_imported(tmp_path, monkeypatch):
    run = toy.copy(toy.finished(), tmp_path / "run")
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('ran').touch()\ngo = None\n")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"method": "evil:go"}))
    (run / "imported.json").write_text("{}")
    (run / "data.json").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="method was evil:go, is self_transcendence"):
        train(toy.toy(), run, quiet=True)
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


# ---- files that a restart rewrites


def test_restart_does_not_rewrite_unchanged_files(tmp_path):
    run = toy.copy(toy.finished(), tmp_path / "run")
    names = ("config.json", "data.json", "run.json")
    before = [(run / name).stat().st_ino for name in names]
    train(toy.toy(), run, quiet=True)
    assert [(run / name).stat().st_ino for name in names] == before


def test_config_and_log_are_fsynced_before_a_checkpoint(tmp_path, monkeypatch):
    order, original, saved = [], os.fsync, checkpoint.save

    def fsync(descriptor):
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(checkpoint, "save", lambda *args: order.append("checkpoint") or saved(*args))
    train(toy.toy({"method": "vanilla", "train.checkpoint_every": 8}), tmp_path / "run", quiet=True)
    assert any(name.startswith(".config.json") for name in order) and any(
        name.startswith(".data.json") for name in order
    )
    assert any(name.startswith(".log.jsonl") for name in order) and order[order.index("checkpoint") - 1] == "log.jsonl"


def test_file_system_without_locks_warns(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.warns(UserWarning, match=r"cannot be locked \(Function not implemented\)"):
        train(toy.toy({"method": "vanilla", "train.steps": 2}), tmp_path, quiet=True)


# ---- damaged data


def test_damaged_shards_are_found_and_made_again(tmp_path, capsys):
    data = tmp_path / "data"
    assert main(["prepare", "digits", f"--out={data}"]) == 0
    shard = data / "shard-00000.safetensors"
    original = shard.read_bytes()
    shard.write_bytes(original[:-4096] + bytes(4096))
    small = {"data.path": str(data), "method": "vanilla", "train.steps": 2}
    with pytest.raises(ValueError, match=r"shard-00000.safetensors fails its sha256"):
        train(toy.toy(small | {"data.verify": True}), tmp_path / "run", quiet=True)
    assert main(["prepare", "digits", f"--out={data}"]) == 0
    assert (
        "shard-00000.safetensors fails its sha256 and is made again" in capsys.readouterr().err
        and shard.read_bytes() == original
    )
    train(toy.toy(small | {"data.verify": True}), tmp_path / "run", quiet=True)
