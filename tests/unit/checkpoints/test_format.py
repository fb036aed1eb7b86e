"""Checkpoints: atomic writes, verification, pruning; teachers given to a run."""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import types
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from selftrans.checkpoints import format as checkpoint
from selftrans.cli.main import main
from selftrans.methods.objective import Objective
from selftrans.storage import sha256_file, temporary_for
from selftrans.train import resume
from selftrans.train.log import JsonlLog, RunningMeans, read_log
from selftrans.train.run import train
from selftrans.train.signals import Interrupted, StopSignal
from selftrans.train.trainer import Trainer
from tests.support import toy
from tests.support.damage import flip
from tests.support.toy import quick  # noqa: F401 - a fixture

FILES = ("student.safetensors", "ema.safetensors", "heads.safetensors", "optimizer.safetensors", "state.json")


def save(folder: Path, step: int = 1, value: float = 0.0) -> Path:
    tensors = {name: {"a": torch.full((2, 3), value), "b": torch.arange(3)} for name in ("student", "ema")}
    return checkpoint.save(folder, step, tensors | {"heads": {}}, {"note": "mine"}, {"stage": "x", "step": step})


def test_saved_checkpoint_is_read_back(tmp_path):
    path = save(tmp_path, 7, 1.5)
    assert path == tmp_path / "step-00000007"
    found = checkpoint.read(path)
    assert found.step == 7 and found.state["note"] == "mine"
    assert torch.equal(found.tensors("ema")["a"], torch.full((2, 3), 1.5)) and found.tensors("heads") == {}
    assert found.state["sha256"].keys() == {"student.safetensors", "ema.safetensors", "heads.safetensors"}
    for name, digest in found.state["sha256"].items():
        assert sha256_file(path / name) == digest
    assert checkpoint.read_header(path / "ema.safetensors") == {"stage": "x", "step": 7, "weights": "ema"}
    assert os.listdir(tmp_path) == ["step-00000007"]


def test_weights_sha256_does_not_depend_on_the_header(tmp_path):
    one, other, third = save(tmp_path / "a", 1, 0.5), save(tmp_path / "b", 9, 0.5), save(tmp_path / "c", 1, 0.25)
    hashes = [checkpoint.weights_sha256(path / "ema.safetensors") for path in (one, other, third)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert sha256_file(one / "ema.safetensors") != sha256_file(other / "ema.safetensors")


# ---- damage


DAMAGE = {
    "flipped bit": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_named_and_skipped(tmp_path, file, damage):
    folder = toy.copy(toy.finished() / "stage2" / "checkpoints", tmp_path / "checkpoints")
    assert checkpoint.newest(folder).step == 8
    damaged = folder / "step-00000008" / file
    DAMAGE[damage](damaged)
    named = damaged if (file, damage) != ("state.json", "flipped bit") else damaged.parent
    with pytest.warns(UserWarning, match=f"damaged.*{named}"):
        assert checkpoint.newest(folder).step == 6


@pytest.mark.parametrize(
    "content", ["[]", "null", "{}", '{"step": "8", "sha256": {}}', '{"step": 8, "sha256": []}', "\x00", "[" * 99999]
)
def test_invalid_state_json_is_skipped(tmp_path, content):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "state.json").write_text(content)
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoint.newest(tmp_path).step == 1


def test_flipped_bit_in_state_json_is_detected_unless_it_changes_nothing(tmp_path):
    path = save(tmp_path, 20)
    valid, expected = (path / "state.json").read_bytes(), checkpoint.read(path)
    output = []
    for position in range(len(valid)):
        (path / "state.json").write_bytes(
            valid[:position] + bytes([valid[position] ^ 1 << position % 7]) + valid[position + 1 :]
        )
        try:
            assert checkpoint.read(path) == expected  # a bit of white space
        except ValueError as error:
            output.append(str(error))
    assert len(output) > 0.8 * len(valid)
    assert all("state.json is missing or damaged" in message for message in output)


def test_file_names_in_state_json_stay_inside_the_checkpoint(tmp_path):
    path = save(tmp_path / "run", 1)
    (tmp_path / "secret").write_text("x")
    state = json.loads((path / "state.json").read_text())
    state["sha256"] = {"../../secret": sha256_file(tmp_path / "secret")}
    state["sha256"]["state.json"] = checkpoint._state_sha256(state)
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="missing or damaged"):
        checkpoint.read(path)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_training_continues_from_the_checkpoint_before_a_damaged_one(tmp_path, stage):
    run = toy.copy(toy.finished(), tmp_path / "run")
    flip(toy.checkpoint(run, stage) / "ema.safetensors")
    with pytest.warns(UserWarning, match="damaged"):
        train(toy.toy(), run, quiet=True)
    toy.assert_same_run(run, toy.finished())


