"""Commands on a recipe: position of the recipe, help page, every form of an override, and wrong overrides."""

import dataclasses
from pathlib import Path

import pytest

from selftrans.cli.main import main, parse_command
from selftrans.cli.overrides import default_overrides
from selftrans.cli.parse import option_names
from selftrans.config import RunConfig, from_json
from selftrans.methods.registry import METHODS, sections_of
from selftrans.methods.self_transcendence import Stage1, Stage2
from selftrans.methods.sra import SRA
from selftrans.recipes import RECIPES
from tests.support import toy
from tests.support.toy import quick  # noqa: F401 - a fixture
from tests.unit.cli.lines import one_line

# ---- help


@pytest.mark.parametrize("argv", ["train", "train --help", "train -h", "compare --help"])
def test_without_a_recipe_help_lists_the_recipes_and_the_own_options(argv, capsys):
    assert main(argv.split()) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in RECIPES)
    assert "RECIPE" in printed and "--trust MODULE:FUNCTION" in printed and "--train.warmup" not in printed
    assert ("--teacher RUN_OR_FILE" in printed) == argv.startswith("train")


@pytest.mark.parametrize(
    "argv", ["train cifar10 --help", "train --help cifar10", "train cifar10 --out x --train.steps 3 -h"]
)
def test_help_of_a_recipe_lists_every_override_with_its_default(argv, capsys):
    assert main(argv.split()) == 0
    printed = capsys.readouterr().out
    for text in (
        "--train.batch-size INT",
        "--stage2.until-step {None}|INT",
        "--model.name STR",
        "(default: 50000)",
    ):
        assert text in " ".join(printed.replace("│", " ").split()), text  # wherever the lines are broken
    for text in ("--out RUN", "--data DIR", "--teacher RUN_OR_FILE", "selftrans prepare CIFAR10.zip", "RECIPE"):
        assert text in printed, text
    overrides = set(option_names(default_overrides(RECIPES["cifar10"](), [])))
    assert len(overrides) > 80 and not {name for name in overrides if f"--{name} " not in printed}
    assert "--recipe" not in printed


