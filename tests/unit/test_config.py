"""The configuration of a run: complete, unchanged through json, and refused where a value is impossible."""

import json

import pytest

from selftrans.config import RunConfig, from_json, settings_of, to_json
from selftrans.methods.registry import METHODS
from selftrans.methods.self_transcendence import Stage1
from selftrans.models.sit import SIT_SIZES, SiTConfig
from selftrans.recipes import RECIPES, recipe
from selftrans.train.resume import differences
from tests.support.toy import override

COMPLETE = to_json(recipe("digits").restricted())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_passes_json_and_its_check_unchanged(name):
    for method in METHODS:
        config = override(recipe(name), {"method": method}).restricted()
        assert config.recipe == name
        assert from_json(to_json(config)) == config
        assert config.check() is config


def test_json_holds_every_setting():
    written = json.loads(COMPLETE)
    assert written.pop("version") == 2
    flat = {
        f"{section}.{name}": value
        for section, values in written.items()
        if isinstance(values, dict)
        for name, value in values.items()
    } | {name: value for name, value in written.items() if not isinstance(value, dict)}
    expected = {name: value for name, value, _ in settings_of(recipe("digits").restricted())}
    assert flat == json.loads(json.dumps(expected))


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("vanilla", set()),
        ("structure", {"stage1"}),
        ("self_transcendence", {"stage1", "stage2"}),
        ("repa", {"repa"}),
        ("dispersive", {"dispersive"}),
        ("internal_guidance", {"internal_guidance"}),
    ],
)
def test_json_of_a_run_holds_the_sections_of_its_own_method_only(method, own):
    written = json.loads(to_json(override(recipe("digits"), {"method": method}).restricted()))
    shared = {"version", "recipe", "method", "data", "model", "init", "lora", "train", "sample", "log"}
    assert set(written) - shared == own


def test_sections_of_an_unknown_method_stay_plain_json_and_nothing_is_imported():
    raw = json.loads(to_json(override(recipe("digits"), {"method": "vanilla"}).restricted()))
    config = from_json(json.dumps(raw | {"method": "os:system", "extra": {"a": [1]}}))
    assert config.method == "os:system" and config.sections == {"extra": {"a": [1]}}
    with pytest.raises(ValueError, match=r"config\.stage1 is unknown"):
        from_json(json.dumps(raw | {"stage1": {}}))


def test_values_of_every_type_pass_json_unchanged():
    config = override(
        recipe("digits").restricted(),
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


def test_order_of_overrides_does_not_matter():
    """A model.name of another family has other fields: it is applied first, whatever its place."""
    dotted = {"model.width": 96, "model.name": "MMDiT-S/2", "model.masked": True}
    first, last = (recipe("digits").override(dict(items)) for items in (dotted.items(), reversed(dotted.items())))
    assert first == last and (first.model.width, first.model.masked) == (96, True)


def edited(path, value):
    raw = json.loads(COMPLETE)
    section = raw
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (edited(("version",), 1), "not of version 2"),
        (edited(("version",), None), "not of version 2"),
        ("[]", "not of version 2"),
        ("null", "not of version 2"),
        ("{", "Expecting"),
        (edited(("train", "learning_rate"), 1), "config.train.learning_rate is unknown"),
        (edited(("train", "stesp"), 1), "did you mean steps"),
        (edited(("train", "steps"), "many"), "config.train.steps should be"),
        (edited(("train", "steps"), 1.5), "config.train.steps should be"),
        (edited(("train", "steps"), True), "config.train.steps should be"),
        (edited(("train", "recompute"), 1.5), "config.train.recompute should be"),
        (edited(("train", "betas"), [0.9]), "config.train.betas should be a list of 2"),
        (edited(("train", "betas"), [0.9, "x"]), r"config\.train\.betas\[1\] should be float"),
        (edited(("train", "precision"), "fp8"), "config.train.precision should be"),
        (edited(("train",), 3), "config.train should be an object"),
        (edited(("stage2", "timestep_range"), [0.4]), "config.stage2.timestep_range should be"),
        (edited(("recipe",), None), "config.recipe should be"),
        (json.dumps({"version": 2}), "config.recipe is missing"),
        (edited(("model", "name"), "SiT-S/3"), "model.name 'SiT-S/3' is unknown"),
        (edited(("model",), 3), "config.model should be an object"),
        (edited(("model", "widht"), 3), "did you mean width"),
    ],
)
def test_invalid_json_is_refused_by_field(text, message):
    with pytest.raises(ValueError, match=message):
        from_json(text)


