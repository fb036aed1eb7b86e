"""SRA, LayerSync and Dispersive as methods: in the registry, trained, resumed bit for bit, and ended at their step."""

import copy
import math

import pytest
import torch

from selftrans import Batch, Objective, SiT
from selftrans.methods.registry import METHODS, stages
from selftrans.train.run import train
from tests.support.toy import assert_same_run, log, quick, toy  # noqa: F401 - quick is a fixture

NAMES = ("sra", "layersync", "dispersive")


@pytest.mark.parametrize("name", NAMES)
def test_method_trains_resumes_bit_for_bit_and_ends(tmp_path, name):
    options = {"method": name, f"{name}.until_step": 5}
    options |= {f"{name}.head_width": 8} if name == "sra" else {}
    train(toy(options), tmp_path / "uninterrupted", quiet=True)
    train(toy(options | {"train.steps": 4}), tmp_path / "resumed", quiet=True)
    train(toy(options), tmp_path / "resumed", quiet=True)
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "resumed", stages=(name,))
    lines = log(tmp_path / "uninterrupted", name)
    assert name in lines[0] and name not in lines[-1], "the term is absent after its end"


@pytest.mark.parametrize("name", NAMES)
def test_method_is_registered_with_one_stage_without_a_teacher(name):
    assert name in METHODS
    (stage,) = stages(toy({"method": name}))
    student = SiT((1, 4, 4), 3, width=16, depth=4, heads=2, patch=2)
    objective = Objective(student, stage.guide(student, None))
    objective.watch(copy.deepcopy(student))
    loss, report = objective(Batch(torch.randn(4, 1, 4, 4), torch.arange(4) % 3), 0)
    loss.backward()
    assert stage.teacher is None and stage.name == name and math.isfinite(loss.item()) and name in report
