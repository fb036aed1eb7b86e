"""Updates without a finite gradient: skipped on the device, counted, logged with the rows of their batch, never applied."""

import contextlib
import json
import math
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from selftrans.checkpoints import format as checkpoint
from selftrans.cli.main import main
from selftrans.methods.objective import Objective
from selftrans.train import run as pipeline
from selftrans.train import trainer, training_step
from selftrans.train.batches import Stream
from selftrans.train.log import read_log
from selftrans.train.nonfinite import NonFiniteSteps, check_step, check_weights
from selftrans.train.run import train
from selftrans.train.signals import Interrupted
from tests.support import toy
from tests.support.toy import quick  # noqa: F401 - a fixture

BAD = float("nan")


@pytest.fixture
def spoil(monkeypatch):
    """A function of {0-based step: value}: multiplies the loss of that step by the value, except in stage 1."""

    def chosen(values):
        original = Objective.forward

        def forward(self, batch, step):
            loss, report = original(self, batch, step)
            names = {type(g).__name__ for g in self.guidances}
            if step in values and "StructureGuidance" not in names:
                loss = loss * values[step]
                report = report | {"flow": report["flow"] * values[step]}
            return loss, report

        monkeypatch.setattr(Objective, "forward", forward)

    return chosen


def vanilla(**more):
    return toy.toy({"method": "vanilla", "train.preview_every": 0} | more)


# ---- skipped updates


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_update_leaves_weights_and_moments_unchanged(tmp_path, spoil, value):
    spoil({3: value})
    with pytest.warns(
        UserWarning, match=r"1 of the last \d updates? of vanilla skipped, first at step 4 \(loss -?(nan|inf)"
    ):
        train(vanilla(**{"train.checkpoint_every": 1, "train.keep": 0}), tmp_path, quiet=True)
    # nothing is saved while the latest update was skipped: step 5 started from the weights after step 3
    assert [step for step, _ in checkpoint.steps(tmp_path / "vanilla" / "checkpoints")] == [1, 2, 3, 5, 6, 7, 8]
    final = toy.tensors(tmp_path, "vanilla")
    counts = {float(t) for name, t in final.items() if name.endswith(":step")}
    assert counts == {7.0}  # seven updates of eight were applied
    assert all(torch.isfinite(t).all() for t in final.values())


