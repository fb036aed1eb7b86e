"""A step without memory ends in one line, and the command that it names works in the same folder."""

import json
from types import SimpleNamespace

import pytest
import torch

from selftrans.cli.main import main
from selftrans.recipes import recipe
from selftrans.train.out_of_memory import explanation, is_out_of_memory
from selftrans.train.run import train
from selftrans.train.trainer import Objective
from tests.support import toy
from tests.support.fine_tuning import tuned
from tests.support.toy import quick  # noqa: F401 - a fixture
from tests.unit.cli.lines import one_line


def limited(most, monkeypatch):
    """Steps of more than `most` samples at a time have no memory."""
    forward = Objective.forward

    def tight(self, batch, step):
        if len(batch.z0) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")
        return forward(self, batch, step)

    monkeypatch.setattr(Objective, "forward", tight)


def argv(out, **settings):
    flags = toy.flags({"train.batch_size": 16, **settings})
    return ["train", "digits", f"--data={toy.digits()}", f"--out={out}", *flags]


def test_message_names_what_fits_and_the_next_command_works(tmp_path, monkeypatch, capsys):
    limited(4, monkeypatch)
    assert main(argv(tmp_path / "run")) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err == (
        "selftrans: cpu is out of memory in a step of stage1 with 8 samples at a time; 4 at a time fit: --train.accumulate 4 "
        "computes the same batch of 16 in 4 parts; or use --train.recompute True or --train.precision bf16 or a smaller model"
    )
    assert main(argv(tmp_path / "run", **{"train.accumulate": 4})) == 0


def test_trained_run_continues_in_more_parts(tmp_path, monkeypatch, capsys):
    """Stage 2, or a run on fewer processes, may need more memory than the steps that were taken before."""
    run, longer = toy.copy(toy.finished(), tmp_path / "run"), {"train.batch_size": 8, "train.steps": 9}
    limited(2, monkeypatch)
    assert main(argv(run, **longer)) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert "2 at a time fit: --train.accumulate 4 " in err
    assert err.endswith("; the run has checkpoints: add --train.allow-changes True")
    assert main(argv(run, **longer, **{"train.accumulate": 4})) == 1
    assert "train.accumulate was 2, is 4; use those, or another --out, or --train.allow-changes True" in one_line(
        capsys
    )
    assert main(argv(run, **longer, **{"train.accumulate": 4, "train.allow_changes": True})) == 0
    assert [line["step"] for line in toy.log(run)][-1] == 9
    (change,) = json.loads((run / "changes.json").read_text())
    assert change["changed"] == ["train.accumulate was 2, is 4"]


def test_run_on_given_weights_continues_in_more_parts_before_its_first_checkpoint(tmp_path, monkeypatch):
    config = tuned({"train.batch_size": 8})
    limited(2, monkeypatch)
    with pytest.raises(
        MemoryError, match=r"accumulate 4 .*; the run holds given weights: add --train.allow-changes True$"
    ):
        train(config, tmp_path, quiet=True)
    more = config.override({"train.accumulate": 4})
    with pytest.raises(ValueError, match=r"train.accumulate was 2, is 4; use those, .* or --train.allow-changes True"):
        train(more, tmp_path, quiet=True)
    with pytest.warns(UserWarning, match="train.accumulate was 2, is 4"):
        train(more.override({"train.allow_changes": True}), tmp_path, quiet=True)


def test_parts_of_an_odd_batch_are_equal(tmp_path, monkeypatch, capsys):
    limited(6, monkeypatch)
    assert main(argv(tmp_path / "run", **{"train.batch_size": 15, "train.accumulate": 1})) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        "with 15 samples at a time; 5 at a time fit: --train.accumulate 3 computes the same batch of 15 in 3 parts"
        in said
    )


def test_one_sample_that_does_not_fit(tmp_path, monkeypatch, capsys):
    limited(0, monkeypatch)
    assert main(argv(tmp_path / "run", **{"train.recompute": True})) == 1
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("and one sample does not fit either: use --train.precision bf16 or a smaller model")
    )


def test_contrastive_term_needs_two_samples(tmp_path, monkeypatch, capsys):
    limited(1, monkeypatch)
    assert main(argv(tmp_path / "run", **{"train.contrastive": 0.05, "train.recompute": True})) == 1
    said = "and two samples, which train.contrastive needs, do not fit either: use --train.precision bf16 or a smaller model"
    assert capsys.readouterr().err.splitlines()[-1].endswith(said)


@pytest.mark.parametrize(
    ("micro", "expected"),
    [
        (8, "--train.accumulate 4 computes the same batch of 48 in 4 parts; or use"),
        (15, "--train.accumulate 6 computes the same batch of 90 in 6 parts; or use"),
        (1, "with 1 sample at a time, and one sample does not fit either: use"),
    ],
)
def test_parts_of_several_processes_divide_the_micro_batch(tmp_path, micro, expected):
    settings = {"train.batch_size": 3 * 2 * micro, "train.accumulate": 2}
    trainer = SimpleNamespace(
        config=recipe("digits").override(settings),
        accelerator=SimpleNamespace(device=torch.device("cpu"), num_processes=3),
        stream=SimpleNamespace(micro=micro),
        stage=SimpleNamespace(name="stage1"),
        captured=None,
        initial=None,
        directory=tmp_path / "run" / "stage1",
    )
    assert expected in explanation(trainer, None)


def test_trained_run_keeps_its_settings(tmp_path, capsys):
    run = toy.copy(toy.finished(), tmp_path / "run")
    capsys.readouterr()  # the progress bars of `toy.finished`, if this test is the first to need it
    assert main(["train", "digits", f"--out={run}", f"--data={toy.digits()}", *toy.flags({"train.accumulate": 1})]) == 1
    assert "was started with other settings: train.accumulate was 2, is 1" in one_line(capsys)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_errors_of_memory_on_a_cpu(message, expected):
    assert is_out_of_memory(RuntimeError(message)) is expected
