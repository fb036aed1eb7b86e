"""The settings of the recipes as data: they are up to date, and give the same help and the same errors without torch."""

import json
import sys

import pytest

from selftrans.cli import overrides, snapshot
from selftrans.cli.main import main
from selftrans.recipes import RECIPES
from tests.unit.cli.lines import ends_with


def test_snapshot_is_up_to_date():
    assert snapshot.FILE.read_text(encoding="utf-8") == snapshot.text(), "run python -m selftrans.cli.snapshot"


@pytest.fixture
def used(monkeypatch):
    """The snapshot is used although torch is loaded; ends before the dataclasses are."""
    before = snapshot.recipes
    modules = {name: module for name, module in sys.modules.items() if name != "torch"}

    def recipes(words):
        with monkeypatch.context() as patch:
            patch.setattr(snapshot.sys, "modules", modules)
            return before(words)

    return lambda: monkeypatch.setattr(snapshot, "recipes", recipes)


@pytest.mark.parametrize("argv", [f"train {name} --help" for name in ("digits", "mmdit_coco")] + [
    "train --help",
    "compare digits --help",
    "train digits --model.name DiT-S/2 --help",
    "train digits --model.name diffusers-flux --help",
    "train digits --out x --model.name MMDiT-S/2 --model.qk-norm maybe",
    "train digits --out x --stage2.scal 3",
    "train digitz --out x",
])  # fmt: skip
def test_same_output_as_from_the_dataclasses(argv, used, capsys):
    expected = (main(argv.split()), *capsys.readouterr())
    used()
    assert (main(argv.split()), *capsys.readouterr()) == expected


def test_settings_of_every_recipe_are_the_same():
    known = json.loads(snapshot.FILE.read_text(encoding="utf-8"))
    for name, recipe in RECIPES.items():
        default = overrides.default_overrides(recipe(), [])
        light = snapshot._overrides(known, known["recipes"][name], [])
        assert overrides.option_names(light) == overrides.option_names(default)
        for key in vars(default):
            ours, theirs = getattr(light, key), getattr(default, key)
            assert key == "method" or {**vars(ours)} == {**vars(theirs)}, (name, key)


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        ("train --help", 0),
        ("train digits --help", 0),
        ("train digits --out x --lr 3", 2),
        ("train digitz --out x", 2),
    ],
)
def test_recipes_without_torch(argv, status):
    assert ends_with(argv, "torch", "numpy", "selftrans.config") == str(status)


def test_other_sources_and_code_outside_are_not_served(used, monkeypatch):
    used()
    assert snapshot.recipes(["digits"]) is not None
    assert snapshot.recipes(["digits", "--method", "a:b"]) is None
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "entry_points", lambda group: ["one"])
        assert snapshot.recipes(["digits"]) is None
    monkeypatch.setattr(snapshot, "sources", lambda: "other")
    assert snapshot.recipes(["digits"]) is None