def test_log_counts_and_lists_skipped_steps_and_excludes_them_from_means(tmp_path, spoil):
    train(vanilla(), tmp_path / "finite", quiet=True)
    spoil({2: BAD, 3: BAD, 6: float("inf")})
    with pytest.warns(UserWarning, match="skipped"):
        train(vanilla(), tmp_path / "run", quiet=True)
    finite, lines = (read_log(tmp_path / name / "vanilla" / "log.jsonl") for name in ("finite", "run"))
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert lines[0] == finite[0] | {"seconds": lines[0]["seconds"]}  # equal before the first skipped step
    assert "loss" not in lines[1] and "grad_norm" not in lines[1]  # both steps of the line were skipped
    assert [line.get("skipped") for line in lines] == [None, 2, 2, 3]
    assert [[skip["step"] for skip in line.get("skips", [])] for line in lines] == [[], [3, 4], [], [7]]
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    config = vanilla()
    shards = trainer.Dataset.open(toy.digits())
    seed = int(trainer.np.random.SeedSequence([config.train.seed, 0, 1]).generate_state(1)[0])
    streams = [Stream(shards, batch_size=8, accumulate=2, seed=seed, rank=rank, world=2) for rank in (0, 1)]
    rows = [row for stream in streams for micro in (0, 1) for row in stream.indices(2, micro).tolist()]
    assert rows == streams[0].all_indices(2).tolist()  # of all processes, in their order
    assert lines[1]["skips"][0]["loss"] == "nan" and len(lines[1]["skips"][0]["rows"]) == 8
    json.loads((tmp_path / "run" / "vanilla" / "log.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)


def test_logged_rows_of_a_skip_are_those_of_its_batch(tmp_path, monkeypatch, spoil):
    seen, original = [], training_step.to_batch

    def to_batch(loaded, *others):
        seen.append(loaded.rows.tolist())
        return original(loaded, *others)

    monkeypatch.setattr(training_step, "to_batch", to_batch)
    spoil({5: BAD})
    with pytest.warns(UserWarning, match="skipped"):
        train(vanilla(), tmp_path, quiet=True)
    (skip,) = [skip for line in read_log(tmp_path / "vanilla" / "log.jsonl") for skip in line.get("skips", [])]
    assert skip["rows"] == seen[10] + seen[11]  # two micro-batches a step


# ---- many in a row


def test_too_many_skips_in_a_row_end_the_run_and_name_the_last_good_checkpoint(tmp_path, monkeypatch, capsys, spoil):
    spoil(dict.fromkeys(range(4, 100), BAD))
    flags = toy.flags({"method": "vanilla", "train.steps": 60, "train.max_skips": 5, "train.checkpoint_every": 2})
    assert main(["train", "digits", f"--out={tmp_path}", *flags]) == 1
    output = capsys.readouterr().err.splitlines()[-1]
    assert output.startswith("selftrans: 5 updates in a row, up to step 9 of vanilla, had no finite gradient (loss nan")
    good = tmp_path / "vanilla" / "checkpoints" / "step-00000004"
    assert f"the last good checkpoint is {good};" in output and checkpoint.newest(good.parent).path == good
    last = read_log(tmp_path / "vanilla" / "log.jsonl")[-1]
    assert last["skipped"] == 5 and [skip["step"] for skip in last["skips"]] == [9]
    monkeypatch.undo()  # without the cause, the same command continues
    flags = toy.flags({"method": "vanilla", "train.steps": 12, "train.max_skips": 5, "train.checkpoint_every": 2})
    assert main(["train", "digits", f"--out={tmp_path}", *flags]) == 0
    assert checkpoint.newest(good.parent).step == 12


def test_run_that_ends_before_its_first_checkpoint_takes_another_rate(tmp_path, monkeypatch, spoil):
    spoil(dict.fromkeys(range(100), BAD))
    settings = {"train.max_skips": 2, "train.steps": 2}
    message = r"2 of vanilla, had .*, before the first checkpoint in .*; use a lower train\.lr \(or the stage's own\) .* fp32$"
    with pytest.raises(FloatingPointError, match=message):
        train(vanilla(**settings), tmp_path, quiet=True)
    monkeypatch.undo()
    train(vanilla(**settings | {"train.lr": 1e-4}), tmp_path, quiet=True)
    assert checkpoint.newest(tmp_path / "vanilla" / "checkpoints").step == 2


def test_finite_update_resets_the_count_in_a_row(tmp_path, spoil):
    spoil(dict.fromkeys((0, 1, 3, 4, 6, 7), BAD))
    with pytest.warns(UserWarning, match="skipped"):
        train(vanilla(**{"train.max_skips": 3}), tmp_path, quiet=True)
    assert checkpoint.newest(tmp_path / "vanilla" / "checkpoints").state["nonfinite"]["skipped"] == 6


def test_non_finite_weights_are_never_saved(tmp_path, monkeypatch):
    before = training_step.update

    def poison(optimizer, sound, scaler=None):
        before(optimizer, sound, scaler)
        if float(next(iter(optimizer.state.values()))["step"]) == 7:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].view(-1)[0] = BAD

    monkeypatch.setattr(training_step, "update", poison)
    with pytest.raises(FloatingPointError, match=r"no longer finite at step 7.*step-00000006"):
        train(vanilla(**{"train.checkpoint_every": 1, "train.keep": 1, "log.every": 100}), tmp_path, quiet=True)
    found = toy.tensors(tmp_path, "vanilla")
    assert all(torch.isfinite(t).all() for t in found.values())
    check_weights([torch.full((2,), 3e38)], "here")  # large but finite


# ---- resuming


def test_run_with_skipped_steps_resumes_bit_for_bit(tmp_path, monkeypatch, spoil):
    values = {2: BAD, 3: BAD, 6: float("inf")}
    spoil(values)
    with pytest.warns(UserWarning, match="skipped"):
        train(toy.toy(), tmp_path / "uninterrupted", quiet=True)
    asked = []
    monkeypatch.setattr(
        trainer.StopSignal, "asked", lambda *_: asked.append(0) or len(asked) % 2 == 0
    )  # at every second step
    for _ in range(40):
        with contextlib.suppress(Interrupted), warnings.catch_warnings(action="ignore"):
            train(toy.toy(), tmp_path / "resumed", quiet=True)
            break
    assert len(asked) >= 8
    toy.assert_same_run(tmp_path / "uninterrupted", tmp_path / "resumed")
    states = [
        json.loads((toy.checkpoint(tmp_path / n) / "state.json").read_text()) for n in ("uninterrupted", "resumed")
    ]
    assert states[0]["nonfinite"] == states[1]["nonfinite"] and states[0]["nonfinite"]["skipped"] == 3
    assert states[0]["span"] == states[1]["span"] and states[0]["flow"] == states[1]["flow"]


# ---- fp16


@pytest.fixture
def fp16(monkeypatch):
    """fp16 on a CPU: accelerate refuses it, but autocast and gradient scaler of torch support it."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**16)
    monkeypatch.setattr(pipeline, "accelerator_of", lambda config, out: accelerator)
    yield accelerator
    AcceleratorState._reset_state(True)


def test_fp16_overflow_is_skipped_by_the_scaler_and_counted(tmp_path, spoil, fp16):
    spoil({3: float("inf")})
    with pytest.warns(UserWarning, match="first at step 4"):
        train(vanilla(), tmp_path, quiet=True)
    found = checkpoint.newest(tmp_path / "vanilla" / "checkpoints")
    assert found.state["nonfinite"]["skipped"] == 1 and found.state["scaler"]["scale"] == 2.0**15
    assert {float(t) for name, t in found.tensors("optimizer").items() if name.endswith(":step")} == {7.0}
    assert all(math.isfinite(line["loss"]) for line in read_log(tmp_path / "vanilla" / "log.jsonl"))


def test_fp16_scaler_recovers_from_a_too_large_scale(tmp_path, fp16):
    fp16.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    with pytest.warns(UserWarning, match="first at step 1 "):
        train(vanilla(**{"train.steps": 30, "log.every": 30, "train.checkpoint_every": 30}), tmp_path, quiet=True)
    state = checkpoint.newest(tmp_path / "vanilla" / "checkpoints").state
    assert 1 <= state["nonfinite"]["skipped"] < 25 and state["nonfinite"]["in_a_row"] == 0
    assert state["scaler"]["scale"] == 2.0 ** (40 - state["nonfinite"]["skipped"])


# ---- norms, means, several processes


def test_growing_norms_warn_once_per_tenfold():
    steps = NonFiniteSteps(3, rows=lambda step: trainer.np.zeros(0))
    values = [1.0, 9.0, 10.5, 90.0, 106.0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, value in enumerate(values):
            steps.check_norms({"self/feature_norm": value, "grad_norm": 10.0**step, "loss": 10.0**step}, step)
    assert ["from 1 to 10.5 at step 2" in str(w.message) for w in caught] == [True, False]
    assert "from 10.5 to 106 at step 4" in str(caught[1].message) and len(caught) == 2
    again = NonFiniteSteps(3, rows=lambda step: trainer.np.zeros(0))
    again.load(json.loads(json.dumps(steps.state())))
    assert again.norms == {"self/feature_norm": 106.0}


def test_feature_norms_are_in_the_log_while_guidance_is_active():
    lines = toy.log(toy.finished(), "stage2")
    assert {"self/feature_norm", "self/target_norm"} <= lines[0].keys()
    assert "self/feature_norm" not in lines[-1]


def test_long_row_of_skips_warns_at_each_doubling():
    steps, said = NonFiniteSteps(99, rows=lambda step: trainer.np.arange(4)), []
    for step, bad in enumerate([1.0] * 10 + [0.0, 1.0, 0.0]):
        steps.note(step, torch.tensor([bad, BAD, BAD]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps.sync("stage1")
        said += [step] * len(caught)
    assert said == [0, 1, 3, 7, 11], "of rows of 1, 2, 4 and 8, and of the next row"
    assert steps.skipped == 11 and len(steps.pop_report()["skips"]) == 11


def test_smaller_limit_than_the_row_of_a_continued_run_ends_it():
    """train.max_skips may change when a run continues, and a stop signal writes a checkpoint within a row of skips."""
    steps = NonFiniteSteps(25, rows=lambda step: trainer.np.arange(4))
    steps.load({"skipped": 30, "in_a_row": 30})
    steps.note(7, torch.tensor([1.0, BAD, BAD]))
    with pytest.raises(FloatingPointError, match="31 updates in a row, up to step 8 of stage1, had no finite gradient"):
        steps.sync("stage1")


def test_all_processes_skip_the_same_step(monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "num_processes", property(lambda self: 2))
    monkeypatch.setattr(
        accelerator, "reduce", lambda bad, reduction: bad + 1
    )  # the other process has a non-finite loss
    steps = NonFiniteSteps(9, rows=lambda step: trainer.np.arange(4))
    checked = check_step([torch.tensor(1.0)], torch.tensor(1.0), accelerator)
    assert checked.tolist() == [1, 1, 1]
    steps.note(0, checked)
    with pytest.warns(UserWarning, match="1 of the last 1 update of"):
        steps.sync("stage1")
    assert steps.in_a_row == 1 and steps.pop_report()["skips"][0]["rows"] == [0, 1, 2, 3]