# ---- a full disk


@pytest.mark.parametrize("kind", ["os", "safetensors", "state"])
def test_failed_write_keeps_the_old_checkpoints(tmp_path, monkeypatch, kind):
    before = save(tmp_path, 1, 1.0)
    unchanged = toy.tree(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    calls = []

    def refuse(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2 or kind == "state":
            raise SafetensorError("I/O error: No space left on device") if kind == "safetensors" else full
        return save_file(*args, **kwargs)

    if kind == "state":
        monkeypatch.setattr(Path, "write_text", refuse)
    else:
        monkeypatch.setattr(checkpoint, "save_file", refuse)
    for step in (1, 2):
        with pytest.raises(OSError, match=f"could not write checkpoint .*step-0000000{step}.*No space left"):
            save(tmp_path, step, 2.0)
        calls.clear()
    assert toy.tree(tmp_path) == unchanged and os.listdir(tmp_path) == [before.name]


def refusing(monkeypatch, steps):
    """Writing checkpoints of these steps fails as on a full disk."""
    original = checkpoint.save_file

    def full(tensors, path, **kwargs):
        if any(f"step-{step:08d}" in str(path) for step in steps) and path.name == "heads.safetensors":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)


def test_training_continues_on_a_full_disk(tmp_path, monkeypatch, capsys):
    refusing(monkeypatch, [6])
    argv = ["train", "digits", f"--data={toy.digits()}", f"--out={tmp_path / 'run'}", *toy.flags()]
    assert main(argv) == 0
    output = capsys.readouterr().err
    assert (
        "warning: could not write checkpoint" in output and "step-00000006" in output and "training continues" in output
    )
    assert [path.name[-1] for path in sorted((tmp_path / "run" / "stage2" / "checkpoints").iterdir())] == ["3", "8"]
    toy.assert_same_run(tmp_path / "run", toy.finished())


def test_full_disk_at_the_last_checkpoint_is_an_error_and_the_same_command_continues(tmp_path, monkeypatch, capsys):
    argv = ["train", "digits", f"--data={toy.digits()}", f"--out={tmp_path / 'run'}", *toy.flags()]
    with monkeypatch.context() as patch:
        refusing(patch, [8])
        assert main(argv) == 1
    output = capsys.readouterr().err.splitlines()[-1]
    assert (
        output.startswith("selftrans: could not write checkpoint")
        and "free disk space, then the same command" in output
    )
    assert main(argv) == 0
    toy.assert_same_run(tmp_path / "run", toy.finished())


def test_log_lines_are_kept_in_memory_while_the_disk_is_full(tmp_path):
    path = tmp_path / "log.jsonl"
    log = JsonlLog(path, resume_step=0)
    log.write({"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))  # half a line
    try:
        for step in (2, 3):
            with pytest.warns(UserWarning, match="not on the disk yet"):
                log.write({"step": step})
        assert path.stat().st_size == len('{"step": 1}\n') + 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.close()
    assert [line["step"] for line in read_log(path)] == [1, 2, 3]


def test_full_disk_for_tensorboard_does_not_stop_training(tmp_path, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorBoardTracker, "log", full)
    with pytest.warns(UserWarning, match="tracker tensorboard ends at step 2"):
        train(toy.toy({"log.tensorboard": True, "method": "vanilla"}), tmp_path, quiet=True)
    assert [line["step"] for line in toy.log(tmp_path, "vanilla")] == [2, 4, 6, 8]


def _stopped_after_a_step(config, run):
    original = Trainer.train_step

    def once(self, batches):
        original(self, batches)
        self.stop.received = signal.SIGTERM

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", once)
        train(config, run, quiet=True)


# ---- pruning


def test_unfinished_checkpoints_of_killed_processes_are_removed(tmp_path):
    for path in (temporary_for(tmp_path / "step-00000001"), temporary_for(tmp_path / "step-00000002", "123-abc")):
        path.mkdir()
        (path / "student.safetensors").write_bytes(b"half")
    save(tmp_path, 2)
    checkpoint.prune(tmp_path, 2, keep=2)
    assert os.listdir(tmp_path) == ["step-00000002"] and checkpoint.newest(tmp_path).step == 2


@pytest.mark.parametrize(
    ("keep", "best", "every", "left"),
    [
        (1, 0, 0, [5]),
        (1, 1, 0, [4, 5]),
        (1, 2, 0, [2, 4, 5]),
        (2, 1, 0, [4, 5]),
        (1, 0, 2, [2, 4, 5]),
        (0, 1, 0, [1, 2, 3, 4, 5]),
    ],
)
def test_prune_keeps_newest_best_and_every_nth(tmp_path, keep, best, every, left):
    for step, flow in enumerate([0.9, 0.3, 0.5, 0.3, None], start=1):  # of equal losses the later one
        checkpoint.save(tmp_path, step, {}, {"flow": flow}, {})
    (tmp_path / "step-00000001" / "state.json").write_text("damaged")
    checkpoint.prune(tmp_path, 5, keep, best=best, every=every)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == left


def test_best_checkpoints_are_those_of_each_kind_of_loss(tmp_path):
    """The error of the noise is smaller than that of the velocity, and would evict every earlier checkpoint."""
    for step, (flow, loss) in enumerate([(0.9, "own"), (0.8, "own"), (0.1, "noise"), (0.2, "noise"), (0.3, "noise")]):
        checkpoint.save(tmp_path, step, {}, {"flow": flow, "config": {"train": {"loss": loss}}}, {})
    checkpoint.prune(tmp_path, 4, 1, best=1)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [1, 2, 4]


def test_corrupt_checkpoint_does_not_evict_good_one(tmp_path):
    run = toy.copy(toy.finished(), tmp_path / "run")  # holds steps 6 and 8 of stage 2
    folder = run / "stage2" / "checkpoints"
    damage = folder / "step-00000008" / "student.safetensors"
    damage.write_bytes(damage.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(Interrupted):
        _stopped_after_a_step(toy.toy({"train.keep": 1, "train.keep_best": 0}), run)
    assert [step for step, _ in checkpoint.steps(folder)] == [7]
    train(toy.toy({"train.keep": 1, "train.keep_best": 0}), run, quiet=True)
    toy.assert_same(toy.tensors(run, "stage2"), toy.tensors(toy.finished(), "stage2"))


def test_unfinished_checkpoints_are_removed_when_a_run_starts(tmp_path):
    run = toy.copy(toy.finished(), tmp_path / "run")
    unfinished = temporary_for(run / "stage2" / "checkpoints" / "step-00000009")
    unfinished.mkdir()
    train(toy.toy(), run, quiet=True)  # finished: nothing is saved any more
    assert not unfinished.exists()


@pytest.mark.parametrize("seen", [True, False])
def test_all_processes_continue_from_the_step_of_rank_0(tmp_path, monkeypatch, seen):
    for step in (4, 8) if seen else (8,):
        save(tmp_path, step)
    monkeypatch.setattr(resume, "broadcast_object_list", lambda _: [4, False])
    other = types.SimpleNamespace(is_main_process=False)
    if seen:
        assert resume.common_checkpoint(tmp_path, other).step == 4  # though it sees 8
    else:
        with pytest.raises(ValueError, match=r"step-00000004.* is missing .*all must see the same --out"):
            resume.common_checkpoint(tmp_path, other)


@pytest.mark.parametrize("value", ["gone", None, "x", -1, [], {}])
@pytest.mark.parametrize(
    "field", ["shape", "conditions", "seconds", "window", "span", "nonfinite", "processes", "teacher"]
)
def test_state_of_another_version_is_refused_in_one_line(tmp_path, field, value):
    run = toy.copy(toy.finished(), tmp_path / "run")
    state = run / "stage2" / "checkpoints" / "step-00000008" / "state.json"
    record = json.loads(state.read_text())
    record.pop(field) if value == "gone" else record.update({field: value})
    record["sha256"].pop("state.json")
    record["sha256"]["state.json"] = checkpoint._state_sha256(record)
    state.write_text(json.dumps(record))
    output = ""
    try:
        train(toy.toy({"train.steps": 9}), run, quiet=True)
    except ValueError as error:  # harmless values are accepted
        output = str(error)
    assert not output or "step-00000008" in output or "teacher" in output


def test_run_keeps_its_best_checkpoint(tmp_path, monkeypatch):
    """Best by the mean flow loss of the steps since the last regular checkpoint, regardless of interruptions."""
    original, losses = Objective.forward, [5.0, 5.0, 1.0, 2.0, 4.0, 4.0, 3.0, 3.0]

    def forward(self, batch, step):
        loss, report = original(self, batch, step)
        return loss, report | {"flow": torch.tensor(losses[step])}

    monkeypatch.setattr(Objective, "forward", forward)
    small = {"method": "vanilla", "train.checkpoint_every": 2, "train.keep": 1}
    asked = []
    monkeypatch.setattr(StopSignal, "asked", lambda *_: asked.append(0) or len(asked) in (3, 4))  # after steps 3 and 4
    for _ in range(3):
        with contextlib.suppress(Interrupted):
            train(toy.toy(small), tmp_path, quiet=True)
    kept = checkpoint.steps(tmp_path / "vanilla" / "checkpoints")
    assert [(step, checkpoint.read(path).state["flow"]) for step, path in kept] == [(4, 1.5), (8, 3.0)]


@pytest.mark.parametrize(("keep", "left"), [(0, [2, 9, 10, 11]), (1, [11]), (2, [10, 11]), (9, [2, 9, 10, 11])])
def test_prune_keeps_the_newest(tmp_path, keep, left):
    for step in (9, 10, 2, 11):
        save(tmp_path, step)
    (tmp_path / "step-notes").mkdir()  # files of the user are not touched
    (tmp_path / "step-00000012").write_text("a file")
    checkpoint.prune(tmp_path, 11, keep)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == left
    assert (tmp_path / "step-notes").exists() and (tmp_path / "step-00000012").exists()


def test_saving_a_step_again_replaces_its_checkpoint(tmp_path):
    save(tmp_path, 1, 1.0)
    path = save(tmp_path, 1, 2.0)
    assert float(checkpoint.read(path).tensors("ema")["a"][0, 0]) == 2.0 and os.listdir(tmp_path) == [path.name]


# ---- means between log lines


def test_running_means_survive_a_checkpoint_exactly():
    window, again = RunningMeans(), RunningMeans()
    values = [torch.tensor(x) for x in (0.1, 0.7, 1 / 3)]
    window.add({"loss": values[0], "self": values[1]})
    window.add({"loss": values[1]})
    again.load(json.loads(json.dumps(window.state())), torch.device("cpu"))
    for w in (window, again):
        w.add({"loss": values[2]})
    assert {k: float(v) for k, v in window.means().items()} == {k: float(v) for k, v in again.means().items()}
    assert float(window.means()["loss"]) == pytest.approx((0.1 + 0.7 + 1 / 3) / 3)
    assert float(window.means()["self"]) == pytest.approx(0.7)  # over the steps that had it
    window.clear()
    assert window.means() == {}


# ---- teachers


def test_teacher_of_other_latents_classes_or_patches_is_refused(tmp_path, capsys):
    data = toy.prepared(tmp_path, side=8)
    common = ["train", "imagefolder", f"--data={data}", *toy.flags()]
    for number, (extra, message) in enumerate(
        [
            ([], r"trained on latents \(1, 8, 8\) with 10 classes; expected \(3, 8, 8\) with 2 classes"),
            (["--data.classes=9"], "data.classes expects 9"),
        ]
    ):
        assert main([*common, f"--out={tmp_path / str(number)}", f"--teacher={toy.finished()}", *extra]) == 1
        assert re.search(message, capsys.readouterr().err)
    other = ["train", "digits", f"--data={toy.digits()}", f"--out={tmp_path / 'p'}", *toy.flags({"model.patch": 4})]
    assert main([*other, f"--teacher={toy.finished()}"]) == 1
    assert "latents (1, 8, 8) as (4, 4) tokens, the student (1, 8, 8) as (2, 2)" in capsys.readouterr().err


TEACHERS = {
    "run": "",
    "stage": "stage1",
    "checkpoint": "stage1/checkpoints/step-00000004",
    "raw file": "stage1/checkpoints/step-00000004/student.safetensors",
}


@pytest.mark.parametrize("form", TEACHERS)
def test_given_teacher_equals_the_trained_one(tmp_path, capsys, form):
    argv = ["train", "digits", f"--data={toy.digits()}", f"--out={tmp_path / 'run'}", *toy.flags()]
    assert main([*argv, f"--teacher={toy.finished() / TEACHERS[form]}"]) == 0
    assert "[1/1] stage2: 8 steps" in capsys.readouterr().out
    toy.assert_same_run(tmp_path / "run", toy.finished(), ("stage2",))
    mine, original = (json.loads((run / "run.json").read_text()) for run in (tmp_path / "run", toy.finished()))
    assert mine["student_tflops"] == original["student_tflops"]
    assert mine["total_tflops"] == pytest.approx(original["total_tflops"])  # the cost includes the teacher's training
    assert mine["teacher"]["steps"] == 4 and len(mine["stages"]) == 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["stage2"]["teacher"] == str(toy.finished() / TEACHERS[form])


def test_teacher_uses_ema_weights(tmp_path):
    file = toy.checkpoint(toy.finished(), "stage1") / "ema.safetensors"
    for name, dotted in {
        "file": {"stage2.teacher": str(file)},
        "option": {"stage2.teacher": str(toy.finished()), "stage2.teacher_weights": "ema"},
    }.items():
        small = {"train.steps": 2, "train.checkpoint_every": 1}
        train(toy.toy(dotted | small), tmp_path / name, quiet=True)
        state = json.loads((toy.checkpoint(tmp_path / name, step=2) / "state.json").read_text())
        assert state["teacher"]["path"] == str(file.resolve())
        assert state["teacher"]["sha256"] == sha256_file(file)
    toy.assert_same_run(tmp_path / "file", tmp_path / "option", ("stage2",))
    assert toy.log(tmp_path / "file")[0]["self"] != toy.log(toy.finished())[0]["self"]


def test_teacher_of_another_width_and_depth(tmp_path):
    big = {"model.width": 48, "model.depth": 4, "model.heads": 3, "train.steps": 3}
    train(toy.toy({"stage2.teacher": str(toy.finished())} | big), tmp_path, quiet=True)
    heads = {k: v for k, v in toy.tensors(tmp_path).items() if k.startswith("heads/")}
    assert {tuple(v.shape) for v in heads.values()} >= {(16, 48), (32, 16)}  # from the student's width to the teacher's


def test_other_teacher_for_a_started_run_is_refused(tmp_path):
    teacher = toy.copy(toy.finished() / "stage1", tmp_path / "teacher")
    config = toy.toy({"stage2.teacher": str(teacher), "train.steps": 3})
    train(config, tmp_path / "run", quiet=True)
    other = toy.override(config, {"train.steps": 6})
    before = toy.tree(tmp_path / "run")
    for path in (teacher / "checkpoints").iterdir():
        if path.name.endswith("4"):
            shutil.rmtree(path)  # now the one of step 3 is the newest
    with pytest.raises(ValueError, match=r"was trained with the teacher .*which is not the one given now"):
        train(other, tmp_path / "run", quiet=True)
    (toy.checkpoint(tmp_path, "teacher") / "student.safetensors").write_bytes(b"x")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ValueError, match="no valid checkpoint"):
        train(other, tmp_path / "run", quiet=True)
    assert toy.tree(tmp_path / "run") == before
