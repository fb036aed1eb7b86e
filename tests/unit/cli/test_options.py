"""Options that several commands share are passed to the functions that the commands call."""

from pathlib import Path

import pytest

from selftrans.cli.main import main, parse_command
from selftrans.cli.options import SamplingOptions

FLAGS = (
    "--num 5 --steps 3 --sampler euler --guidance-scale 2 --guidance-interval 0.1 0.9 --seed 7 --batch-size 4 "
    "--labels random --precision bf16"
)
SET = {
    "num": 5,
    "steps": 3,
    "sampler": "euler",
    "guidance_scale": 2.0,
    "guidance_interval": (0.1, 0.9),
    "seed": 7,
    "batch_size": 4,
    "labels": "random",
    "precision": "bf16",
}


def test_only_options_that_were_set_are_returned():
    assert SamplingOptions().given() == {}
    assert SamplingOptions(seed=0, steps=3).given() == {"steps": 3, "seed": 0}


@pytest.mark.parametrize(("flags", "settings"), [(FLAGS, SET), ("--seed 0", {"seed": 0}), ("", {})])
def test_sample_passes_the_options_that_were_set(flags, settings, monkeypatch, capsys):
    calls = []
    sampled = lambda *args, **options: calls.append((args, options))  # noqa: E731
    monkeypatch.setattr("selftrans.sampling.folder.sample_to_folder", sampled)
    assert main(["sample", "run", "--out", "x", "--weights", "raw", *flags.split()]) == 0
    assert calls == [(("run", Path("x"), settings), {"weights": "raw", "stage": None})]


@pytest.mark.parametrize(("flags", "settings"), [(FLAGS, SET), ("--seed 0", {"seed": 0}), ("", {})])
def test_evaluate_passes_the_options_that_were_set(flags, settings, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "selftrans.experiments.evaluate_samples.evaluate_samples", lambda **options: calls.append(options)
    )
    monkeypatch.setattr("selftrans.experiments.evaluate_samples.text", lambda report: "")
    assert main(["evaluate", "run", "--reference", "digits", "--stage", "stage1", *flags.split()]) == 0
    own = {"samples": "run", "reference": "digits", "features": "inception", "out": None, "save_reference": None}
    assert calls == [own | {"settings": settings, "weights": "ema", "stage": "stage1"}]


def test_options_exclude_the_named_fields_and_trust():
    command = parse_command(["export", "run", "--out", "x", "--layout", "sit"])
    assert command.options("run_or_file") == {"out": Path("x"), "weights": "ema", "layout": "sit", "stage": None}