def test_help_of_a_recipe_to_compare_lists_the_overrides_but_not_the_method(capsys):
    assert main(["compare", "digits", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--train.batch-size INT" in printed and "--methods" in printed and "--method " not in printed


# ---- every form of a value


def test_overrides_of_every_kind(monkeypatch):
    calls, given = [], []

    def train(config, out, typed):
        calls.append((config, out))
        given.append(typed)
        counts = dict.fromkeys(("student_steps", "student_tflops", "total_tflops", "total_seconds"), 0)
        return counts | {"order": ["vanilla"], "teacher": None, "stages": [{}]}

    monkeypatch.setattr("selftrans.train.run.train", train)
    argv = (
        "train digits --train.steps=7 --train.batch_size 16 --train.lr 1e-3 --train.betas 0.8 0.95 --model.qk-norm False "
        "--train.compile None --stage2.until-step None --stage2.timestep-range 0.2 0.5 --stage1.timestep-range None "
        "--data.shape 1 8 8 --method vanilla --sample.labels 3 4 5 --stage1.block=1 --data=a/b"
    )
    assert main([*argv.split(), "--out", "a run"]) == 0
    config, out = calls[0]
    assert out == Path("a run") and type(config) is RunConfig and config.recipe == "digits"
    assert {"train.steps", "train.batch_size", "model.qk_norm", "sample.labels"} < set(given[0])
    assert (config.train.steps, config.train.batch_size, config.train.lr) == (7, 16, 1e-3)
    assert config.train.betas == (0.8, 0.95) and config.train.compile is None and config.model.qk_norm is False
    stage1, stage2 = config.section(Stage1), config.section(Stage2)
    assert stage2.until_step is None and stage2.timestep_range == (0.2, 0.5)
    assert stage1.timestep_range is None and stage1.block == 1
    assert config.data.shape == (1, 8, 8) and config.sample.labels == (3, 4, 5) and config.method == "vanilla"
    assert config.data.path == "a/b"
    assert config.model.width == RECIPES["digits"]().model.width  # other settings are those of the recipe
    assert main(["train", "digits", "--teacher=some/run", "--out", "a run"]) == 0
    assert calls[1][0].section(Stage2).teacher == "some/run" and calls[1][0].method == "self_transcendence"


@pytest.mark.parametrize("name", RECIPES)
def test_without_overrides_the_configuration_is_the_recipe(name):
    parsed, recipe = parse_command(["train", name, "--out", "x"]).config, RECIPES[name]()
    for method in METHODS:
        expected = recipe.override({"method": method}).restricted()
        assert dataclasses.replace(parsed, method=method).restricted() == expected


@pytest.mark.parametrize(
    "argv",
    ["digits --out x --train.steps 5", "--out x digits --train.steps=5", "--train.steps 5 --out x digits"],
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_recipe_may_be_anywhere_between_options(command, argv):
    parsed = parse_command([command, *argv.split()])
    assert (parsed.recipe, parsed.out, parsed.config.train.steps) == ("digits", Path("x"), 5)


def test_compare_takes_its_own_options_and_overrides(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "selftrans.experiments.comparison.compare.compare_methods",
        lambda *args, **options: calls.append((args, options)) or {"failed": []},
    )
    argv = (
        "compare digits --out x --methods vanilla sra --seeds 4 5 --steps 9 --images 20 --sra.weight 0.25 --workers 1"
    )
    assert main(argv.split()) == 0
    (config,), options = calls[0]
    assert options == {
        "out": Path("x"),
        "methods": ("vanilla", "sra"),
        "seeds": (4, 5),
        "images": 20,
        "features": None,
        "workers": 1,
        "typed": ("out", "methods", "seeds", "steps", "images", "sra.weight", "workers"),
    }
    assert type(config) is RunConfig and (config.train.steps, config.section(SRA).weight) == (9, 0.25)


def test_overrides_are_those_of_the_run_its_model_and_every_method():
    config = RECIPES["digits"]()
    default = default_overrides(config, ["--train.steps", "3"])
    names = {field.name for field in dataclasses.fields(default)}
    assert names == {"method", "data", "model", "init", "lora", "train", "sample", "log"} | set(
        sections_of(METHODS.values())
    )
    assert (default.method, default.model, default.stage1) == (config.method, config.model, config.section(Stage1))
    with pytest.raises(ValueError, match="'magic' is unknown"):
        default_overrides(config, ["--method=magic"])
    with pytest.raises(ValueError, match="'SiT-S/3' is unknown; did you mean"):
        default_overrides(config, ["--model.name", "SiT-S/3"])


def test_list_of_labels_is_kept_in_the_run_directory(tmp_path):
    argv = ["train", "digits", f"--out={tmp_path}", "--method=vanilla", *toy.flags({"train.steps": 1})]
    for _ in range(2):
        assert main([*argv, "--sample.labels", "3", "1"]) == 0
    assert from_json((tmp_path / "config.json").read_text()).sample.labels == (3, 1)


# ---- wrong arguments: status 2, one line, the nearest name


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            "train digit --out x",
            "recipe 'digit' is unknown; did you mean digits or digits_t2i? (see selftrans train --help)",
        ),
        ("train sit_imagenet_b --out x", "did you mean sit_imagenet"),
        (
            "compare digit --out x",
            "recipe 'digit' is unknown; did you mean digits or digits_t2i? (see selftrans compare --help)",
        ),
        ("compare", "RECIPE is missing; it comes first: selftrans compare RECIPE ..."),
        ("train --out x", "RECIPE is missing"),
        ("train digits", "--out RUN is missing (see selftrans train digits --help)"),
        ("train digits --out", "--out needs a value: RUN"),
        ("train digits --out --train.steps 3", "--out needs a value: RUN"),
        ("train digits --out x --data=", "--data needs a value"),
        ("train digits --out x --train.stesp 3", "option --train.stesp is unknown; did you mean --train.steps?"),
        ("train digits --out x --train.stesp=3", "did you mean --train.steps?"),
        ("train digits --out x --teachr y", "option --teachr is unknown; did you mean --teacher?"),
        ("train digits --out x --stage3.steps 3", "did you mean --stage1.steps?"),
        ("train digits --out x --lr 0.1", "option --lr is unknown; did you mean --train.lr?"),
        ("train digits --out x --steps 3", "did you mean --train.steps, --stage1.steps or --sample.steps?"),
        ("train digits --out x --device cuda", "option --device is unknown: the device is found automatically"),
        ("train digits --out x --resume", "option --resume is unknown: the same command again continues"),
        ("train digits --out x --recipe cifar10", "option --recipe is unknown"),
        ("compare digits --out x --method sra", "option --method is unknown; did you mean --methods?"),
        ("train digits --out x --train.steps", "--train.steps needs a value: INT"),
        ("train digits --out x --train.steps many", "--train.steps: 'many' is not a whole number"),
        ("train digits --out x --train.steps 1.5", "--train.steps: '1.5' is not a whole number"),
        ("train digits --out x --train.lr fast", "--train.lr: 'fast' is not a number"),
        ("train digits --out x --train.betas 0.9", "--train.betas needs 2 values: FLOAT FLOAT"),
        ("train digits --out x --data.shape 1 x", "--data.shape: 'x' is not a whole number"),
        ("train digits --out x --train.precision fp8", "--train.precision 'fp8' is not one of bf16, fp16, fp32"),
        (
            "train digits --out x --train.recompute maybe",
            "--train.recompute: 'maybe' is not {True,False}|INT|{[INT [INT ...]]}",
        ),
        ("train digits --out x --seeds 1", "option --seeds is unknown"),
        ("compare digits --out x --seeds a", "--seeds: "),
        ("train digits --out x stray", "'stray' is one argument too many"),
        ("train digits --out x --train.steps 3 stray", "'stray' is one argument too many"),
        ("train digits --out x -q", "option -q is unknown"),
    ],
)
def test_wrong_arguments(argv, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv.split()) == 2
    line = one_line(capsys)
    assert expected in line and line.endswith(" --help)\n")
    assert list(tmp_path.iterdir()) == []
