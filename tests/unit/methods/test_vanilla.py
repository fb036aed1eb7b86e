"""The method without guidance: one stage, no section, the flow loss alone."""

import torch

from selftrans.config import RunConfig, Train
from selftrans.methods.objective import Objective
from selftrans.methods.registry import BASELINE
from selftrans.methods.vanilla import VANILLA
from tests.support.guidances import data
from tests.support.stub import Stub


def test_vanilla_is_the_baseline_with_one_stage_and_no_guidance():
    (stage,) = VANILLA.stages(RunConfig(recipe="digits", method="vanilla", train=Train(steps=6)))
    assert VANILLA.name == BASELINE and VANILLA.sections == ()
    assert (stage.steps, stage.teacher, stage.encoder, stage.sections) == (6, None, None, ())
    loss, report = Objective(Stub(), stage.guide(Stub(), None))(data(10), 0)
    assert set(report) == {"flow"} and torch.equal(loss.detach(), report["flow"])
