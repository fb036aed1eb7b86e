"""The plan of a run from its settings: nothing is imported or raised for settings that are not understood."""

import json

import pytest

from selftrans.ui.run_plan import plan_of
from tests.support import toy
from tests.support.toy import quick  # noqa: F401 - a fixture


@pytest.mark.parametrize(
    "config",
    [{}, {"version": 2}, {"version": 2, "recipe": "x", "method": "os:system"}, {"version": 99}, {"method": []}],
)
def test_settings_that_are_not_understood_are_a_line(config):
    found = plan_of(config)
    assert (
        found.problem.startswith("its settings are not understood (")
        and found.stages == ()
        and found.steps("s") is None
    )


def test_lengths_of_the_stages():
    found = plan_of(json.loads((toy.finished() / "config.json").read_text()))
    assert [(stage.name, stage.steps) for stage in found.stages] == [
        ("stage1", 4),
        ("stage2", 8),
    ] and found.problem is None
