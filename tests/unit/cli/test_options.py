"""Options that several commands share: passed to the functions that the commands call, and `--trust`, which imports code."""

import re
import sys
from pathlib import Path

import pytest

from selftrans.cli.main import main, parse_command
from selftrans.cli.options import SamplingOptions
from selftrans.plugins import trust
from tests.unit.cli.lines import one_line

FLAGS = (
    "--num 5 --steps 3 --sampler euler --guidance-scale 2 --guidance-interval 0.1 0.9 --seed 7 --batch-size 4 "
    "--labels random --precision bf16 --prompts red 3"
)
SET = {
    "num": 5,
    "steps": 3,
    "sampler": "euler",
    "guidance_scale": 2.0,
    "guidance_interval": (0.1, 0.9),
    "seed": 7,
    "batch_size": 4,
    "labels": ("random",),
    "precision": "bf16",
    "prompts": ("red", "3"),
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
    assert calls == [
        (("run", Path("x"), settings), {"weights": "raw", "stage": None, "text_encoder": None, "size": None})
    ]


@pytest.mark.parametrize(("flags", "settings"), [(FLAGS, SET), ("--seed 0", {"seed": 0}), ("", {})])
def test_evaluate_passes_the_options_that_were_set(flags, settings, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "selftrans.experiments.evaluate_samples.evaluate_samples", lambda **options: calls.append(options)
    )
    monkeypatch.setattr("selftrans.experiments.evaluate_samples.text", lambda report: "")
    assert main(["evaluate", "run", "--reference", "digits", "--stage", "stage1", *flags.split()]) == 0
    own = {"samples": "run", "reference": "digits", "features": None, "out": None, "save_reference": None}
    own |= {"clip": None, "text_encoder": None}
    assert callable(calls[0].pop("show"))
    assert calls == [own | {"settings": settings, "weights": "ema", "stage": "stage1"}]


def test_options_exclude_the_named_fields_and_trust():
    command = parse_command(["export", "run", "--out", "x", "--layout", "sit"])
    others = {"weights": "ema", "layout": "sit", "adapters": False, "stage": None}
    assert command.options("run_or_file") == {"out": Path("x"), **others}


COMMANDS = {
    "train": "train digits --out x",
    "compare": "compare digits --out x",
    "sample": "sample run --out x",
    "evaluate": "evaluate run --reference digits",
    "analyse": "analyse run --out x",
    "export": "export run --out x",
}


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Two importable modules outside the package."""
    for name in ("outside_one", "outside_two"):
        (tmp_path / f"{name}.py").write_text("def method(config):\n    return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("outside_one", "outside_two"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("argv", COMMANDS.values(), ids=COMMANDS)
def test_trusted_code_is_imported_before_the_command_runs(argv, outside):
    command = parse_command([*argv.split(), "--trust", "outside_one:method", "--trust=outside_two:method"])
    assert command.trust == ("outside_one:method", "outside_two:method")
    assert {"outside_one", "outside_two"} <= set(sys.modules)
    assert "trust" not in command.options()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("outside_one", "--trust outside_one names no code; write MODULE:FUNCTION"),
        ("outside_one:", "--trust outside_one: names no code"),
        (":method", "--trust :method names no code"),
        ("no_such_module:method", "no_such_module:method cannot be imported: No module named 'no_such_module'"),
        ("outside_one:other", "outside_one:other cannot be imported: outside_one has no other"),
    ],
)
def test_code_that_cannot_be_imported(name, expected, outside, capsys):
    with pytest.raises(ValueError, match=re.escape(expected)):
        trust(name)
    for argv in COMMANDS.values():
        assert main([*argv.split(), "--trust", name]) == 1
        assert expected in one_line(capsys)
