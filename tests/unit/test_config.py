"""A run's configuration: complete, there and back through json, and refused where it cannot work."""

import dataclasses
import json

import pytest

from selftrans.config import Model, RunConfig, from_json, to_json
from selftrans.models.sit import SIT
from selftrans.recipes import RECIPES, recipe
from selftrans.train.resume import FREE, differences
from tests.support.toy import override

COMPLETE = to_json(recipe("digits"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json_and_its_own_check(name):
    config = recipe(name)
    assert config.recipe == name
    assert from_json(to_json(config)) == config
    assert config.check() is config


def test_json_holds_every_field():
    written = json.loads(COMPLETE)
    assert written.pop("version") == 1
    assert written == json.loads(json.dumps(dataclasses.asdict(recipe("digits"))))


def test_values_of_every_kind_survive_json():
    config = override(
        recipe("digits"),
        {
            "data.shape": (1, 8, 8),
            "train.compile": False,
            "train.lr": 1.0,
            "stage1.timestep_range": None,
            "stage2.until_step": None,
            "stage2.teacher": "a run/with é",
            "sample.labels": (3, 1),
            "sample.guidance_interval": (0.0, 0.65),
        },
    )
    again = from_json(to_json(config))
    assert again == config
    assert type(again.train.lr) is float and again.sample.labels == (3, 1) and again.data.shape == (1, 8, 8)


def edited(path, value):
    raw = json.loads(COMPLETE)
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (edited(("version",), 2), "not of version 1"),
        (edited(("version",), None), "not of version 1"),
        ("[]", "not of version 1"),
        ("null", "not of version 1"),
        ("{", "Expecting"),
        (edited(("train", "learning_rate"), 1), "config.train.learning_rate is unknown"),
        (edited(("train", "stesp"), 1), "did you mean steps"),
        (edited(("train", "steps"), "many"), "config.train.steps should be"),
        (edited(("train", "steps"), 1.5), "config.train.steps should be"),
        (edited(("train", "steps"), True), "config.train.steps should be"),
        (edited(("train", "recompute"), 1), "config.train.recompute should be"),
        (edited(("train", "betas"), [0.9]), "config.train.betas should be"),
        (edited(("train", "betas"), [0.9, "x"]), "config.train.betas should be"),
        (edited(("train", "precision"), "fp8"), "config.train.precision should be"),
        (edited(("train",), 3), "config.train should be an object"),
        (edited(("stage2", "timestep_range"), [0.4]), "config.stage2.timestep_range should be"),
        (edited(("recipe",), None), "config.recipe should be"),
        (json.dumps({"version": 1}), "config.recipe is missing"),
    ],
)
def test_foreign_json_names_the_field(text, message):
    with pytest.raises(ValueError, match=message):
        from_json(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.steps", 0),
        ("train.batch_size", -1),
        ("train.accumulate", 0),
        ("train.lr", 0.0),
        ("train.lr", float("nan")),
        ("train.clip", -1.0),
        ("train.warmup", -1),
        ("train.keep", -1),
        ("train.seed", -1),
        ("train.weight_decay", -0.1),
        ("train.ema", 1.0),
        ("train.drop", 1.5),
        ("train.checkpoint_every", 0),
        ("train.preview_every", -1),
        ("train.path", "straight"),
        ("train.times", "often"),
        ("stage1.steps", 0),
        ("log.every", 0),
        ("log.preview_images", 0),
        ("log.preview_steps", 0),
        ("model.name", "SiT-S/3"),
        ("model.width", 0),
        ("model.depth", 0),
        ("model.heads", 0),
        ("model.patch", -2),
        ("sample.num", 0),
    ],
)
def test_a_value_that_cannot_work_is_named(field, value):
    with pytest.raises(ValueError, match=field.replace(".", r"\.")):
        override(recipe("digits"), {field: value}).check()


def test_sizes_come_from_the_published_name_unless_given():
    assert Model("SiT-B/4").sizes() == SIT["SiT-B/4"]
    assert Model("SiT-B/4", depth=3).sizes() == SIT["SiT-B/4"] | {"depth": 3}
    assert Model("SiT-B/4", width=256).sizes()["heads"] == 4  # one per 64 channels
    assert Model("SiT-B/4", width=32).sizes()["heads"] == 1
    assert Model("SiT-B/4", width=256, heads=8).sizes()["heads"] == 8
    assert Model("SiT-B/4", patch=2).sizes() == SIT["SiT-B/2"]


def test_differences_name_what_may_not_change_between_visits():
    before, now = (dataclasses.asdict(recipe("digits")) for _ in range(2))
    assert differences(before, now) == []
    before["train"] |= {"lr": 0.5, "steps": 2}
    now["train"] |= {"lr": 0.25, "steps": 1}
    now["log"]["every"] = 1
    before["stage2"]["timestep_range"] = None
    now["stage2"]["timestep_range"] = (0.1, 0.2)
    assert differences(before, now) == ["stage2.timestep_range was None, is (0.1, 0.2)", "train.lr was 0.5, is 0.25"]


def test_what_may_change_exists():
    raw = dataclasses.asdict(recipe("digits"))
    for field in FREE:
        section, _, name = field.partition(".")
        assert name in raw[section] if name else field in raw


def test_a_recipe_is_required_and_all_else_has_a_default():
    assert RunConfig(recipe="mine").check().train.steps == 400_000