def test_lenient_reading_keeps_sections_of_another_version_as_json():
    raw = json.loads(COMPLETE)
    raw["stage2"]["of_a_later_version"] = 1
    with pytest.raises(ValueError, match=r"config\.stage2\.of_a_later_version is unknown"):
        from_json(json.dumps(raw))
    config = from_json(json.dumps(raw), lenient=True)
    assert config.sections["stage2"] == raw["stage2"] and config.section(Stage1) == recipe("digits").section(Stage1)
    with pytest.raises(ValueError, match=r"config\.train\.lr should be"):  # what a model needs is never skipped
        from_json(edited(("train", "lr"), "fast"), lenient=True)


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
def test_impossible_value_is_named(field, value):
    with pytest.raises(ValueError, match=field.replace(".", r"\.")):
        override(recipe("digits"), {field: value}).check()


def test_sizes_come_from_the_published_name_unless_given():
    assert SiTConfig("SiT-B/4").sizes() == SIT_SIZES["SiT-B/4"]
    assert SiTConfig("SiT-B/4", depth=3).sizes() == SIT_SIZES["SiT-B/4"] | {"depth": 3}
    assert SiTConfig("SiT-B/4", width=256).sizes()["heads"] == 4  # one per 64 channels
    assert SiTConfig("SiT-B/4", width=32).sizes()["heads"] == 1
    assert SiTConfig("SiT-B/4", width=256, heads=8).sizes()["heads"] == 8
    assert SiTConfig("SiT-B/4", patch=2).sizes() == SIT_SIZES["SiT-B/2"]


def test_differences_list_settings_that_may_not_change_on_resume():
    config = recipe("digits").restricted()
    assert differences(config, config) == []
    before = override(config, {"train.lr": 0.5, "train.steps": 2, "stage2.timestep_range": None})
    now = override(config, {"train.lr": 0.25, "train.steps": 1, "log.every": 1, "stage2.timestep_range": (0.1, 0.2)})
    assert differences(before, now) == [
        ("stage2.timestep_range", None, (0.1, 0.2), "fixed"),
        ("train.lr", 0.5, 0.25, "consent"),
    ]
    vanilla = override(recipe("digits"), {"method": "vanilla"}).restricted()  # without the sections of both stages
    assert differences(vanilla, config) == [("method", "vanilla", config.method, "fixed")]


def test_settings_that_may_change_on_resume():
    """Free: paths, lengths, what is kept and logged. With consent: settings that may rescue a diverging run."""
    rules = {
        name: rule
        for method in METHODS
        for name, _, rule in settings_of(override(recipe("digits"), {"method": method}).restricted())
    }
    free = {name for name, rule in rules.items() if rule == "free" and name.split(".")[0] not in ("log", "sample")}
    assert free == {
        *("data.path", "data.text_encoder", "data.on_device", "data.verify", "stage2.teacher", "repa.encoder"),
        *("data.cache_dir", "data.cache_gb"),
        *("train.steps", "train.checkpoint_every", "train.preview_every", "train.keep", "train.keep_best"),
        *(
            "train.keep_every",
            "train.max_skips",
            "train.shard",
            "train.timeout",
            "train.recompute",
            "train.compile",
            "train.capture",
        ),
        "train.allow_changes",
    }
    assert all(rules[name] == "free" for name in rules if name.split(".")[0] in ("log", "sample"))
    assert {name for name, rule in rules.items() if rule == "consent"} == {
        *(
            "train.lr",
            "stage2.teacher_lr",
            "train.warmup",
            "train.lr_decay",
            "train.lr_decay_shape",
            "train.clip",
            "train.weight_decay",
            "train.precision",
            "train.drop",
        ),
        *("train.accumulate", "train.loss", "train.cosine", "train.contrastive", "train.fp8"),
        *("model.route", "model.route_blocks"),
        *(f"{key}.weight" for key in ("stage1", "stage2", "repa", "sra", "layersync", "dispersive")),
        "internal_guidance.weight",
    }


def test_only_the_recipe_is_required():
    assert RunConfig(recipe="mine").check().train.steps == 400_000


def test_section_of_an_unknown_method_gives_defaults():
    """So that a run of code that is not imported can be compared with the same method of an installed package."""
    raw = json.loads(to_json(override(recipe("digits"), {"method": "vanilla"}).restricted()))
    config = from_json(json.dumps(raw | {"method": "os:system", "stage1": {"steps": 3}}))
    assert config.section(Stage1) == Stage1()
